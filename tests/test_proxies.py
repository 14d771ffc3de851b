"""The service behind nginx and Caddy as Debian has them, with TLS, below a path; run with `make test-proxy`.

What runs is what examples/ has, but for names, ports and the certificate.
"""

import base64
import contextlib
import io
import os
import shutil
import socket
import ssl
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import WatchedBackend, served, wait_until

from cn_clip.clip.encoder import Encoder
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.store import open_index
from cn_clip.retrieval.writer import NewItem, open_writer
from cn_clip.serve.access import COOKIE, Hosts

pytestmark = pytest.mark.proxy

EXAMPLES = Path(__file__).parents[1] / "examples"
KEY = "a-long-key-of-24-letters"


def program(name: str) -> str:
    """The proxy of the environment (NGINX, CADDY), or of the path; skips the test without it."""
    found = os.environ.get(name.upper()) or shutil.which(name) or shutil.which(name, path="/usr/sbin")
    return found or pytest.skip(f"needs {name}")


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(certificate, key) of localhost."""
    folder = tmp_path_factory.mktemp("tls")
    files = folder / "localhost.pem", folder / "localhost.key"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-days", "2", "-nodes"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", *subject]
    subprocess.run([*command, "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    return files


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """The port of a service with a key, a page and originals, one of them of 20 MB."""
    folder = tmp_path_factory.mktemp("photos")
    stream = io.BytesIO()
    Image.new("RGB", (400, 300)).save(stream, "JPEG")
    (folder / "a b.jpg").write_bytes(stream.getvalue() + bytes(20 << 20))
    known = {"source": str(folder), "path": str(folder / "a b.jpg")}
    with open_writer(folder / "photos.index", Manifest(ModelInfo("tiny", "fingerprint", 4))) as writer:
        writer.commit([NewItem("a b.jpg", np.array([1, 0, 0, 0], dtype=np.float32), known, stream.getvalue())])
    with served(
        Encoder(WatchedBackend()),
        index=open_index(folder / "photos.index"),
        api_key=KEY,
        hosts=Hosts(allowed=["localhost"]),
        root_path="/photos",
        with_page=True,
        with_originals=True,
    ) as address:
        yield int(address.rsplit(":", 1)[1])


def nginx(folder: Path, port: int, service: int, certificate: tuple[Path, Path]) -> list[str]:
    text = (EXAMPLES / "nginx.conf").read_text(encoding="utf-8")
    for old, new in (
        ("127.0.0.1:8000", f"127.0.0.1:{service}"),
        ("listen 443 ssl", f"listen 127.0.0.1:{port} ssl"),
        ("/etc/ssl/certs/photos.example.com.pem", str(certificate[0])),
        ("/etc/ssl/private/photos.example.com.key", str(certificate[1])),
        ("server_name photos.example.com", "server_name localhost"),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    places = "".join(
        f"{kind}_temp_path {folder}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    main = f"daemon off; pid {folder}/pid; error_log {folder}/log; events {{}} "
    (folder / "nginx.conf").write_text(f"{main} http {{ access_log off; {places}\n{text}\n}}\n", encoding="utf-8")
    return [program("nginx"), "-c", str(folder / "nginx.conf"), "-p", str(folder), "-e", str(folder / "log")]


def caddy(folder: Path, port: int, service: int, certificate: tuple[Path, Path]) -> list[str]:
    text = (EXAMPLES / "Caddyfile").read_text(encoding="utf-8")
    name = "\nphotos.example.com {\n"
    assert text.count(name) == text.count("127.0.0.1:8000") == 1
    ours = f"\nhttps://localhost:{port} {{\n\ttls {certificate[0]} {certificate[1]}\n\tbind 127.0.0.1\n"
    text = text.replace(name, ours).replace("127.0.0.1:8000", f"127.0.0.1:{service}")
    text = "{\n\tadmin off\n\tauto_https off\n}\n" + text
    (folder / "Caddyfile").write_text(text, encoding="utf-8")
    return [program("caddy"), "run", "--config", str(folder / "Caddyfile"), "--adapter", "caddyfile"]


@pytest.fixture(scope="module", params=[nginx, caddy], ids=["nginx", "caddy"])
def client(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    service: int,
    certificate: tuple[Path, Path],
) -> Iterator[httpx.Client]:
    """Of the proxy, below its path."""
    command: Callable[..., list[str]] = request.param
    folder, port = tmp_path_factory.mktemp("proxy"), free_port()
    environment = {**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder), "XDG_CONFIG_HOME": str(folder)}
    with (folder / "output").open("wb") as output:
        process = subprocess.Popen(
            command(folder, port, service, certificate), stderr=output, stdout=output, env=environment
        )
    try:
        context = ssl.create_default_context(cafile=str(certificate[0]))
        with httpx.Client(base_url=f"https://localhost:{port}/photos", verify=context, timeout=60) as client:
            wait_until(lambda: client.get("/readyz").status_code == 200)
            yield client
    finally:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        process.kill()


def test_the_page_and_what_it_asks_for_lie_below_the_path(client: httpx.Client) -> None:
    page = client.get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    moved = httpx.get(str(client.base_url).rstrip("/"), verify=client._transport._pool._ssl_context)  # type: ignore[attr-defined]
    assert moved.status_code in (301, 302, 307, 308)
    assert moved.headers["location"].endswith("/photos/")


def test_the_cookie_is_for_tls_and_the_path_and_pictures_load_with_it(client: httpx.Client) -> None:
    assert client.get("/v1/index").status_code == 401
    origin = str(client.base_url).removesuffix("/photos/").removesuffix("/photos")
    begun = client.post("/v1/session", headers={"Authorization": f"Bearer {KEY}", "Origin": origin})
    assert begun.status_code == 204
    assert {"Secure", "HttpOnly", "Path=/photos/", "SameSite=strict"} <= set(begun.headers["set-cookie"].split("; "))
    (hit,) = client.get("/v1/index/items").json()["data"]
    assert hit["thumbnail"] == "/photos/v1/index/thumbnails/a%20b.jpg"
    assert client.get(origin + hit["thumbnail"]).headers["content-type"] == "image/jpeg"
    # The page asks, and a page of another site does not.
    asked = {"query": {"id": "a b.jpg"}}
    assert client.post("/v1/search", json=asked, headers={"Origin": origin}).status_code == 200
    assert client.post("/v1/search", json=asked, headers={"Origin": "https://evil.example"}).status_code == 403
    client.cookies.delete(COOKIE)
    assert client.get(origin + hit["thumbnail"]).status_code == 401


def test_files_pass_whole_and_in_ranges(client: httpx.Client) -> None:
    headers = {"x-api-key": KEY}
    with client.stream("GET", "/v1/index/items/a%20b.jpg", headers=headers) as answer:
        assert answer.status_code == 200
        length = int(answer.headers["content-length"])
        assert sum(map(len, answer.iter_bytes())) == length > 20 << 20
    part = client.get("/v1/index/items/a%20b.jpg", headers={**headers, "Range": "bytes=0-1"})
    assert (part.status_code, part.content) == (206, b"\xff\xd8")


def test_large_bodies_pass_up_to_the_bound(client: httpx.Client) -> None:
    stream = io.BytesIO()
    Image.effect_noise((1800, 1800), 90).save(stream, "PNG")
    assert 2 << 20 < len(stream.getvalue()) < 5 << 20
    url = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    headers = {"x-api-key": KEY}
    answer = client.post("/v1/embeddings", json={"model": "tiny", "input": {"image": url}}, headers=headers)
    assert answer.status_code == 200
    with contextlib.suppress(httpx.TransportError):  # it may hang up before all is sent
        large = client.post("/v1/embeddings", content=b" " * (11 << 20), headers=headers)
        assert large.status_code in (413, 502)

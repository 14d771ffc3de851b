"""Connecting to Milvus: users, databases and TLS of real servers, and what is no Milvus, wants more, or comes up."""

import contextlib
import http.server
import re
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import certificates
import milvus_server
import numpy as np
import pytest

from cn_clip.errors import AwayError, ConfigError, StoreError
from cn_clip.retrieval.addresses import open_index, open_writer
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.milvus_address import Address, Tls
from cn_clip.retrieval.milvus_collection import Collection
from cn_clip.retrieval.writer import NewItem
from cn_clip.secret import Secret

needs_server = pytest.mark.milvus
pytestmark = pytest.mark.milvus

MODEL = ModelInfo("Tiny", "0123", 4)
# That of every new server.
PASSWORD = "Milvus"
ROOT = {"user": "root", "password": Secret(PASSWORD)}
# Seconds within which all of these servers come up.
PATIENT = 60.0


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, certificates.Certificate]:
    """Certificates by what they are for."""
    folder = tmp_path_factory.mktemp("certificates")
    ca, other = (certificates.authority(folder, name) for name in ("authority", "other"))
    return {
        "ca": ca,
        "other": other,
        "server": certificates.signed(folder, "server", ca),
        "client": certificates.signed(folder, "client", ca),
        "stranger": certificates.signed(folder, "stranger", other),
    }


def options_of(keys: dict[str, certificates.Certificate], mode: int) -> tuple[str, ...]:
    """Of milvus-server, with users; mode: 1: TLS, 2: TLS of both sides."""
    server = keys["server"]
    paths = ("--server-pem-path", server.cert, "--server-key-path", server.key, "--ca-pem-path", keys["ca"].cert)
    return ("--authorization-enabled", "true", "--tls-mode", str(mode), *map(str, paths))


def refused(address: Address) -> str:
    """The sentence, which comes at once."""
    with pytest.raises(StoreError) as caught:
        Collection(replace(address, timeout=PATIENT)).facts()
    assert not isinstance(caught.value, AwayError)
    assert not re.search("root:Milvus|secret-of-guest|wrong;", str(caught.value))
    assert str(caught.value).startswith(f"{address}: ")
    return caught.value.sentence


def fill(address: Address) -> None:
    """An index of one item."""
    with open_writer(address, Manifest(MODEL)) as opened:
        opened.commit([NewItem("a", np.eye(4, dtype=np.float32)[0])])


def found(address: Address) -> list[Any]:
    """What a search finds."""
    return [hit.id for hit in open_index(address).search(np.eye(1, 4, dtype=np.float32), 3)[0]]


@needs_server
def test_a_server_with_users_and_databases(keys: dict[str, certificates.Certificate]) -> None:
    with milvus_server.own(*options_of(keys, 0)) as port:
        bare = Address("127.0.0.1", port, "photos", PATIENT)
        root = replace(bare, **ROOT)
        fill(root)
        collection = Collection(root)
        collection._client.create_database("family")
        fill(replace(root, database="family", collection="kept"))
        collection._client.create_user("guest", "secret-of-guest")
        assert found(root) == ["a"]
        assert found(replace(bare, token=Secret(f"root:{PASSWORD}"))) == ["a"]
        assert found(replace(root, database="family", collection="kept")) == ["a"]
        assert Collection(replace(root, collection="kept")).facts() is None
        assert Collection(replace(root, database="family")).facts() is None
        assert refused(bare).startswith("the server wants a login; give CN_CLIP_MILVUS_USER")
        wrong = replace(root, password=Secret("wrong"))
        assert refused(wrong) == "the server does not accept the user 'root' or the password; correct it"
        assert refused(replace(bare, token=Secret("wrong"))) == "the server does not accept the token; correct it"
        assert refused(replace(root, database="absent")) == (
            "the server has no database 'absent'; make it there, or name another"
        )
        assert refused(replace(root, tls=Tls(keys["ca"].cert))) == (
            "the server speaks no TLS there; write milvus:// in place of https://, and leave tls out"
        )
        guest = replace(bare, user="guest", password=Secret("secret-of-guest"))
        assert re.match(r"the login may not do that on this server \(.*\); have it granted", refused(guest))


@needs_server
def test_a_server_with_tls(keys: dict[str, certificates.Certificate]) -> None:
    with milvus_server.own(*options_of(keys, 1)) as port:
        bare = Address("127.0.0.1", port, "photos", PATIENT, **ROOT)  # type: ignore[arg-type]
        address = replace(bare, tls=Tls(keys["ca"].cert))
        fill(address)
        assert found(address) == ["a"]
        assert found(replace(address, tls=Tls(keys["ca"].cert, server_name="milvus.test"))) == ["a"]
        wrong = replace(address, tls=Tls(keys["ca"].cert, server_name="other.test"))
        assert refused(wrong).startswith(
            "the certificate of the server is not accepted (Hostname mismatch, certificate is not valid for 'other"
        )
        for tls in (Tls(keys["other"].cert), Tls()):
            assert refused(replace(address, tls=tls)).startswith(
                "the certificate of the server is not accepted (unable to get local issuer certificate); give the"
            )
        assert refused(bare) == "the server wants TLS; write https:// in place of milvus://"
        assert found(address) == ["a"]


@needs_server
def test_a_server_that_wants_certificates(keys: dict[str, certificates.Certificate]) -> None:
    with milvus_server.own(*options_of(keys, 2)) as port:
        bare = Address("127.0.0.1", port, "photos", PATIENT, **ROOT)  # type: ignore[arg-type]
        address = replace(bare, tls=Tls(keys["ca"].cert, *keys["client"]))
        fill(address)
        assert found(address) == ["a"]
        assert refused(replace(address, tls=Tls(keys["ca"].cert))).startswith(
            "the server wants a certificate of this side ("
        )
        assert refused(replace(address, tls=Tls(keys["ca"].cert, *keys["stranger"]))).startswith(
            "the server does not accept cert ("
        )
        assert refused(bare) == "the server wants TLS; write https:// in place of milvus://"


# --- what is no Milvus


@contextlib.contextmanager
def listening(answer: Callable[[socket.socket], None]) -> Iterator[Address]:
    """A server that does something with each connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection = listener.accept()[0]
                    with contextlib.suppress(OSError), connection:
                        answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield Address("127.0.0.1", listener.getsockname()[1], "photos", PATIENT)
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture(autouse=True)
def package() -> None:
    """pymilvus, without which nothing is connected."""
    pytest.importorskip("pymilvus")


def test_another_program_at_the_port_is_told_at_once() -> None:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert refused(Address("127.0.0.1", server.server_port, "photos")).startswith("an HTTP server answers there")
        server.shutdown()
    with listening(lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")) as address:
        assert refused(address) == "what answers there is not Milvus; check the host and the port"


def test_a_server_that_wants_tls_is_told_at_once(keys: dict[str, certificates.Certificate]) -> None:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*keys["server"])

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as inner:
            inner.recv(100)

    with listening(answer) as address:
        assert refused(address) == "the server wants TLS; write https:// in place of milvus://"
        assert refused(replace(address, tls=Tls(keys["other"].cert))).startswith("the certificate of the server is not")


def silent(connection: socket.socket) -> None:
    """Reads, until the other side gives up."""
    while connection.recv(100):
        pass


@pytest.mark.parametrize(
    ("reason", "answer"),
    [
        ("it closed the connection", lambda connection: None),
        ("no answer", silent),
    ],
)
def test_what_may_come_up_is_waited_for(reason: str, answer: Callable[[socket.socket], None]) -> None:
    with listening(answer) as address, pytest.raises(AwayError) as caught:
        Collection(replace(address, timeout=1))
    assert caught.value.sentence.startswith(f"Milvus did not answer within 1 s ({reason}); check that it runs there")


def test_a_name_that_is_not_known_is_told() -> None:
    with pytest.raises(AwayError, match=r"did not answer within 1 s \(the name absent\.invalid is not known\)"):
        Collection(Address("absent.invalid", 1, "photos", 1))


def test_faulty_certificates_are_told_before_anything_is_sent(
    tmp_path: Path, keys: dict[str, certificates.Certificate]
) -> None:
    (tmp_path / "no.pem").write_text("-", encoding="utf-8")
    absent = Address("absent.invalid", 1, "photos", 1)
    for tls, sentence in (
        (Tls(tmp_path / "no.pem"), "expected certificates in PEM"),
        (Tls(keys["ca"].cert, keys["client"].cert, keys["server"].key), "expected a certificate in PEM and its key"),
    ):
        with pytest.raises(ConfigError, match=sentence):
            Collection(replace(absent, tls=tls))


def test_a_server_of_another_version_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import grpc
    import pymilvus

    class Client:
        """Of a server that does not know what conditions of today are."""

        def has_collection(self, **options: Any) -> bool:
            raise pymilvus.MilvusException(code=1, message="cannot parse expression")

        def get_server_version(self, **options: Any) -> str:
            return "v2.2.16"

    monkeypatch.setattr("cn_clip.retrieval.milvus_collection.connect", lambda *args: Client())
    with pytest.raises(
        StoreError, match=r"refused the request \(cannot parse .*\); it is Milvus v2\.2\.16, expected 2\.3 or"
    ):
        Collection(Address("h", 1, "photos")).facts()

    class Unknown(grpc.RpcError):  # type: ignore[misc]
        """What gRPC raises for a call that the server does not have."""

        def code(self) -> Any:
            return grpc.StatusCode.UNIMPLEMENTED

        def details(self) -> str:
            return "unknown service milvus.proto.milvus.MilvusService"

    monkeypatch.setattr(Client, "has_collection", lambda self, **options: (_ for _ in ()).throw(Unknown()))
    with pytest.raises(StoreError, match=r"does not know what is asked \(unknown service .*\); expected Milvus 2\.3"):
        Collection(Address("h", 1, "photos")).facts()

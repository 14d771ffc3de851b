"""No output shows a password: every command and the service, with secrets in addresses, files and the environment.

Outputs are what is printed and logged, JSON, errors and their causes, answers over HTTP, and what is kept in an index.
"""

import contextlib
import io
import itertools
import json
import logging
import os
import pickle
import subprocess
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import milvus_server
import pytest
import warm_python

from cn_clip import cli
from cn_clip.cli import COMMANDS
from cn_clip.demo import emoji
from cn_clip.index import build, info, search
from cn_clip.retrieval.addresses import open_index
from cn_clip.retrieval.milvus_address import parse_address
from cn_clip.retrieval.milvus_collection import Collection
from cn_clip.retrieval.schemes import address_of
from cn_clip.secret import AddressText

# In no other text, and also looked for as it is written in an address and as gRPC sends it.
SECRET = "Geheim#7/ü@x"
TYPED = "Geheim%237%2F%C3%BC%40x"
HIDDEN = (SECRET, TYPED, "Geheim", "R2VoZWlt", "Z3Vlc3Q6R2VoZWl")
PASSWORDS = (f"me:{TYPED}@", f"me:{SECRET}@")
BUILD = ("--model", "Emoji-Tiny", "--num-threads", "1")


def assert_hidden(text: object) -> None:
    """No form of the secret."""
    assert not [one for one in HIDDEN if one in str(text)], text


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three."""
    (tmp_path / "p").mkdir()
    for number, one in enumerate(emoji.load("twemoji")[:3]):
        (tmp_path / "p" / f"{number}.png").write_bytes(emoji.png(one))
    return tmp_path / "p"


@pytest.fixture
def ran(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Callable[..., str]:
    """Runs a command and returns all that it said, which holds no secret."""
    caplog.set_level(logging.DEBUG, "cn_clip")

    def call(*args: object) -> str:
        capsys.readouterr()
        failure = ""
        try:
            cli.main([*map(str, args)])
        except SystemExit as ended:
            failure = "".join(traceback.format_exception(ended))
        except Exception as error:
            failure = "".join(traceback.format_exception(error))
        said = capsys.readouterr()
        assert_hidden(said.out + said.err + failure + caplog.text)
        return said.out + said.err

    return call


def commands(index: str, pictures: Path) -> list[list[object]]:
    """All that take an index."""
    return [
        ["index", "build", pictures, "--output", index, *BUILD],
        ["index", "build", pictures, "--store", index, *BUILD, "--json"],
        ["index", "add", index, pictures, "--id-prefix", "x/"],
        ["index", "add", "--store", index, pictures / "1.png", "--id-prefix", "y/", "--json"],
        ["index", "remove", index, "x/0.png"],
        ["index", "remove", index, "absent"],
        ["index", "remove", index, "--where", "path~y/", "--json"],
        ["index", "info", index],
        ["index", "info", index, "--json"],
        ["index", "check", index],
        ["index", "duplicates", index],
        ["search", index, "笑"],
        ["search", index, "--id", "0.png", "--json"],
        ["search", index, "--id", "absent"],
        ["search", index, "笑", "--where", "absent=1"],
        ["search", index, "笑", "--grid", pictures.parent / "grid.png"],
    ]


# --- without a server


@pytest.mark.parametrize("login", PASSWORDS)
def test_commands_with_a_server_that_is_away(login: str, pictures: Path, ran: Callable[..., str]) -> None:
    address = f"milvus://{login}127.0.0.1:{milvus_server.free_port()}/photos?timeout=0.1"
    for args in (
        *commands(address, pictures),
        ["index", "watch", pictures, "--output", address],
        ["serve", address],
        ["mcp", address],
    ):
        assert ran(*args), args


@pytest.mark.parametrize(
    "address",
    [
        *(
            f"{scheme}://{login}h:{port}/c"
            for scheme, login, port in itertools.product(
                ("milvus", "milvuss", "https", "pgvector", "postgres", "s3"), PASSWORDS, ("x", "1/照片", "1/a/b/c")
            )
            if (scheme, port) != ("pgvector", "1/照片")  # a database may be called so
        ),
        *(f"milvus://h/c?{name}={SECRET}&color=1" for name in ("password", "token")),
        f"milvus:me:{SECRET}@h/c",
        f"milvus:/me:{SECRET}@h/c",
        f"MILVUS://me:{SECRET}@h/c",
    ],
)
def test_commands_with_a_faulty_address(address: str, pictures: Path, ran: Callable[..., str]) -> None:
    for args in (["index", "info", address], ["index", "build", pictures, "--output", address], ["serve", address]):
        assert "***@" in ran(*args) or "=***" in ran(*args), args


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_a_command_that_refuses_its_arguments_repeats_no_secret(command: str, ran: Callable[..., str]) -> None:
    address = f"milvus://me:{SECRET}@h:1/c?token={SECRET}"
    for more in ([address], [f"--absent={address}"], ["--absent", address], [f"--device={address}"], ["--k", address]):
        assert ran(*command.split(), *more, "--absent-too"), more


@pytest.mark.parametrize("name", ["password", "token"])
def test_settings_in_the_environment_and_in_files(
    name: str, tmp_path: Path, pictures: Path, ran: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"milvus://{'me@' if name == 'password' else ''}127.0.0.1:{milvus_server.free_port()}/photos"
    settings = tmp_path / "milvus.toml"
    settings.write_text(f'timeout = 0.1\n{name} = "{SECRET}"', encoding="utf-8")
    settings.chmod(0o644)
    for more in ([address, "--milvus-config", settings], [f"{address}?color=1", "--milvus-config", settings]):
        assert ran("index", "info", *more)
        assert ran("search", *more, "笑")
    settings.write_text(f'{name} = "{SECRET}', encoding="utf-8")
    assert "is no TOML" in ran("index", "info", address, "--milvus-config", settings)
    settings.write_text(f'{name}s = "{SECRET}"', encoding="utf-8")
    assert "is no setting" in ran("index", "info", address, "--milvus-config", settings)
    monkeypatch.setenv(f"CN_CLIP_MILVUS_{name.upper()}", SECRET)
    for variable, value in (("TIMEOUT", "0.1"), ("URI", f"http://me:{TYPED}@127.0.0.1:x"), ("USERS", SECRET)):
        monkeypatch.setenv(f"CN_CLIP_MILVUS_{variable}", value)
        assert ran("index", "info", address)


def test_what_holds_an_address_shows_no_secret_in_any_form() -> None:
    text = f"milvus://me:{TYPED}@h/c"
    address = parse_address(text, environment={})
    assert address.password.reveal() == SECRET
    given: Sequence[object] = (
        info.Options(index=AddressText(text)),
        search.Options(index=AddressText(text), text="笑"),
        build.Options(source="p", output=AddressText(text)),
        address,
        address_of(AddressText(text)),
        vars(address),
    )
    for one in given:
        assert_hidden(f"{one} {one!r} {json.dumps(one, default=str)}")
        with contextlib.suppress(Exception):
            assert_hidden(pickle.dumps(one))


# --- with a server that wants the password


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}


@contextlib.contextmanager
def service(*args: str, **environment: str) -> Iterator[tuple["subprocess.Popen[str]", str, io.StringIO]]:
    """A process that serves, its address, and at the end all that it printed."""
    said = io.StringIO()
    with subprocess.Popen(
        [warm_python.program(), "-m", "cn_clip", "serve", "--port", "0", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        env={**ENVIRONMENT, **environment},
    ) as process:
        try:
            assert process.stdout is not None
            url = ""
            for line in process.stdout:
                said.write(line)
                if "http://" in line and not url:
                    url = line[line.index("http://") :].split()[0].rstrip("/")
                if "ready: " in line:
                    break
            yield process, url, said
        finally:
            process.terminate()
            said.write(process.communicate(timeout=60)[0])


@pytest.mark.milvus
def test_commands_and_the_service_with_a_server_that_wants_the_password(
    pictures: Path, tmp_path: Path, ran: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with milvus_server.own("--authorization-enabled", "true") as port:
        root = parse_address(f"milvus://root:Milvus@127.0.0.1:{port}/photos?timeout=60", environment={})
        Collection(root)._client.create_user("me", SECRET)
        Collection(root)._client.grant_role("me", "admin")
        with contextlib.closing(milvus_server.Relay("127.0.0.1", port)) as relay:
            typed = f"milvus://me:{TYPED}@127.0.0.1:{relay.port}/photos?timeout=5"
            said = [ran(*args) for args in commands(typed, pictures)]
            assert "Emoji-Tiny" in said[7]
            assert len(json.loads(said[12])["hits"]) >= 2
            wrong = ran("index", "info", f"milvus://me:{TYPED}2@127.0.0.1:{relay.port}/photos?timeout=5")
            assert "does not accept the user 'me' or the password" in wrong
            kept = Collection(parse_address(typed, environment={}))
            assert_hidden(kept.call("describe_collection"))
            assert_hidden(list(open_index(kept.address).items()))
            monkeypatch.setenv("CN_CLIP_MILVUS_PASSWORD", SECRET)
            bare = f"milvus://me@127.0.0.1:{relay.port}/photos?timeout=5"
            assert "Emoji-Tiny" in ran("index", "info", bare)
            with service(bare, CN_CLIP_MILVUS_PASSWORD=SECRET) as (process, url, printed):
                with open(f"/proc/{process.pid}/cmdline", encoding="utf-8") as file:
                    assert_hidden(file.read())
                for answer in asked(url):
                    assert answer.status_code < 500
                relay.stall()
                for answer in asked(url):
                    assert_hidden(answer.text)
                assert httpx.get(f"{url}/readyz").status_code == 503
            assert "did not answer within 5 s" in printed.getvalue()
            assert_hidden(printed.getvalue())
        with milvus_server.lite() as lite:
            assert_hidden(ran("index", "build", pictures, "--output", lite, *BUILD))


def asked(url: str) -> list[httpx.Response]:
    """What the routes that touch an index answer; none shows the secret."""
    found = [
        httpx.get(f"{url}{path}", timeout=60) for path in ("/v1/models", "/v1/indexes", "/metrics", "/openapi.json")
    ]
    found += [
        httpx.post(f"{url}/v1/search", json=request, timeout=60)
        for request in (
            {"query": "笑"},
            {"query": {"id": "0.png"}},
            {"query": "笑", "where": "absent=1"},
            {"query": {}},
        )
    ]
    found += [httpx.get(f"{url}/v1/index/thumbnails/{name}", timeout=60) for name in ("0.png", "absent")]
    for one in found:
        assert_hidden(f"{one.text} {one.headers}")
    return found

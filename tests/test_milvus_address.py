"""Addresses of Milvus: what completes them, in which order, and what is refused. No server is needed."""

import os
import re
from pathlib import Path

import pytest

from cn_clip import cli
from cn_clip.errors import ConfigError
from cn_clip.retrieval.milvus_address import Address, Tls, parse_address
from cn_clip.retrieval.schemes import address_of
from cn_clip.secret import AddressText, Secret

CLOUD = "in03-0123.serverless.gcp-us-west1.cloud.zillizcloud.com"


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without settings of the machine that tests."""
    for name in [one for one in os.environ if one.startswith("CN_CLIP_MILVUS_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    """A file that may be a certificate."""
    (tmp_path / "ca.pem").write_text("-", encoding="utf-8")
    return tmp_path / "ca.pem"


def settings(folder: Path, text: str, mode: int = 0o600) -> str:
    """A file of settings."""
    path = folder / "milvus.toml"
    path.write_text(text, encoding="utf-8")
    path.chmod(mode)
    return str(path)


def parsed(text: str, named: str | None = None, /, **environment: str) -> Address:
    """As `parse_address`, with CN_CLIP_MILVUS_… as arguments."""
    return parse_address(
        text, named, environment={f"CN_CLIP_MILVUS_{name.upper()}": value for name, value in environment.items()}
    )


def test_tls_is_told_by_the_scheme_or_a_setting(ca: Path) -> None:
    assert parsed("https://h/c") == Address("h", 443, "c", tls=Tls())
    assert parsed("https://h:19530/c") == parsed("milvus://h/c?tls=true") == Address("h", 19530, "c", tls=Tls())
    assert parsed("http://h/c?tls=false") == Address("h", 19530, "c")
    assert parsed(f"https://h:1/c?ca={ca}&cert={ca}&key={ca}&server_name=m") == Address(
        "h", 1, "c", tls=Tls(ca, ca, ca, "m")
    )


@pytest.mark.parametrize("text", [f"https://{CLOUD}/photos", f"milvus://{CLOUD}/photos"])
def test_the_cloud_is_reached_by_tls_with_its_token(text: str) -> None:
    assert parsed(text, token="db_1:x") == Address(CLOUD, 443, "photos", token=Secret("db_1:x"), tls=Tls())
    assert str(parsed(text, token="x")) == f"https://{CLOUD}:443/photos"


def test_an_address_that_was_shown_is_understood_again() -> None:
    for text in ("milvus://h/c", "milvus://[::1]:1/d/c", "https://h:1/c", "https://h/d/c"):
        assert parsed(str(parsed(text))) == parsed(text)


def test_the_address_goes_before_the_named_file_before_the_environment_before_its_file(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    named = settings(tmp_path, "timeout = 2\ndatabase = 'two'\nconsistency = 'bounded'")
    of_environment = settings(tmp_path / "more", "timeout = 4\ndatabase = 'four'\nuser = 'me'\npassword = 'pw'")
    environment = {"timeout": "3", "database": "three", "consistency": "strong"}
    assert parsed("milvus://h/one/c?timeout=1", named, **environment) == Address(
        "h", 19530, "c", 1, consistency="Bounded", database="one"
    )
    assert parsed("milvus://h/c", named, **environment, config=of_environment) == Address(
        "h", 19530, "c", 2, consistency="Bounded", database="two"
    )
    assert parsed("milvus://h/c", **environment, config=of_environment) == Address(
        "h", 19530, "c", 3, "me", Secret("pw"), "Strong", database="three"
    )
    assert parsed("milvus://h/c", config=of_environment).timeout == 4


def test_settings_with_a_uri_are_for_that_server_alone(tmp_path: Path) -> None:
    named = settings(tmp_path, "uri = 'https://h:19530/db'\ntoken = 'x'")
    expected = Address("h", 19530, "c", token=Secret("x"), database="db", tls=Tls())
    assert parsed("milvus:///c", named) == parsed("milvus://h/c", named) == expected
    assert parsed("https://h:19530/c", named) == expected
    assert parsed("milvus://other/c", named) == Address("other", 19530, "c")
    assert parsed("milvus://h:1/c", named) == Address("h", 1, "c")
    assert parsed("milvus:///c", uri="me:pw@h:7") == Address("h", 7, "c", user="me", password=Secret("pw"))


def test_a_password_goes_with_the_user_for_whom_it_was_given() -> None:
    assert parsed("milvus://me@h/c", password="pw") == Address("h", 19530, "c", user="me", password=Secret("pw"))
    assert parsed("milvus://me:own@h/c", user="other", password="pw").password == Secret("own")
    assert parsed("milvus://me:own@h/c", token="t").token == Secret("")
    assert parsed("milvus://h/c?token=t", user="other", password="pw") == Address("h", 19530, "c", token=Secret("t"))
    with pytest.raises(ConfigError, match=r"user \(the address\): needs a password too"):
        parsed("milvus://me@h/c", user="other", password="pw")


def test_files_named_in_a_file_lie_beside_it(tmp_path: Path, ca: Path) -> None:
    named = settings(tmp_path, "uri = 'https://h'\nca = 'ca.pem'")
    assert parsed("milvus:///c", named).tls == Tls(ca)


@pytest.mark.parametrize(
    ("text", "environment", "sentence"),
    [
        ("milvus:///c", {}, "milvus:///c: names no server; write milvus://HOST:PORT/c"),
        ("milvus://h/c?token=pw7", {"user": "x"}, None),
        ("milvus://h/c", {"token": "pw7", "user": "x"}, "token (CN_CLIP_MILVUS_TOKEN) and user (CN_CLIP_MILVUS_USER)"),
        ("milvus://u:pw7@h/c?token=pw7", {}, "token (the address) and user (the address): one login is enough"),
        ("milvus://h/c", {"password": "pw7"}, "password (CN_CLIP_MILVUS_PASSWORD): needs a user too"),
        ("milvus://h/c?server_name=m", {}, "server_name (the address): is for TLS; write https://"),
        ("milvus://h/c?tls=false&server_name=m", {}, "server_name (the address) and tls (the address): is for TLS"),
        ("http://h/c", {"tls": "true"}, "tls (CN_CLIP_MILVUS_TLS): the address says http"),
        ("milvus:///c", {"tls": "true", "uri": "http://h"}, "CN_CLIP_MILVUS_TLS: contradicts CN_CLIP_MILVUS_URI"),
        ("https://h/c?cert=/a", {}, "cert (the address): needs key too"),
        ("https://h/c?cert=/a&key=/a", {}, "cert (the address): needs ca too"),
        ("https://h/c?ca=/absent/ca.pem", {}, "ca (the address): there is no file /absent/ca.pem"),
        (f"http://{CLOUD}/c", {}, "Zilliz Cloud takes TLS alone"),
        ("milvus://h/c", {"db_name": "x"}, "CN_CLIP_MILVUS_DB_NAME: is no setting; did you mean 'CN_CLIP_MILVUS_DATA"),
        ("milvus://h/c", {"tokn": "pw7"}, "CN_CLIP_MILVUS_TOKN: is no setting; did you mean 'CN_CLIP_MILVUS_TOKEN'?"),
        ("milvus://h/c", {"timeout": "-1"}, "CN_CLIP_MILVUS_TIMEOUT: expected seconds, above 0 and below 86400"),
        ("milvus://h/c", {"tls": "maybe"}, "CN_CLIP_MILVUS_TLS: expected true or false, got 'maybe'"),
        ("milvus://h/c", {"database": "a-b"}, "CN_CLIP_MILVUS_DATABASE: expected a name of letters, digits and _"),
        ("milvus://h/c", {"consistency": "quick"}, "CN_CLIP_MILVUS_CONSISTENCY: expected one of strong, bounded"),
        ("milvus:///c", {"uri": "tcp://u:pw7@h"}, "CN_CLIP_MILVUS_URI: expected https://HOST:PORT or http://HOST:PORT"),
        ("milvus:///c", {"uri": "http://u:pw7@h:x"}, "CN_CLIP_MILVUS_URI: expected https://HOST:PORT"),
        ("milvus://h/c", {"config": "/absent.toml"}, "/absent.toml: the settings cannot be read (No such"),
    ],
)
def test_contradictions_and_faulty_settings_are_refused(
    text: str, environment: dict[str, str], sentence: str | None
) -> None:
    if sentence is None:
        parsed(text, **environment)
        return
    with pytest.raises(ConfigError, match=re.escape(sentence)) as caught:
        parsed(text, **environment)
    assert "pw7" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("password = pw7\n", "is no TOML, see line 1; write lines as timeout = 20"),
        ("pasword = 'pw7'", "pasword: is no setting; did you mean 'password'?"),
        ("secure = true", "secure: is no setting; did you mean 'tls'?"),
        ("password = 7777", "password: expected a text that is not empty"),
        ("[milvus]\npassword = 'pw7'", "milvus: is no setting; known are uri, user"),
        ("timeout = 'soon'", "timeout: expected seconds, above 0 and below 86400, got 'soon'"),
    ],
)
def test_faulty_files_are_refused(tmp_path: Path, text: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)) as caught:
        parsed("milvus://h/c", settings(tmp_path, text))
    assert "pw7" not in str(caught.value)
    assert "7777" not in str(caught.value)


def test_a_file_that_others_can_read_is_warned_about_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        ("token = 'pw7'", 0o600, False),
        ("token = 'pw7'", 0o644, True),
        ("uri = 'http://u:pw7@h'", 0o640, True),
        ("timeout = 3", 0o644, False),
    ]
    for number, (text, mode, is_warned) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        named = settings(folder, text, mode)
        for _ in range(2):
            parsed("milvus://h/c", named)
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.count("chmod 600") == int(is_warned), (text, oct(mode))
        assert "pw7" not in said.err


# --- other schemes


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("milvuss://h/c", "; did you mean 'milvus://'?"),
        ("milvus+tls://h/c", "; did you mean 'milvus://'?"),
        ("MILVUS:h/c", "; did you mean 'milvus://'?"),
        ("Milvus://h/c", "; did you mean 'milvus://'?"),
        ("qdrant://h/c", ""),
        ("s3://me:pw7@bucket/photos", ""),
    ],
)
def test_unknown_schemes_are_refused_and_no_folder_is_made(
    text: str, nearest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    scheme = "s3://" if text.startswith("s3") else text.removesuffix("h/c")
    sentence = f"{scheme} is no address of an index{nearest}; known are milvus://"
    for args in (
        ["index", "build", "pictures", "--output", text],
        ["index", "add", text, "pictures"],
        ["index", "remove", text, "a"],
        ["index", "info", text],
        ["index", "check", text],
        ["index", "duplicates", text],
        ["search", text, "笑"],
        ["serve", text],
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(args)
        assert ended.value.code in (1, 2)
        said = capsys.readouterr()
        shown = " ".join((said.out + said.err).split())
        assert sentence in shown, args
        assert "pw7" not in shown
    assert [one.name for one in tmp_path.iterdir()] == ["pictures"]


def test_a_file_of_settings_is_for_servers(tmp_path: Path) -> None:
    named = settings(tmp_path, "timeout = 3")
    for text in (str(tmp_path / "i"), str(tmp_path / "i.db")):
        with pytest.raises(ConfigError, match=r"milvus\.toml: is for indexes on a Milvus server, got"):
            address_of(text, named)
    assert address_of(AddressText("milvus://me:pw@h/c"), named) == Address("h", 19530, "c", 3, "me", Secret("pw"))
    named = settings(tmp_path, "uri = 'http://h'")
    assert address_of("milvus:///c", named) == Address("h", 19530, "c")


# --- Milvus Lite


def test_what_is_there_decides_whether_a_name_is_one_of_milvus_lite(tmp_path: Path) -> None:
    lite, folder, other = (tmp_path / name for name in ("lite.db", "folder.db", "empty.db"))
    for one in (lite / "collections", folder, other):
        one.mkdir(parents=True)
    (lite / "LOCK").touch()
    (folder / "index.json").write_text("{}", encoding="utf-8")
    assert address_of(folder) == folder
    assert address_of(other) == other
    for one in (lite, tmp_path / "new.db"):
        assert address_of(one) == Address("", 0, "cn_clip", lite=one)
        assert str(address_of(one)) == str(one)
    (tmp_path / "photos.db").write_bytes(b"SQLite format 3\0")
    with pytest.raises(ConfigError, match=r"photos\.db: is a file; Milvus Lite keeps a folder there"):
        address_of(tmp_path / "photos.db")
    assert address_of(tmp_path / "new.index") == tmp_path / "new.index"

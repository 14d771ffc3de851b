"""Pages of other sites do not reach a service without a key, whatever name they give to this machine."""

from collections.abc import Iterator

import httpx
import pytest
from serving import WatchedBackend, served

from cn_clip.clip.encoder import Encoder
from cn_clip.errors import ConfigError
from cn_clip.serve import main
from cn_clip.serve.access import Hosts
from cn_clip.serve.schemas import RefusalError

REQUEST = {"model": "tiny", "input": "猫"}


def verdict(hosts: Hosts, host: str | None, origin: str | None = None, method: str = "POST") -> str | None:
    """The code of the refusal; None where there is none."""
    given = {b"host": host, b"origin": origin}
    headers = [(name, value.encode("latin-1")) for name, value in given.items() if value is not None]
    try:
        hosts.check({"type": "http", "method": method, "headers": headers})
    except RefusalError as refusal:
        return refusal.code if refusal.status == 403 else str(refusal.status)
    return None


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:8000", "[::1]", "[::1]:8000", "localhost."])
def test_this_machine_is_served_under_its_own_names(host: str) -> None:
    assert verdict(Hosts(), host) is None


@pytest.mark.parametrize(
    "host",
    [
        *("example.com", "localhost.example.com", "127.0.0.1.example.com", "127.0.0.1:8000@example.com", "10.0.0.7"),
        *(
            None,
            "",
            ":8000",
            "[::1",
            "::1",
            "localhost:8000:8000",
            "localhost:80 ",
            "localhost/",
            "猫".encode().decode("latin-1"),
        ),
    ],
)
def test_any_other_name_is_refused(host: str | None) -> None:
    assert verdict(Hosts(), host) == "host_not_allowed"


def test_a_machine_that_listens_to_all_is_served_under_any_address_but_no_name() -> None:
    for listens_at in ("0.0.0.0", "::", "", "0:0:0:0:0:0:0:0", "0::0"):
        everywhere = Hosts(listens_at)
        for host in ("10.0.0.7:8000", "[fe80::1]:8000", "localhost"):
            assert verdict(everywhere, host) is None, host
        assert verdict(everywhere, "example.com:8000") == "host_not_allowed"
        assert verdict(everywhere, ".") == "host_not_allowed"
        # The page of an address is as foreign as that of a name.
        assert verdict(everywhere, "10.0.0.7:8000", "http://10.6.6.6") == "origin_not_allowed"


def test_the_address_listened_at_and_those_allowed_are_served() -> None:
    hosts = Hosts("10.0.0.7", ["Photos.Example.com", "fd00::7", "[fd00::8]"])
    for host in ("10.0.0.7:8000", "photos.example.com", "photos.example.COM:443", "[fd00::7]:8000", "[fd00::8]"):
        assert verdict(hosts, host) is None, host
    assert verdict(hosts, "10.0.0.8:8000") == verdict(hosts, "example.com") == "host_not_allowed"


@pytest.mark.parametrize(
    ("given", "host"),
    [
        ("FD00:0:0:0:0:0:0:7", "[fd00::7]:8000"),
        ("[fd00::7]", "[fd00:0::0:7]"),
        ("照片.cn", "xn--2uxqs.cn:8000"),
        ("XN--2UXQS.CN", "xn--2uxqs.cn"),
        ("Bücher.Example", "XN--BCHER-KVA.example."),
        ("photos.example.com.", "photos.example.com"),
        ("photo_server", "photo_server:8000"),
        ("10.0.0.7", "10.0.0.7."),
    ],
)
def test_names_are_compared_as_browsers_write_them(given: str, host: str) -> None:
    assert verdict(Hosts(allowed=[given]), host, f"https://{host}") is None
    assert verdict(Hosts(given.strip("[]")), host, f"https://{host}") is None
    assert verdict(Hosts(), host) == "host_not_allowed"


@pytest.mark.parametrize(
    ("origin", "expected"),
    [
        (None, None),
        ("http://10.0.0.7:8000", None),
        ("https://photos.example.com", None),
        ("http://localhost:3000", None),
        ("http://10.0.0.7:9000", None),
        ("http://example.com", "origin_not_allowed"),
        ("http://10.0.0.8:8000", "origin_not_allowed"),
        ("null", "origin_not_allowed"),
        ("", "origin_not_allowed"),
    ],
)
def test_a_page_may_ask_if_its_own_server_or_an_allowed_one_gave_it(origin: str | None, expected: str | None) -> None:
    hosts = Hosts("0.0.0.0", ["photos.example.com"])
    for method in ("POST", "GET", "HEAD", "OPTIONS"):
        assert verdict(hosts, "10.0.0.7:8000", origin, method=method) == expected


@pytest.mark.parametrize(
    "given",
    [
        *("https://photos.example.com", "photos.example.com:443", "", ".", "a b", "a..b", "a" * 64),
        *("*", "*.example.com", "[fd00::8", "fd00::8]", "[photos.example.com]", "[fd00::8]:8000", "[10.0.0.7]"),
    ],
)
def test_an_allowed_host_is_a_name_or_an_address(given: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Hosts(allowed=[given])
    assert str(caught.value) == (
        f"--allowed-host: expected a name or an address, without scheme, port and *, got {given!r}; "
        "for several names give it several times"
    )


@pytest.mark.parametrize(("host", "origin"), [("", None), (":8000", None), ("localhost", "null"), ("localhost", "")])
def test_a_refusal_advises_no_name_where_there_is_none(host: str, origin: str | None) -> None:
    headers = [(b"host", host.encode())] + ([] if origin is None else [(b"origin", origin.encode())])
    with pytest.raises(RefusalError) as caught:
        Hosts().check({"type": "http", "method": "POST", "headers": headers})
    header, value = ("Host", host) if origin is None else ("Origin", origin)
    assert caught.value.message == f"{header}: {value!r} names no host; a server without an API key answers none such"


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    with served(Encoder(WatchedBackend()), hosts=Hosts(allowed=["photos.example.com"])) as address:
        yield address


def test_the_refusal_names_the_flag(address: str) -> None:
    answer = httpx.post(f"{address}/v1/embeddings", json=REQUEST, headers={"Host": "evil.example:8000"})
    assert answer.status_code == 403
    assert answer.json()["error"] == {
        "message": "Host: 'evil.example:8000' is not served here; if it should be, start the server with "
        "--allowed-host evil.example, or with an API key",
        "type": "invalid_request_error",
        "param": "Host",
        "code": "host_not_allowed",
    }


def test_a_form_of_another_site_is_refused_before_its_body_is_read(address: str) -> None:
    headers = {"Origin": "http://evil.example", "Content-Type": "text/plain"}
    answer = httpx.post(f"{address}/v1/embeddings", content=b"{", headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "origin_not_allowed")
    assert "--allowed-host evil.example" in answer.json()["error"]["message"]


def test_everything_but_the_probes_asks_for_the_host(address: str) -> None:
    evil, allowed = {"Host": "evil.example"}, {"Host": "photos.example.com"}
    for path in ("/v1/models", "/metrics", "/openapi.json", "/", "/nothing"):
        assert httpx.get(f"{address}{path}", headers=evil).status_code == 403, path
        assert httpx.get(f"{address}{path}", headers=allowed).status_code != 403, path
    for path in ("/healthz", "/readyz"):
        assert httpx.get(f"{address}{path}", headers=evil).status_code == 200


def test_with_a_key_any_host_is_served() -> None:
    with served(Encoder(WatchedBackend()), api_key="k") as address:
        headers = {"Host": "any.example", "Origin": "http://other.example", "Authorization": "Bearer k"}
        assert httpx.post(f"{address}/v1/embeddings", json=REQUEST, headers=headers).status_code == 200


def test_the_flag_may_be_given_several_times() -> None:
    from cn_clip import command

    options = command.parse(main.Options, ["--allowed-host", "a.example", "--allowed-host", "b.example"])
    assert options.allowed_host == ("a.example", "b.example")

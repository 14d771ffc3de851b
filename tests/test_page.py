"""The files of the web page as the server gives them, and the words in them; what they do is tested in a browser."""

import json
import re
from collections.abc import Iterator

import httpx
import pytest
from serving import WatchedBackend, served

from cn_clip.clip.encoder import Encoder
from cn_clip.serve.page import POLICY, WEB

FILES = sorted(path.name for path in WEB.iterdir())
TEXTS = {name: (WEB / name).read_text(encoding="utf-8") for name in FILES}
# Names of formats, which are looked up nowhere.
NAMESPACES = {"http://www.w3.org/2000/svg"}


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with served(Encoder(WatchedBackend()), with_page=True) as address, httpx.Client(base_url=address) as client:
        yield client


def test_the_page_is_at_the_root_and_names_its_files_relative_to_it(client: httpx.Client) -> None:
    answer = client.get("/")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    named = re.findall(r'(?:href|src)="([^"#][^"]*)"', answer.text)
    assert {"page/style.css", "page/app.js"} <= set(named)
    for name in named:
        assert client.get(f"/{name}").status_code == 200, name
    assert client.get("/favicon.ico").headers["content-type"] == "image/svg+xml"


def test_every_file_bears_the_policy_is_never_guessed_at_and_is_asked_for_again(client: httpx.Client) -> None:
    for name in FILES:
        answer = client.get(f"/page/{name}")
        assert answer.content == (WEB / name).read_bytes()
        assert answer.headers.get_list("content-security-policy") == [POLICY]
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-cache"
        known = client.get(f"/page/{name}", headers={"If-None-Match": f'"other", W/{answer.headers["etag"]}'})
        assert (known.status_code, known.content) == (304, b"")
        assert client.get(f"/page/{name}", headers={"If-None-Match": '"other"'}).status_code == 200
        assert client.head(f"/page/{name}").status_code == 200
    assert "unsafe" not in POLICY


def test_what_is_no_file_of_the_page_is_not_there(client: httpx.Client) -> None:
    for path in ("/page/", "/page/none.js", "/page/../app.py", "/page/%2e%2e/app.py", "/page/..%2fapp.py", "/page"):
        assert client.get(path).status_code == 404, path
    assert client.post("/page/app.js").status_code == 405
    assert not any(path.startswith("/page") for path in client.get("/openapi.json").json()["paths"])


def test_with_a_key_the_files_need_none_and_what_they_ask_for_does() -> None:
    with served(Encoder(WatchedBackend()), api_key="k" * 20, with_page=True) as address:
        for path in ("/", "/favicon.ico", *(f"/page/{name}" for name in FILES)):
            assert httpx.get(f"{address}{path}").status_code == 200, path
        for path in ("/v1/models", "/metrics", "/openapi.json", "/pages", "/page"):
            assert httpx.get(f"{address}{path}").status_code == 401, path


def test_without_a_page_the_root_is_not_there() -> None:
    with served(Encoder(WatchedBackend())) as address:
        assert (httpx.get(f"{address}/").status_code, httpx.get(f"{address}/page/app.js").status_code) == (404, 404)


@pytest.mark.parametrize("name", FILES)
def test_no_file_names_an_address_elsewhere_or_holds_what_the_policy_forbids(name: str) -> None:
    text = TEXTS[name]
    assert set(re.findall(r"\w+://[^\s\"'`)]+", text)) <= NAMESPACES
    assert not re.search(r"[\"'`]//\w", text), "an address without its scheme"
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function", text)
    if name.endswith(".html"):
        assert not re.search(r"\sstyle=|<style|\son\w+=|javascript:", text)
        assert not re.search(r"<script(?![^>]*\ssrc=)", text)


def messages() -> dict[str, dict[str, str]]:
    """What `messages.js` holds between its first lines and its last."""
    text = TEXTS["messages.js"]
    found: dict[str, dict[str, str]] = json.loads(text[text.index("\n{") : text.rindex("}") + 1])
    return found


def test_every_message_is_there_in_both_languages_with_the_same_places_to_fill() -> None:
    for key, words in messages().items():
        assert list(words) == ["zh", "en"], key
        assert all(words.values()), key
        places = [re.findall(r"\{\w*\}", one) for one in words.values()]
        assert sorted(places[0]) == sorted(places[1]), key
        assert re.search(r"[一-鿿]", words["zh"]) or key == "language", key


def test_every_message_that_is_named_exists_and_none_is_left_over() -> None:
    scripts = "".join(text for name, text in TEXTS.items() if name.endswith(".js") and name != "messages.js")
    named = set(re.findall(r"\btext\(\s*\"([^\"]+)\"", scripts))
    named |= set(re.findall(r'data-(?:text|label|hint)="([^"]+)"', TEXTS["index.html"]))
    keys = set(messages())
    assert named <= keys
    # Names that a script puts together, such as `view.${name}`, or hands on as a string.
    begun = tuple(re.findall(r"\btext\(`([\w.]+)\$\{", scripts))
    handed_on = set(re.findall(r'"([a-z]+(?:\.[a-z]+)+)"', scripts))
    assert {key for key in keys - named - handed_on if not key.startswith((*begun, "error."))} == set()


def test_the_errors_with_words_of_their_own_are_ones_that_the_service_gives() -> None:
    service = "".join(path.read_text(encoding="utf-8") for path in WEB.parent.glob("*.py"))
    codes = set(re.findall(r'code="(\w+)"|"(\w+_not_allowed)"', service))
    fields = {"query", "where", "labels", "templates"}
    own = {"network", "other"}
    named = {key.removeprefix("error.") for key in messages() if key.startswith("error.")}
    assert named - fields - own <= {one or other for one, other in codes}

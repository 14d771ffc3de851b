"""The web page's answers and bounds, asked as its scripts ask for them, without a browser."""

import contextlib
import gc
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from page_attacks import ask, attack, upload
from PIL import Image
from serving import served, wait_until

from cn_clip.clip.encoder import Encoder
from cn_clip.emoji_pack import load
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.store import Index, open_index
from cn_clip.retrieval.writer import NewItem, open_writer
from cn_clip.serve import server
from cn_clip.serve.limits import MAX_K, MAX_LABELS, MAX_TEXT_CHARS, Limits
from cn_clip.serve.uploads import bytes_on_disk

pytest.importorskip("gradio")
from gradio.state_holder import StateHolder

from cn_clip.serve import page as texts

# Gradio asks pandas for what it will no longer do.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

NAMES = ("猫脸", "生日蛋糕", "红苹果")
EMOJI = [one for place, one in enumerate(load("twemoji")) if place % 64 == 0 or one.name in NAMES]
CAT, CAKE, APPLE = (next(one for one in EMOJI if one.name == name) for name in NAMES)
LIMITS = Limits(max_body_mb=1, max_pixels=1_000_000, max_wait_ms=1)


def index_in(folder: Path, rows: np.ndarray, thumbnails: list[bytes]) -> Index:
    items = [
        NewItem(number, row, {"caption": f"{one.name}<b>"}, thumbnail)
        for number, (one, row, thumbnail) in enumerate(zip(EMOJI, rows, thumbnails, strict=True))
    ]
    with open_writer(folder, Manifest(ModelInfo("tiny", "fingerprint", rows.shape[1]))) as writer:
        writer.commit(items)
    return open_index(folder)


@pytest.fixture(scope="module")
def visited() -> set[str]:
    """Hosts that anything here connects to, or asks the address of."""
    hosts: set[str] = set()

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "socket.connect" and isinstance(args[1], tuple):
            hosts.add(str(args[1][0]))
        if event == "socket.getaddrinfo":
            hosts.add(str(args[0]))

    sys.addaudithook(hook)
    return hosts


@pytest.fixture(scope="module")
def client(visited: set[str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    encoder = Encoder("Emoji-Tiny", device="cpu")
    rows = encoder.encode_images([one.picture for one in EMOJI])
    index = index_in(
        tmp_path_factory.mktemp("index") / "emoji.index", rows, [b"\xff\xd8thumb"] * (len(EMOJI) - 1) + [b""]
    )
    with (
        served(encoder, LIMITS, index=index, with_page=True) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        yield client


def png(width: int, height: int) -> bytes:
    stream = io.BytesIO()
    Image.new("1", (width, height)).save(stream, "PNG")
    return stream.getvalue()


def test_the_root_leads_to_the_page_and_the_routes_keep_their_errors(client: httpx.Client) -> None:
    answer = client.get("/", follow_redirects=True)
    assert (answer.status_code, answer.url.path) == (200, "/page/")
    assert f'content="{texts.TITLE}"' in answer.text
    assert client.get("/v1/none").json()["error"]["message"] == "Not Found"
    assert client.get("/v1/embeddings").status_code == 405
    assert client.get("/favicon.ico").headers["content-type"] == "image/svg+xml"
    assert not any(path.startswith("/page") for path in client.get("/openapi.json").json()["paths"])


def test_a_phrase_finds_pictures_with_names_scores_and_thumbnails(client: httpx.Client) -> None:
    shown, said = ask(client, "phrase", "submit", CAKE.name, 3, -1)
    assert said == ""
    assert shown.count("<figure") == 3
    assert f'<span class="name">{CAKE.name}&lt;b&gt;</span>' in shown
    hits = client.post("/v1/search", json={"query": CAKE.name, "k": 3}).json()["data"]
    assert [f"{hit['score']:.3f}" in shown for hit in hits] == [True] * 3
    assert f'src="..{hits[0]["thumbnail"]}"' in shown
    assert ask(client, "phrase", "submit", "猫", 3, 1)[0] == f"<p>{texts.NOTHING_FOUND}</p>"


def test_an_item_without_a_thumbnail_has_no_broken_picture(client: httpx.Client) -> None:
    shown, _ = ask(client, "phrase", "submit", "猫", 100, -1)
    assert (shown.count("<figure"), shown.count("<img")) == (len(EMOJI), len(EMOJI) - 1)


def test_a_picture_finds_itself_and_a_phrase_of_full_weight_takes_its_place(client: httpx.Client) -> None:
    picture = upload(client, CAT.picture)
    shown, said = ask(client, "query-picture", "upload", picture, "", 0.5, 1)
    assert (said, "1.000" in shown, CAT.name in shown) == ("", True, True)
    assert (
        ask(client, "query-picture", "upload", picture, APPLE.name, 1, 1)[0]
        == (ask(client, "phrase", "submit", APPLE.name, 1, -1)[0])
    )


def test_labels_have_the_probabilities_of_the_route(client: httpx.Client) -> None:
    shown, said = ask(client, "labelled-picture", "upload", upload(client, CAT.picture), "猫\n\n 鸟 \n鸟", "{}")
    assert (said, shown["label"]) == ("", "猫")
    assert sorted(one["label"] for one in shown["confidences"]) == sorted(["猫", "鸟"])
    assert sum(one["confidence"] for one in shown["confidences"]) == pytest.approx(1)


def test_the_facts_are_those_of_the_model(client: httpx.Client) -> None:
    shown, _ = ask(client, "facts", "select")
    for fact in ("tiny", "torch", "64 px", "256", "52 tokens", str(len(EMOJI))):
        assert f"<td>{fact}</td>" in shown


REFUSED: dict[str, tuple[tuple[str, str, tuple[Any, ...]], str]] = {
    "no phrase": (("phrase", "submit", (" ", 3, -1)), texts.NO_TEXT),
    "a long phrase": (("phrase", "submit", ("猫" * (MAX_TEXT_CHARS + 1), 3, -1)), texts.FAULTS["query"]),
    "no picture": (("query-picture", "upload", (None, "", 0.5, 3)), texts.NO_PICTURE),
    "no labels": (("labelled-picture", "upload", (png(9, 9), " ", "{}")), texts.FAULTS["labels"]),
    "many labels": (
        ("labelled-picture", "upload", (png(9, 9), "\n".join(map(str, range(MAX_LABELS + 1))), "{}")),
        texts.FAULTS["labels"],
    ),
    "no place": (("labelled-picture", "upload", (png(9, 9), "猫", "图片")), texts.FAULTS["templates"]),
    "many pixels": (("labelled-picture", "upload", (png(1001, 1000), "猫", "{}")), texts.REFUSALS["image_too_large"]),
    "no bytes of a picture": (("query-picture", "upload", (b"no", "", 0.5, 3)), texts.REFUSALS["invalid_image"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_is_told_in_a_sentence(client: httpx.Client, case: str) -> None:
    (elem_id, event, given), sentence = REFUSED[case]
    given = tuple(upload(client, one) if isinstance(one, bytes) else one for one in given)
    shown, said = ask(client, elem_id, event, *given)
    assert not shown
    assert said.startswith(sentence)


def test_more_pictures_than_the_slider_offers_are_refused(client: httpx.Client) -> None:
    shown, said = ask(client, "phrase", "submit", "猫", MAX_K + 1, -1)
    assert shown is None
    assert "greater than maximum value 100" in said


@pytest.mark.parametrize(
    "place", ["http://example.com/a.png", "HTTPS://example.com/a.png", "/etc/passwd", __file__, "file:///etc/passwd"]
)
def test_neither_addresses_nor_paths_are_read(client: httpx.Client, visited: set[str], place: str) -> None:
    picture = {"path": place, "url": place, "meta": {"_type": "gradio.FileData"}}
    shown, said = ask(client, "query-picture", "upload", picture, "", 0.5, 1)
    assert shown is None
    assert said.startswith(texts.REFUSALS["no_upload"])
    shown, said = ask(client, "phrase", "submit", picture, 3, -1)
    assert shown is None
    assert said.startswith(texts.REFUSALS["no_upload"])


def test_no_way_of_naming_a_picture_reads_another_file(client: httpx.Client, visited: set[str], tmp_path: Path) -> None:
    picture = upload(client, CAT.picture)
    attacked = list(attack(client, picture["path"], tmp_path))
    assert len(attacked) > 100
    # Gradio itself refuses a name that is too long.
    refusals = (texts.REFUSALS["no_upload"], texts.REFUSED)
    assert {name: said for name, shown, said in attacked if shown or not said.startswith(refusals)} == {}
    assert len({said for name, _, said in attacked if "xxx" not in name and "/a/a" not in name}) == 1
    shown, said = ask(client, "query-picture", "upload", {"path": picture["path"]}, "", 0.5, 1)
    assert (said, "1.000" in shown) == ("", True)
    assert "example.com" not in visited


@pytest.mark.parametrize(
    "picture",
    ["/etc/passwd", ["/etc/passwd"], 7, {"path": {"path": "/etc/passwd"}}, {"path": ["/etc/passwd"]}, {"path": 7}],
    ids=str,
)
def test_what_is_no_picture_at_all_is_refused_in_a_line(
    client: httpx.Client, picture: object, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    shown, said = ask(client, "query-picture", "upload", picture, "", 0.5, 1)
    assert shown is None
    assert said.startswith((texts.REFUSED, texts.REFUSALS["no_upload"]))
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())
    assert len(caplog.text) < 1000


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", "gradio_api/queue/join", b'{"data": [], "fn_index": 999, "session_hash": "x"}'),
        ("POST", "gradio_api/queue/join", b'{"data": [], "fn_index": -1, "session_hash": "x"}'),
        ("POST", "gradio_api/queue/join", b'{"data": [], "session_hash": "x"}'),
        ("POST", "gradio_api/queue/join", b"\xff"),
        ("POST", "gradio_api/cancel", b"{}"),
        ("GET", f"assets/{'a' * 300}", b""),
        ("GET", "gradio_api/queue/data?session_hash=none", b""),
    ],
)
def test_a_request_that_the_page_does_not_send_leaves_a_line_in_the_log(
    client: httpx.Client,
    method: str,
    path: str,
    body: bytes,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with contextlib.suppress(httpx.RemoteProtocolError):  # a stream that had begun is cut
        answer = client.request(method, f"/page/{path}", content=body, headers={"Content-Type": "application/json"})
        assert 400 <= answer.status_code < 500, answer.text
    assert "Traceback" not in caplog.text + "".join(capfd.readouterr())
    assert len(caplog.text) < 1000


@pytest.mark.parametrize(
    "path",
    [
        f"file={__file__}",
        "file=/etc/passwd",
        "file=http://example.com/",
        "proxy=http://example.com/",
        "info",
        "monitoring/summary",
        "../monitoring",
    ],
)
def test_gradio_gives_out_no_files_and_answers_nothing_else(client: httpx.Client, path: str) -> None:
    assert client.get(f"/page/gradio_api/{path}").status_code in (403, 404)


def test_gradio_takes_nothing_but_uploads_and_questions(client: httpx.Client) -> None:
    for path in ("component_server", "run/predict", "api/predict", "login", "stream/x"):
        assert client.post(f"/page/gradio_api/{path}", json={}).json()["error"]["message"] == "Not Found"


def test_a_body_too_large_is_refused_and_any_bytes_below_are_taken(client: httpx.Client) -> None:
    for path in ("upload", "queue/join"):
        answer = client.post(f"/page/gradio_api/{path}", files={"files": ("a.png", bytes(1 << 20))})
        assert answer.status_code == 413, path
    assert upload(client, b"," * 100_000)["path"].endswith("picture.png")
    marks = client.post("/page/gradio_api/queue/join", content="[" * 100_000)
    assert marks.status_code == 413


def test_nothing_connects_to_another_machine(client: httpx.Client, visited: set[str]) -> None:
    text = client.get("/page/").text
    assert ask(client, "phrase", "submit", "猫", 3, -1)[1] == ""
    assert "googleapis" not in text + client.get("/page/theme.css").text
    assert client.get("/page/config").json()["analytics_enabled"] is False
    assert visited == {"127.0.0.1"}


def test_of_many_visitors_the_settings_of_the_last_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cn_clip.serve.page.VISITORS_HELD", 3)
    with (
        served(Encoder("Emoji-Tiny", device="cpu"), LIMITS, with_page=True) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        for number in range(8):
            assert ask(client, "facts", "select", visitor=str(number))[1] == ""
        kept = [set(one.session_data) for one in gc.get_objects() if type(one) is StateHolder and one.session_data]
        # Other servers of these tests have visitors of their own.
        assert [names for names in kept if "facts-select7" in names] == [
            {f"facts-select{number}" for number in (5, 6, 7)}
        ]


def test_uploads_are_gone_when_the_server_is() -> None:
    with served(Encoder("Emoji-Tiny", device="cpu"), with_page=True) as address:
        with httpx.Client(base_url=address) as client:
            picture = Path(upload(client, EMOJI[0].picture)["path"])
            assert "cn-clip index build" in client.get("/page/config").text
        assert picture.exists()
        assert picture.stat().st_mode & 0o077 == 0 or picture.parent.parent.stat().st_mode & 0o077 == 0
    assert not picture.parent.parent.exists()


def test_uploads_that_fill_their_room_are_refused_before_they_are_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cn_clip.serve.page.UPLOADS_HELD", 2)
    with (
        served(Encoder("Emoji-Tiny", device="cpu"), Limits(max_body_mb=1), with_page=True) as address,
        httpx.Client(base_url=address) as client,
    ):
        pictures = [upload(client, bytes([number]) * 700_000) for number in range(2)]
        answer = client.post("/page/gradio_api/upload", files={"files": ("picture.png", b"a third")})
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "uploads_full")
        Path(pictures[0]["path"]).unlink()
        assert Path(upload(client, b"a third")["path"]).read_bytes() == b"a third"


def test_pages_of_other_sites_read_nothing(client: httpx.Client) -> None:
    for origin, status in (("http://evil.example", 403), ("null", 403), (str(client.base_url), 200)):
        answer = client.get("/page/config", headers={"Origin": origin})
        assert answer.status_code == status, origin
        assert status == 200 or "access-control-allow-origin" not in answer.headers


def test_an_upload_of_several_files_is_refused_and_nothing_written(client: httpx.Client) -> None:
    folder = Path(upload(client, CAT.picture)["path"]).parent.parent
    before = bytes_on_disk(folder)
    several = [("files", (f"{number}.png", b"x%d" % number)) for number in range(2)]
    answer = client.post("/page/gradio_api/upload", files=several)
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        400,
        "an upload holds one file; send the others by themselves",
    )
    assert bytes_on_disk(folder) == before
    for headers in ({}, {"Content-Type": "multipart/form-data"}):
        assert client.post("/page/gradio_api/upload", content=b"x", headers=headers).status_code == 400


def test_old_uploads_are_swept_while_the_server_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cn_clip.serve.uploads.SWEEP_SECONDS", 0.05)
    monkeypatch.setattr("cn_clip.serve.uploads.MAX_AGE", 0.0)
    with (
        served(Encoder("Emoji-Tiny", device="cpu"), with_page=True) as address,
        httpx.Client(base_url=address) as client,
    ):
        folder = Path(upload(client, CAT.picture)["path"]).parent.parent
        wait_until(lambda: bytes_on_disk(folder) == 0)
        upload(client, CAT.picture)


def test_with_a_key_there_is_no_page_and_without_gradio_a_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = FastAPI()
    routes = list(app.routes)
    assert "浏览器不会带上密钥" in server.add_page(app, {}, "key", "http://127.0.0.1:1")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "pip install 'cn_clip[page]'" in server.add_page(app, {}, None, "http://127.0.0.1:1")
    assert app.routes == routes

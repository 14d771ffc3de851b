"""Immich's interface to machine learning: the vectors here, other tasks at a second server, and what is refused."""

import contextlib
import http.server
import io
import json
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from serving import served

from cn_clip.cli import main
from cn_clip.clip.encoder import Encoder
from cn_clip.emoji_pack import load
from cn_clip.serve.immich import MAX_ANSWER_BYTES

PICTURE = load()[0].picture
VISUAL = {"clip": {"visual": {"modelName": "ViT-B-32__openai"}}}
TEXTUAL = {"clip": {"textual": {"modelName": "tiny", "options": {"language": "zh-CN"}}}}
FACES = {
    "facial-recognition": {
        "detection": {"modelName": "buffalo_l", "options": {"minScore": 0.7}},
        "recognition": {"modelName": "buffalo_l"},
    }
}
FOUND = [{"boundingBox": {"x1": 1, "y1": 2, "x2": 3, "y2": 4}, "embedding": "[0.5]", "score": 0.9}]
LONG = b" " * (MAX_ANSWER_BYTES + 1)


class Second(http.server.BaseHTTPRequestHandler):
    """Immich's own server, as far as it is asked here; keeps what it was sent."""

    sent: list[bytes]
    answer: bytes
    status = 200

    def do_POST(self) -> None:
        self.sent.append(self.path.encode() + b" " + self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(self.status)
        self.send_header("Location", "http://127.0.0.1:1/")
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(self.answer)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def second() -> Iterator[type[Second]]:
    Second.sent = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Second) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        Second.port = server.server_port  # type: ignore[attr-defined]
        yield Second
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder("Emoji-Tiny", device="cpu")


@pytest.fixture(scope="module")
def client(encoder: Encoder, second: Any) -> Iterator[httpx.Client]:
    own = f"http://127.0.0.1:{second.port}"
    with served(encoder, second=own) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


def predicted(client: httpx.Client, entries: Any, **parts: Any) -> httpx.Response:
    files = {"image": ("blob", parts.pop("image"))} if "image" in parts else {"none": (None, "")}
    return client.post("/predict", data={"entries": json.dumps(entries), **parts}, files=files)


def test_it_is_there(client: httpx.Client) -> None:
    assert client.get("/ping").text == "pong"


def test_pictures_and_texts_get_their_vectors_as_strings_of_json(client: httpx.Client, encoder: Encoder) -> None:
    answer = predicted(client, VISUAL, image=PICTURE)
    width, height = Image.open(io.BytesIO(PICTURE)).size
    assert set(answer.json()) == {"clip", "imageHeight", "imageWidth"}
    assert (answer.json()["imageWidth"], answer.json()["imageHeight"]) == (width, height)
    (row,) = encoder.encode_images([PICTURE])
    np.testing.assert_allclose(json.loads(answer.json()["clip"]), row, rtol=0, atol=2e-6)
    assert answer.headers["x-ignored-fields"] == "modelName"
    text = predicted(client, TEXTUAL, text="一只猫")
    assert set(text.json()) == {"clip"}
    np.testing.assert_allclose(json.loads(text.json()["clip"]), encoder.encode_texts(["一只猫"])[0], rtol=0, atol=2e-6)
    assert "x-ignored-fields" not in text.headers


def test_other_tasks_are_asked_of_the_second_server_and_joined(client: httpx.Client, second: type[Second]) -> None:
    second.sent.clear()
    second.answer = json.dumps({"facial-recognition": FOUND, "imageHeight": 7, "clip": "theirs", "more": 1}).encode()
    answer = predicted(client, VISUAL | FACES, image=PICTURE).json()
    assert answer["facial-recognition"] == FOUND
    assert len(json.loads(answer["clip"])) > 1
    (sent,) = second.sent
    assert sent.startswith(b"/predict ")
    assert json.dumps(FACES).encode() in sent
    assert PICTURE in sent
    assert b"ViT-B-32__openai" not in sent
    alone = predicted(client, FACES, image=PICTURE).json()
    assert alone == {"facial-recognition": FOUND, "imageHeight": 7}


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (500, b"{}"),
        (302, b"{}"),
        (200, b"no JSON"),
        (200, b"[]"),
        (200, b"[" * 100_000),
        (200, b'{"facial-recognition": ' + b"[" * 300 + b"]" * 300 + b"}"),
        (200, b" " * (MAX_ANSWER_BYTES + 1)),
    ],
)
def test_a_second_server_that_gives_no_answer_is_a_502(
    client: httpx.Client, second: type[Second], status: int, body: bytes
) -> None:
    second.status, second.answer = status, body
    try:
        answer = predicted(client, FACES, image=PICTURE)
    finally:
        second.status = 200
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "forward_failed")


@pytest.mark.parametrize(
    ("entries", "parts", "message"),
    [
        (VISUAL, {"text": "猫"}, "image: expected one for clip, visual"),
        (TEXTUAL, {"image": PICTURE}, "text: expected one for clip, textual"),
        (VISUAL, {}, "image: expected the field image or text"),
        (VISUAL, {"image": b"no picture"}, "of no known format"),
        (TEXTUAL, {"text": "猫" * 5000}, "1 to 4096 characters, got 5000"),
        ({"clip": {}}, {"text": "猫"}, "one of visual and textual"),
        ({"clip": {"textual": {}}}, {"text": "猫"}, "expected JSON such as"),
        ({}, {"text": "猫"}, "expected JSON such as"),
        ([], {"text": "猫"}, "expected JSON such as"),
        (TEXTUAL, {"text": "猫", **{f"field{number}": "x" for number in range(9)}}, "at most 8 fields"),
        ({"clip": {"textual": {"modelName": "x" * 70_000}}}, {"text": "猫"}, "at most 65536 bytes"),
    ],
)
def test_what_is_no_request_of_immich_is_refused(client: httpx.Client, entries: Any, parts: Any, message: str) -> None:
    answer = predicted(client, entries, **dict(parts))
    assert answer.status_code == 400
    assert message in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b"--x--"),
        ("multipart/form-data; boundary=x", b"nothing of the kind"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data; name=entries\r\n\r\n{"),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"X-A: b\r\n" * 1000 + b"\r\n--x--"),
    ],
)
def test_what_is_no_form_is_refused(client: httpx.Client, kind: str, body: bytes) -> None:
    answer = client.post("/predict", content=body, headers={"Content-Type": kind})
    assert answer.status_code == 400, answer.text


def test_a_form_has_few_parts_also_if_all_have_one_name(client: httpx.Client) -> None:
    part = b'--x\r\nContent-Disposition: form-data; name="text"%s\r\n\r\n\xff\r\n'
    for kind in (b"", b'; filename="a"'):
        body = part % kind * 9 + b"--x--"
        answer = client.post("/predict", content=body, headers={"Content-Type": "multipart/form-data; boundary=x"})
        assert (answer.status_code, answer.json()["error"]["message"]) == (400, "entries: expected at most 8 fields")


def test_options_that_are_no_text_go_on_as_they_came(client: httpx.Client, second: type[Second]) -> None:
    second.sent.clear()
    second.answer = b"{}"
    entries = {"ocr": {"recognition": {"modelName": "m", "options": {"half": "\ud800"}}}}
    assert predicted(client, entries, image=PICTURE).status_code == 200
    assert rb"\ud800" in second.sent[0]


def test_without_a_second_server_other_tasks_are_refused_with_the_option(encoder: Encoder) -> None:
    with served(encoder) as address, httpx.Client(base_url=address, timeout=60) as client:
        answer = predicted(client, FACES, image=PICTURE)
    assert answer.status_code == 400
    assert "facial-recognition: only clip is done here; start the server with --immich-forward" in answer.text


@pytest.mark.parametrize("address", ["127.0.0.1:3003", "ftp://a", "http://a b", "http://user@host", "http://host?x=1"])
def test_an_address_of_the_second_server_that_is_none_is_refused(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--immich-forward", address])
    assert "--immich-forward: expected http://HOST:PORT" in capsys.readouterr().err

"""JSON of requests: with long data URLs or without, what `json.loads` makes of it."""

import json
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import WatchedBackend, data_url, served

from cn_clip.clip.encoder import Encoder
from cn_clip.serve import schemas
from cn_clip.serve.schemas import loads

LONG = "data:image/png;base64," + "A" * schemas._LONG

VALUES: list[Any] = [
    {"model": "tiny", "input": [LONG, {"image": LONG + "="}, "短", LONG]},
    LONG,
    [LONG[:-30], LONG, 'data:"quoted', "\\", f"\\{LONG}", f'"{LONG}"', f"{LONG}\\"],
    {LONG: LONG, "data:": 1, "é": f"{LONG}é"},
    [[[LONG], None, True, 1.5]],
]


@pytest.mark.parametrize("place", range(len(VALUES)))
@pytest.mark.parametrize("spelling", [{}, {"ensure_ascii": False}, {"indent": 1}, {"separators": (",", ":")}])
def test_a_body_is_read_as_json_reads_it(place: int, spelling: dict[str, Any]) -> None:
    body = json.dumps(VALUES[place], **spelling).encode()
    assert loads(body) == json.loads(body) == VALUES[place]


def test_short_strings_and_those_beyond_the_most_are_left_to_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schemas, "_MOST", 2)
    given = ["data:short", LONG, LONG, "data:"]
    assert loads(json.dumps(given).encode()) == given


def damaged(body: bytes) -> list[bytes]:
    start = body.index(b"data:")
    return [
        body[:-1],
        body[: start + 9],
        body[:start] + b'"' + body[start:],
        body[: start - 1] + body[start:],
        body[:start] + b"\\" + body[start:],
        body.replace(b"{", b"", 1),
        body + body,
        b"\xff" + body,
    ]


@pytest.mark.parametrize("place", range(8))
def test_what_is_no_json_is_refused_as_json_refuses_it(place: int) -> None:
    body = damaged(json.dumps({"model": "tiny", "input": LONG}).encode())[place]
    with pytest.raises(ValueError):  # noqa: PT011 - of JSON or of UTF-8
        json.loads(body)
    with pytest.raises(ValueError):  # noqa: PT011
        loads(body)


@given(
    st.lists(
        st.sampled_from(['"', "data:", "A" * 20, "\\", ",", "[", "]", ":", "{", "}", " ", "1", '"data:"']), max_size=30
    )
)
@settings(max_examples=400, deadline=None)
def test_any_text_is_read_or_refused_alike(parts: list[str]) -> None:
    body = "".join(parts).encode()
    long, schemas._LONG = schemas._LONG, 8
    try:
        try:
            expected = json.loads(body)
        except ValueError:
            with pytest.raises(ValueError):  # noqa: PT011
                loads(body)
        else:
            assert loads(body) == expected
    finally:
        schemas._LONG = long


def test_a_long_picture_comes_through_the_service() -> None:
    with served(Encoder(WatchedBackend())) as address:
        url = f"{address}/v1/embeddings"
        answer = httpx.post(url, json={"model": "tiny", "input": [data_url(b"x" * 300_000), "猫"]}, timeout=60)
        assert answer.json()["error"]["param"] == "input[0]"
        cut = json.dumps({"model": "tiny", "input": LONG})[:-1].encode()
        headers = {"Content-Type": "application/json"}
        assert httpx.post(url, content=cut, headers=headers, timeout=60).json()["error"]["code"] == "invalid_json"

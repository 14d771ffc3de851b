"""Requests for vectors are answered without the way through the routes, and as if they had gone it."""

import json
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import WatchedBackend, served

from cn_clip.clip.encoder import Encoder
from cn_clip.serve import app, forms
from cn_clip.serve.limits import Limits

JSON = {"Content-Type": "application/json"}


def addresses(through_routes: bool) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patched:
        if through_routes:
            patched.setattr(app.dialects, "shortcuts", lambda _: {})
        with served(Encoder(WatchedBackend()), Limits(max_items=4)) as address:
            yield address


@pytest.fixture(scope="module")
def short() -> Iterator[str]:
    yield from addresses(through_routes=False)


@pytest.fixture(scope="module")
def long() -> Iterator[str]:
    yield from addresses(through_routes=True)


BODIES: list[tuple[bytes, dict[str, str]]] = [
    *(
        (json.dumps(body, ensure_ascii=False).encode(), JSON)
        for body in (
            {"model": "tiny", "input": "杰尼龟"},
            {"model": "tiny", "input": ["杰尼龟", "妙蛙种子"], "encoding_format": "base64"},
            {"model": "tiny", "input": ["a"] * 5},
            {"model": "tiny", "input": "a", "embedding_type": "int8", "task": "x", "drop_params": True},
            {"model": "tiny", "input": [{"text": "a", "image": "data:image/png;base64,AAAA"}]},
            {"model": "tiny", "input": "https://example.com/a.png", "modality": "image"},
            {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "text", "text": "猫"}]}]},
            {"model": "other", "input": "a"},
            {"model": "tiny", "input": ""},
            {"model": "tiny", "input": [1, 2, 3]},
            {"model": "tiny", "input": "a", "dimensions": 3},
            {"model": "tiny", "input": "a", "dimensions": "4"},
            {"model": "tiny", "input": "x" * 5000},
            {"model": "tiny"},
            {"input": "a"},
            [],
            "a",
        )
    ),
    (b"", JSON),
    (b"{", JSON),
    (b'{"model": "tiny", "input": "\xff"}', JSON),
    (b'{"model": "tiny", "input": "\\ud800"}', JSON),
    (b"[" * 40_000, JSON),
    (b'{"model": "tiny", "input": "a"}', {}),
    (b'{"model": "tiny", "input": "a"}', {"Content-Type": "text/plain"}),
    (b'{"model": "tiny", "input": "a"}', {"Content-Type": "application/json; charset=utf-8"}),
]


@pytest.mark.parametrize("path", ["/v1/embeddings", "/embeddings"])
@pytest.mark.parametrize(("body", "headers"), BODIES)
def test_the_answer_is_that_of_the_route(
    path: str, body: bytes, headers: dict[str, str], short: str, long: str
) -> None:
    answers = [httpx.post(f"{address}{path}", content=body, headers=headers, timeout=60) for address in (short, long)]
    shown: list[Any] = [
        (answer.status_code, answer.content, [pair for pair in answer.headers.multi_items() if pair[0] != "date"])
        for answer in answers
    ]
    assert shown[0] == shown[1]


def test_both_ways_are_counted_as_the_same_route(short: str, long: str) -> None:
    for address in (short, long):
        for status, text in ((200, "a"), (400, "")):
            before = counted(address, status)
            asked = httpx.post(f"{address}/v1/embeddings", json={"model": "tiny", "input": text}, timeout=60)
            assert asked.status_code == status
            assert counted(address, status) == before + 1


def counted(address: str, status: int) -> float:
    start = f'cn_clip_requests_total{{route="/v1/embeddings",status="{status}"}} '
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    return sum(float(line.removeprefix(start)) for line in lines if line.startswith(start))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=20))
def test_a_number_in_an_answer_is_the_one_of_the_row(numbers: list[float]) -> None:
    row_D = np.array(numbers, dtype=np.float32)
    (read,) = json.loads(forms.as_json(forms.written(row_D[None], "float")))
    assert read == [float(one) for one in row_D]
    assert np.array(read, dtype=np.float32).tobytes() == row_D.tobytes()

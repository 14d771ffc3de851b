"""What many clients of the HTTP service do to each other: join batches, fill the queue, leave, wait too long."""

import asyncio
import itertools
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import WatchedBackend, data_url, queue_depth, served, wait_until

from cn_clip.clip import tokenizer
from cn_clip.clip.backends.base import Rows
from cn_clip.clip.backends.pytorch import TorchBackend
from cn_clip.clip.encoder import Encoder
from cn_clip.emoji_pack import load
from cn_clip.errors import ConfigError
from cn_clip.serve.access import Access
from cn_clip.serve.batching import Batcher, Metrics, Slots, _Queue, _Waiting, alike
from cn_clip.serve.gate import Gate
from cn_clip.serve.limits import BODIES_HELD, MAX_JSON_MARKS, Limits
from cn_clip.serve.runner import Runner, Text
from cn_clip.serve.schemas import RefusalError

# Long enough for all that a test sends to be in one batch, were it not full before.
PATIENT_MS = 60_000.0
PICTURE = data_url(load()[0].picture, "webp")


@pytest.fixture
def backend() -> Iterator[WatchedBackend]:
    backend = WatchedBackend()
    yield backend
    backend.going.set()


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(32) as pool:
        yield pool


def ask(address: str, given: object) -> httpx.Response:
    return httpx.post(f"{address}/v1/embeddings", json={"model": "tiny", "input": given}, timeout=120)


def first_numbers(answer: httpx.Response) -> list[float]:
    assert answer.status_code == 200, answer.text
    return [one["embedding"][0] for one in answer.json()["data"]]


def test_requests_of_many_clients_are_computed_together(backend: WatchedBackend, pool: ThreadPoolExecutor) -> None:
    with served(Encoder(backend), Limits(max_batch=8, max_wait_ms=PATIENT_MS)) as address:
        answers = [pool.submit(ask, address, "猫" * length) for length in range(1, 9)]
        # Everyone gets the row of their own text: its tokens, [CLS] and [SEP].
        assert [first_numbers(one.result()) for one in answers] == [[length + 2] for length in range(1, 9)]
    assert backend.text_batches == [8]


def test_pictures_and_texts_are_batched_apart(backend: WatchedBackend) -> None:
    with served(Encoder(backend), Limits(max_batch=2, max_wait_ms=PATIENT_MS)) as address:
        answer = ask(address, ["猫", {"image": PICTURE}, "两只猫", {"image": PICTURE}])
        assert first_numbers(answer) == [3, 1, 5, 1]
    assert (backend.text_batches, backend.picture_batches) == ([2], [2])


def test_a_request_with_many_inputs_is_split_over_batches(backend: WatchedBackend) -> None:
    with served(Encoder(backend), Limits(max_batch=4, max_wait_ms=1)) as address:
        assert first_numbers(ask(address, ["猫" * length for length in range(1, 11)])) == list(range(3, 13))
    assert backend.text_batches == [4, 4, 2]


def test_a_batch_that_is_not_full_goes_after_the_wait(backend: WatchedBackend) -> None:
    with served(Encoder(backend), Limits(max_batch=8, max_wait_ms=20)) as address:
        assert first_numbers(ask(address, "猫")) == [3]
    assert backend.text_batches == [1]


def test_a_full_queue_answers_503_and_serves_again_later(backend: WatchedBackend, pool: ThreadPoolExecutor) -> None:
    limits = Limits(max_batch=1, max_queue=4, max_items=4)
    with served(Encoder(backend), limits) as address:
        backend.going.clear()
        waiting = pool.submit(ask, address, ["猫"] * 4)
        wait_until(lambda: queue_depth(address) == 4)
        refused = ask(address, "猫")
        assert refused.status_code == 503
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"] == {
            "message": "the queue of 4 texts is full; ask again later",
            "type": "server_error",
            "param": None,
            "code": "queue_full",
        }
        backend.going.set()
        assert len(first_numbers(waiting.result())) == 4
        assert first_numbers(ask(address, "猫")) == [3]
        assert queue_depth(address) == 0


def test_a_long_request_takes_a_few_batches_of_slots_at_a_time(
    backend: WatchedBackend, pool: ThreadPoolExecutor
) -> None:
    with served(Encoder(backend), Limits(max_batch=2, max_queue=9)) as address:
        backend.going.clear()
        waiting = pool.submit(ask, address, ["猫"] * 20 + ["两只猫"])
        wait_until(lambda: queue_depth(address) == 8)
        other = pool.submit(ask, address, "狗")
        wait_until(lambda: queue_depth(address) == 9)
        assert ask(address, "猫").status_code == 503
        backend.going.set()
        assert first_numbers(other.result()) == [3]
        assert first_numbers(waiting.result()) == [3] * 20 + [5]
        assert waiting.result().json()["usage"]["prompt_tokens"] == 65
        assert queue_depth(address) == 0


def test_who_leaves_is_dropped_from_the_queue(backend: WatchedBackend, pool: ThreadPoolExecutor) -> None:
    body = b'{"model": "tiny", "input": ["a", "b", "c"]}'
    head = (
        "POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
    )
    with served(Encoder(backend), Limits(max_batch=4, max_wait_ms=1)) as address:
        backend.going.clear()
        first = pool.submit(ask, address, "猫")
        assert backend.begun.acquire(timeout=60)
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as leaving:
            leaving.sendall(head.encode() + b"\r\n" + body)
            wait_until(lambda: queue_depth(address) == 4)
        wait_until(lambda: queue_depth(address) == 1)
        backend.going.set()
        assert first_numbers(first.result()) == [3]
        assert first_numbers(ask(address, "两只猫")) == [5]
    assert backend.text_batches == [1, 1]


def test_who_waits_too_long_is_told_so_and_dropped(backend: WatchedBackend) -> None:
    with served(Encoder(backend), Limits(timeout=0.2)) as address:
        backend.going.clear()
        answer = ask(address, "猫")
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        assert "0.2 seconds" in answer.json()["error"]["message"]
        assert queue_depth(address) == 0
        backend.going.set()


def test_a_body_that_does_not_come_is_refused_after_the_timeout(backend: WatchedBackend) -> None:
    with served(Encoder(backend), Limits(timeout=0.2)) as address:
        host, port = address.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=60) as connection:
            connection.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{")
            assert connection.recv(65536).startswith(b"HTTP/1.1 408")


def test_a_batch_that_fails_is_a_500_for_its_requests_alone(backend: WatchedBackend) -> None:
    def fail(_: object) -> Rows:
        raise RuntimeError("secret")

    with served(Encoder(backend), Limits()) as address:
        working, backend.encode_tokens = backend.encode_tokens, fail  # type: ignore[method-assign]
        answer = ask(address, "猫")
        assert answer.status_code == 500
        assert answer.json()["error"]["message"] == "the model could not compute the texts: RuntimeError"
        backend.encode_tokens = working  # type: ignore[method-assign]
        assert first_numbers(ask(address, "猫")) == [3]


def test_a_text_without_a_vector_is_a_500_of_its_own_and_lets_the_others_of_its_batch_through(
    pool: ThreadPoolExecutor,
) -> None:
    encoder = Encoder("Emoji-Tiny", device="cpu")
    expected = encoder.encode_texts(["猫", "一只狗"])
    token = tokenizer.encode(["坏"], 52)[0][1]
    assert isinstance(encoder.backend, TorchBackend)
    encoder.backend.model.bert.embeddings.word_embeddings.weight.data[token] = np.nan
    with served(encoder, Limits(max_batch=4, max_wait_ms=PATIENT_MS)) as address:
        texts = ["猫", "坏", "一只狗", "很坏的狗"]
        answers = [one.result(60) for one in [pool.submit(ask, address, text) for text in texts]]
    assert [answer.status_code for answer in answers] == [200, 500, 200, 500]
    rows = [answers[position].json()["data"][0]["embedding"] for position in (0, 2)]
    np.testing.assert_allclose(rows, expected, rtol=0, atol=2e-6)
    for answer in (answers[1], answers[3]):
        error = answer.json()["error"]
        assert error["message"] == (
            "the model gives NaN or infinity for one of the texts; the server's log tells what to do"
        )
        assert (error["type"], error["code"]) == ("server_error", "not_finite")


def test_a_bad_picture_lets_the_others_of_its_moment_through(backend: WatchedBackend, pool: ThreadPoolExecutor) -> None:
    with served(Encoder(backend), Limits(max_batch=2, max_wait_ms=PATIENT_MS)) as address:
        good = [pool.submit(ask, address, {"image": PICTURE}) for _ in range(2)]
        bad = ask(address, [{"image": PICTURE}, {"image": "data:image/png;base64,AAAA"}])
        assert (bad.status_code, bad.json()["error"]["param"]) == (400, "input[1].image")
        assert [first_numbers(one.result()) for one in good] == [[1], [1]]
        assert queue_depth(address, "pictures") == 0
    assert backend.picture_batches == [2]


def test_two_hundred_clients_at_once_are_each_answered(backend: WatchedBackend) -> None:
    async def ask_one(client: httpx.AsyncClient, number: int) -> httpx.Response:
        given = {"model": "tiny", "input": ["猫"] * (1 + number % 3)}
        answer = await client.post("/v1/embeddings", json=given)
        # Nothing is computed before the queue of 64 inputs is full.
        backend.going.set()
        return answer

    async def storm(address: str) -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(base_url=address, limits=limits, timeout=120) as client:
            return await asyncio.gather(*[ask_one(client, number) for number in range(200)])

    with served(Encoder(backend), Limits(max_queue=64, max_items=8)) as address:
        backend.going.clear()
        answers = asyncio.run(storm(address))
        assert queue_depth(address) == 0
    statuses = Counter(answer.status_code for answer in answers)
    assert statuses.total() == 200
    assert set(statuses) == {200, 503}
    for number, answer in enumerate(answers):
        if answer.status_code == 200:
            assert first_numbers(answer) == [3] * (1 + number % 3)
    # Of at least 62 inputs that waited, in batches of at most 32.
    assert 31 <= max(backend.text_batches) <= 32


def test_a_model_that_cannot_be_opened_is_the_failure_of_the_runner() -> None:
    def missing() -> Encoder:
        raise ConfigError("no such model")

    async def start() -> Runner:
        runner = Runner("missing", missing, Limits(), Metrics())
        runner.start(never)
        await runner.opened.wait()
        await runner.stop()
        return runner

    async def never() -> None:
        raise AssertionError

    runner = asyncio.run(start())
    assert str(runner.failure) == "no such model"
    assert not runner.is_ready
    with pytest.raises(RefusalError, match="the model has failed"):
        runner.check_ready()


def test_no_client_is_let_in_before_all_is_prepared_nor_after_a_queue_has_died(backend: WatchedBackend) -> None:
    from cn_clip.serve.batching import Metrics
    from cn_clip.serve.runner import Runner, Text
    from cn_clip.serve.service import Service

    async def main() -> None:
        limits = Limits(max_batch=2, max_queue=2, max_items=2)
        runner = Runner("tiny", lambda: Encoder(backend), limits, Metrics())
        service = Service([runner], limits, label_sets={"animals": ["猫", "狗", "鸟"]})
        backend.going.clear()
        runner.start(lambda: service.prepare(runner))
        await asyncio.get_running_loop().run_in_executor(None, backend.begun.acquire)
        with pytest.raises(RefusalError, match="still being opened"):
            await runner.embed([Text("猫")])
        with pytest.raises(RefusalError, match="still being opened"):
            service.runner_of(None)
        backend.going.set()
        await runner.opened.wait()
        assert runner.is_ready
        assert (await runner.embed([Text("猫")]))[0][0].tolist() == [3, 0, 0, 0]

        async def dies() -> None:
            raise RuntimeError("a fault")

        task = asyncio.ensure_future(dies())
        task.add_done_callback(runner._ended)
        await runner.failed.wait()
        assert (runner.is_ready, str(runner.failure)) == (False, "a fault")
        with pytest.raises(RefusalError, match="has failed"):
            runner.check_ready()
        await runner.stop()

    asyncio.run(main())


# --- the parts by themselves


def test_an_index_that_does_not_answer_holds_up_no_texts(backend: WatchedBackend) -> None:
    going = threading.Event()

    async def asked() -> list[float]:
        runner = Runner("tiny", lambda: Encoder(backend), Limits(), Metrics())
        runner.start()
        await runner.opened.wait()
        searches = [asyncio.ensure_future(runner.ask(going.wait, is_remote=False)) for _ in range(64)]
        await asyncio.sleep(0)
        try:
            # Long enough not to be cut into tokens on the event loop.
            rows, _ = await asyncio.wait_for(runner.embed([Text("猫" * 1000)]), 60)
            assert not any(search.done() for search in searches)
        finally:
            going.set()
            await asyncio.gather(*searches)
            await runner.stop()
        return [float(row[0]) for row in rows]

    assert asyncio.run(asked()) == [52]


def test_a_batch_of_the_wrong_size_fails_and_the_next_is_computed() -> None:
    missing = [1, 0]

    def compute(items: Sequence[int]) -> Rows:
        return np.zeros((len(items) - missing.pop(0), 4), dtype=np.float32)

    async def work(batcher: "Batcher[int]") -> object:
        with pytest.raises(RefusalError, match="could not compute the numbers: ValueError"):
            await batcher.rows([1, 2])
        return await batcher.rows([1, 2])

    assert len(batched(work, compute)) == 2  # type: ignore[arg-type]


def batched(
    work: Callable[["Batcher[int]"], "asyncio.Future[object]"], compute: Callable[[Sequence[int]], Rows]
) -> object:
    async def main() -> object:
        with ThreadPoolExecutor(1) as thread:
            batcher: Batcher[int] = Batcher("numbers", compute, thread, max_batch=3, max_wait=0.01)
            running = asyncio.ensure_future(batcher.run())
            try:
                return await work(batcher)
            finally:
                running.cancel()

    return asyncio.run(main())


def cost(parts: Sequence[Sequence[int]], lengths: Sequence[int], overhead: int) -> int:
    return sum(overhead + len(part) * max(lengths[place] for place in part) for part in parts)


def splits(order: list[int]) -> Iterator[list[list[int]]]:
    """All ways to cut a list into pieces."""
    for cuts in itertools.product((False, True), repeat=len(order) - 1):
        slots = [0, *[place for place, cut in enumerate(cuts, 1) if cut], len(order)]
        yield [order[begin:end] for begin, end in itertools.pairwise(slots)]


def test_inputs_of_like_length_are_put_together() -> None:
    # 24 + 2 * 4 and 24 + 2 * 40 are 136 together; all at once, padded to 40, would be 24 + 4 * 40 = 184.
    assert alike([40, 4, 39, 3], overhead=24) == [[3, 1], [2, 0]]
    # 24 + 3 * 9 = 51 is less than 24 + 2 * 8 + 24 + 9 = 73.
    assert alike([8, 9, 8], overhead=24) == [[0, 2, 1]]
    assert alike([7], overhead=24) == [[0]]


@given(st.lists(st.integers(1, 52), min_size=1, max_size=8), st.integers(0, 60))
def test_no_other_parts_would_take_less_time(lengths: list[int], overhead: int) -> None:
    found = alike(lengths, overhead)
    assert sorted(place for part in found for place in part) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    assert cost(found, lengths, overhead) == min(cost(parts, lengths, overhead) for parts in splits(order))


def test_short_inputs_are_answered_before_the_long_ones_of_their_batch() -> None:
    going = threading.Event()
    computed: list[list[str]] = []

    def compute(items: Sequence[str]) -> Rows:
        computed.append(list(items))
        if "x" * 52 in items:
            going.wait()
        return np.array([[len(item)] for item in items], dtype=np.float32)

    async def asked() -> list[float]:
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher("texts", compute, thread, max_batch=4, max_wait=60, length=len)
            running = asyncio.ensure_future(batcher.run())
            long = asyncio.ensure_future(batcher.rows(["x" * 52, "x" * 51]))
            short = await batcher.rows(["x", "xx"])
            assert not long.done()
            going.set()
            rows = [*short, *await long]
            running.cancel()
        return [float(row[0]) for row in rows]

    assert asyncio.run(asked()) == [1, 2, 52, 51]
    assert computed == [["x", "xx"], ["x" * 51, "x" * 52]]


class Held:
    """Computes the length of each text once it may."""

    def __init__(self) -> None:
        self.begun, self.going = threading.Event(), threading.Event()
        self.computed: list[list[str]] = []
        self.observed: list[int] = []

    def compute(self, items: Sequence[str]) -> Rows:
        self.computed.append(list(items))
        self.begun.set()
        assert self.going.wait(60)
        return np.array([[len(item)] for item in items], dtype=np.float32)

    def batcher(self, thread: ThreadPoolExecutor) -> "Batcher[str]":
        return Batcher(
            "texts", self.compute, thread, max_batch=3, max_wait=60, length=len, observe=self.observed.append
        )


def test_each_part_is_observed_and_none_is_computed_for_those_who_have_left() -> None:
    held = Held()

    async def asked() -> list[Rows]:
        with ThreadPoolExecutor(1) as thread:
            batcher = held.batcher(thread)
            running = asyncio.ensure_future(batcher.run())
            short = asyncio.ensure_future(batcher.rows(["x", "xx"]))
            long = asyncio.ensure_future(batcher.rows(["x" * 52]))
            await asyncio.to_thread(held.begun.wait, 60)
            long.cancel()
            await asyncio.wait((long,))
            held.going.set()
            again = asyncio.ensure_future(batcher.rows(["y", "y", "y"]))
            rows = [*await short, *await again]
            running.cancel()
        return rows

    assert np.array(asyncio.run(asked())).ravel().tolist() == [1, 2, 1, 1, 1]
    assert held.computed == [["x", "xx"], ["y", "y", "y"]]
    assert held.observed == [2, 3]


@pytest.mark.parametrize("is_computing", [True, False])
def test_the_end_of_a_queue_is_the_end_of_all_parts_of_its_batch(is_computing: bool) -> None:
    held = Held()

    async def asked() -> None:
        with ThreadPoolExecutor(1) as thread:
            batcher = held.batcher(thread)
            asking = [asyncio.ensure_future(batcher.rows([text])) for text in ("x", "xx", "x" * 52)]
            await asyncio.sleep(0)
            running = asyncio.ensure_future(batcher.run())
            if is_computing:
                await asyncio.to_thread(held.begun.wait, 60)
            else:  # the parts are tasks that have not begun
                await asyncio.sleep(0)
            running.cancel()
            try:
                await asyncio.wait_for(asyncio.wait((running, *asking)), 10)
            finally:
                held.going.set()
        assert running.cancelled()
        assert all(one.cancelled() for one in asking)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(asked())
    assert held.computed == ([["x", "xx"]] if is_computing else [])


def test_a_part_is_filled_with_texts_of_its_lengths_that_came_after_its_batch() -> None:
    held = Held()

    async def asked() -> list[Rows]:
        with ThreadPoolExecutor(1) as thread:
            batcher = held.batcher(thread)
            running = asyncio.ensure_future(batcher.run())
            first = [asyncio.ensure_future(batcher.rows([text])) for text in ("x", "xx", "x" * 52)]
            await asyncio.to_thread(held.begun.wait, 60)
            # Those of the length of the second part join it, the oldest first, up to three; one is left for later.
            later = [asyncio.ensure_future(batcher.rows([text * 52])) for text in "abc"]
            later += [asyncio.ensure_future(batcher.rows(["y"])), asyncio.ensure_future(batcher.rows(["z"]))]
            await asyncio.sleep(0)
            held.going.set()
            rows = [row for one in (*first, *later) for row in await one]
            running.cancel()
        return rows

    assert np.array(asyncio.run(asked())).ravel().tolist() == [1, 2, 52, 52, 52, 52, 1, 1]
    assert held.computed == [["x", "xx"], ["x" * 52, "a" * 52, "b" * 52], ["y", "z"], ["c" * 52]]


def test_after_a_wait_in_vain_a_lone_request_does_not_wait_until_another_comes() -> None:
    held = Held()
    held.going.set()

    async def asked() -> None:
        with ThreadPoolExecutor(1) as thread:
            batcher = held.batcher(thread)
            batcher.max_wait = 0.01
            running = asyncio.ensure_future(batcher.run())
            await batcher.rows(["x"])
            batcher.max_wait = 60
            for text in ("xx", "xxx"):
                await asyncio.wait_for(batcher.rows([text]), 30)
            held.going.clear()
            held.begun.clear()
            alone = asyncio.ensure_future(batcher.rows(["y"]))
            await asyncio.to_thread(held.begun.wait, 60)
            two = [asyncio.ensure_future(batcher.rows([text])) for text in ("a", "b")]
            await asyncio.sleep(0)
            held.going.set()
            await alone
            await asyncio.wait_for(asyncio.gather(*two), 30)
            # They came together: now one waits for others again, two for a third.
            waiting = [asyncio.ensure_future(batcher.rows([text])) for text in ("c", "d")]
            await asyncio.sleep(0.1)
            assert not any(one.done() for one in waiting)
            await asyncio.wait_for(asyncio.gather(batcher.rows(["e"]), *waiting), 30)
            running.cancel()

    asyncio.run(asked())
    assert held.computed == [["x"], ["xx"], ["xxx"], ["y"], ["a", "b"], ["c", "d", "e"]]


@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 5), st.booleans()), min_size=1, max_size=12),
    st.integers(1, 4),
)
@settings(deadline=None, max_examples=50)
def test_everyone_gets_the_rows_of_their_own_texts_in_batches_of_bounded_size(
    requests: list[tuple[int, int, bool]], max_batch: int
) -> None:
    computed: list[list[str]] = []

    def compute(items: Sequence[str]) -> Rows:
        computed.append(list(items))
        return np.array([[len(item), int(item.split("-")[0])] for item in items], dtype=np.float32)

    async def asked() -> None:
        with ThreadPoolExecutor(1) as thread:
            batcher = Batcher("texts", compute, thread, max_batch=max_batch, max_wait=0.0, length=len)
            running = asyncio.ensure_future(batcher.run())
            texts = [
                [f"{number}-{'x' * (length + place % 2)}" for place in range(count)]
                for number, (length, count, _) in enumerate(requests)
            ]
            asking = [asyncio.ensure_future(batcher.rows(one)) for one in texts]
            for number, (_, _, leaves) in enumerate(requests):
                if leaves:
                    await asyncio.sleep(0)
                    asking[number].cancel()
            answers = await asyncio.gather(*asking, return_exceptions=True)
            running.cancel()
            await asyncio.wait((running,))
        for number, (own, rows) in enumerate(zip(texts, answers, strict=True)):
            if isinstance(rows, BaseException):
                assert isinstance(rows, asyncio.CancelledError)
                assert requests[number][2]
            else:
                assert [row.tolist() for row in rows] == [[len(text), number] for text in own]
        assert len(batcher._waiting) == 0
        assert batcher.computing_since is None

    asyncio.run(asked())
    assert all(1 <= len(part) <= max_batch for part in computed)
    given_texts = [text for part in computed for text in part]
    assert all(Counter(given_texts)[text] <= 5 for text in given_texts)


@given(st.lists(st.tuples(st.sampled_from(["add", "drop", "take", "like"]), st.integers(0, 6), st.integers(0, 6))))
def test_the_queue_gives_the_oldest_and_the_oldest_of_each_length(steps: list[tuple[str, int, int]]) -> None:
    queue, expected = _Queue[int](), list[_Waiting[int]]()
    for step, (what, first, second) in enumerate(steps):
        if what == "add":
            one = _Waiting(step, first, Future(), 0.0)  # type: ignore[arg-type]
            queue.add(one)
            expected.append(one)
        elif what == "drop" and expected:
            queue.drop(expected[first % len(expected)])
            del expected[first % len(expected)]
        elif what == "take":
            assert queue.take(first) == expected[:first]
            del expected[:first]
        elif what == "like":
            of_lengths = sorted((one for one in expected if first <= one.length <= second), key=lambda one: -one.length)
            found = queue.take_like(first, second, 3)
            assert found == of_lengths[:3]
            expected = [one for one in expected if one not in found]
        assert len(queue) == len(expected)
        if expected:
            assert (queue.oldest, queue.newest) == (expected[0], expected[-1])
    assert sum(map(len, queue._by_length.values())) == len(expected)


def test_rows_come_back_in_the_order_of_the_items() -> None:
    sizes = []

    def double(items: Sequence[int]) -> Rows:
        sizes.append(len(items))
        return np.array([[2 * one] for one in items], dtype=np.float32)

    rows = batched(lambda batcher: batcher.rows(range(7)), double)
    assert np.array(rows).ravel().tolist() == [0, 2, 4, 6, 8, 10, 12]
    assert sizes == [3, 3, 1]


def test_places_are_given_back_also_after_a_failure() -> None:
    slots = Slots("texts", 3)
    with pytest.raises(RefusalError, match="the queue of 3 texts is full"), slots.taken(3), slots.taken(1):
        pass
    assert slots.num_taken == 0


def test_no_more_of_a_body_is_held_than_the_bound_and_all_bodies_share_one() -> None:
    limits = Limits(max_body_mb=1 / 1024)
    sent = []
    arrived: Future[int] = Future()

    async def app(scope: object, receive: object, send: object) -> None:
        arrived.set_result(gate._bytes_held)

    gate = Gate(app, limits, access=Access())

    async def request(num_pieces: int) -> int:
        """How many pieces of 256 bytes the gate asked for."""
        given = 0

        async def receive() -> dict[str, object]:
            nonlocal given
            if given == num_pieces:
                await asyncio.Event().wait()
            given += 1
            return {"type": "http.request", "body": b" " * 256, "more_body": given < num_pieces}

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": [(b"host", b"localhost")]}
        await gate(scope, receive, send)  # type: ignore[arg-type]
        return given

    # Four pieces are held, a fifth is too many, and four more are heard before the answer.
    assert asyncio.run(request(1000)) == 9
    assert sent[0]["status"] == 413
    assert gate._bytes_held == 0
    gate._bytes_held = BODIES_HELD * limits.max_body_bytes - 1024
    asyncio.run(request(4))
    assert arrived.result() == BODIES_HELD * limits.max_body_bytes
    gate._bytes_held += 1
    asyncio.run(request(4))
    assert sent[-2]["status"] == 503
    assert gate._bytes_held == BODIES_HELD * limits.max_body_bytes - 1023


def test_only_the_content_type_that_is_read_spares_a_body_the_count_of_its_marks() -> None:
    async def app(scope: object, receive: object, send: object) -> None:
        raise AssertionError("let in")

    async def statuses() -> list[int]:
        gate, sent = Gate(app, Limits(), access=Access()), list[int]()

        bodies = [b"[" * (MAX_JSON_MARKS + 1)]

        async def receive() -> dict[str, object]:
            if not bodies:
                await asyncio.Event().wait()
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}

        async def send(message: dict[str, object]) -> None:
            if "status" in message:
                sent.append(message["status"])  # type: ignore[arg-type]

        types = [(b"content-type", b"application/json"), (b"content-type", b"multipart/form-data; boundary=x")]
        scope = {"type": "http", "method": "POST", "path": "/v1/x", "headers": [(b"host", b"localhost"), *types]}
        await gate(scope, receive, send)  # type: ignore[arg-type]
        return sent

    assert asyncio.run(statuses()) == [413]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_request_pixels": 9}, r"--max-request-pixels: expected at least --max-pixels \(64000000\), got 9"),
        ({"max_batch": 0}, "--max-batch: expected a positive number, got 0"),
        ({"max_wait_ms": -1}, "--max-wait-ms: expected a positive number"),
        ({"timeout": float("nan")}, "--timeout: expected a positive number"),
        ({"max_items": 2049}, "--max-items: expected at most 2048, got 2049"),
        ({"max_batch": 300}, "--max-batch: expected at most --max-queue"),
        ({"max_pixels": 10**9}, "--max-pixels: expected at most 178956970"),
    ],
)
def test_limits_without_room_are_refused(given: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Limits(**given)  # type: ignore[arg-type]
    assert Limits(max_wait_ms=0).max_wait_ms == 0


def test_by_default_as_many_texts_may_wait_as_there_are_connections() -> None:
    assert (Limits().slots, Limits().text_slots) == (256, 512)
    assert (Limits(max_queue=9, max_batch=2).slots, Limits(max_queue=9, max_batch=2).text_slots) == (9, 9)

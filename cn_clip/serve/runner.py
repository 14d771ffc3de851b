"""The model as requests use it: opened in the background, one thread that computes, a few that prepare its inputs.

On CUDA the thread begins a batch while another waits for the rows of the one before.

Pictures have processes of their own, and the index threads: texts and answers stand behind neither a large picture nor
a store that does not answer.
"""

# N inputs, D embedding

import asyncio
import contextlib
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from cn_clip.clip.backends.base import AnyPixels, Rows
from cn_clip.clip.picture_names import LARGEST_PICTURE
from cn_clip.processes import usable_cores
from cn_clip.serve.batching import Batcher, Metrics, Slots, joined
from cn_clip.serve.limits import Limits
from cn_clip.serve.pictures import Decoders, EncodedPicture, looked_at, picture_bytes
from cn_clip.serve.schemas import RefusalError

if TYPE_CHECKING:
    from cn_clip.clip.encoder import Encoder

ResultT = TypeVar("ResultT")

# Of those that prepare, and again of those that decode, and that search.
MOST_THREADS = 4
# Of those that wait for the answers of a store on a server, which takes them little time of a core.
WAITING_THREADS = 16
# Characters; so few are cut into tokens on the event loop, for a thread and back would take longer.
SHORT = 512
# And characters of data URLs; so many are read for one request at a time.
LONG = 1 << 20
# Seconds; texts that wait have most of the time then.
GIVEN_WAY = 0.002
# Pixels of the longer side of what a browser shows in place of a file; so many fill most screens.
SHOWN_SIDE = 2048


@dataclass(frozen=True)
class Text:
    """One text."""

    text: str


@dataclass(frozen=True)
class Picture:
    """One picture: a data URL, base64, or the file itself; `param` names the field it came in, for errors."""

    source: str | bytes
    param: str


class Runner:
    """Vectors for many requests at a time. All methods are for one event loop; the model is for one thread of its own.

    name: what the model is called in answers. open_encoder: opens the model; called once, in the computing thread.
    is_ready: whether it is open, what was to follow is done, and it has not failed since. opened: set when the first
    two, or the failure, are known. failure: why it will not answer any more; failed: set with it.
    """

    def __init__(self, name: str, open_encoder: "Callable[[], Encoder]", limits: Limits, metrics: Metrics) -> None:
        self.name = name
        self.limits = limits
        self.is_ready = False
        self.opened, self.failed = asyncio.Event(), asyncio.Event()
        self.failure: BaseException | None = None
        self._open_encoder = open_encoder
        self._encoder: Encoder | None = None
        self._thread, self._fetcher = ThreadPoolExecutor(1, "compute"), ThreadPoolExecutor(1, "fetch")
        num_threads = min(MOST_THREADS, usable_cores())
        self._pool = ThreadPoolExecutor(num_threads, "prepare")
        self._searchers = ThreadPoolExecutor(num_threads, "search")
        self._waiters = ThreadPoolExecutor(WAITING_THREADS, "wait")
        self._decoders, self._reading = Decoders(num_threads, limits), asyncio.Lock()
        self._showing, self._shown = Decoders(1, limits, max_bytes=LARGEST_PICTURE), asyncio.Lock()
        self._showing.open_for_jpegs(SHOWN_SIDE)
        self._tasks: list[asyncio.Task[None]] = []
        bounds: dict[str, Any] = {"max_batch": limits.max_batch, "max_wait": limits.max_wait_ms / 1000}
        bounds |= {"fetcher": self._fetcher, "in_flight": lambda: 2 if self.encoder.facts.is_async else 1}
        seen = metrics.observe_batch
        self._texts = Batcher(
            "texts", self._encode_token_ids, self._thread, length=len, observe=seen("texts"), **bounds
        )
        self._pictures = Batcher("pictures", self._encode_pixels, self._thread, observe=seen("pictures"), **bounds)
        self._text_slots = _slots("texts", limits, metrics)
        self._picture_slots = _slots("pictures", limits, metrics)
        self._call_slots = _slots("calls", limits, metrics)
        self._shown_slots = _slots("originals", limits, metrics)
        self._search_slots = _slots("searches", limits, metrics)

    @property
    def encoder(self) -> "Encoder":
        """The open model; raises RefusalError (503) before it is open."""
        if self._encoder is None:
            raise self._not_ready()
        return self._encoder

    @property
    def num_waiting(self) -> int:
        """Pictures and texts that are admitted and not yet done."""
        return self._text_slots.num_taken + self._picture_slots.num_taken

    def check_ready(self) -> None:
        """Raises RefusalError (503) unless `is_ready`."""
        if not self.is_ready:
            raise self._not_ready()

    def check_moving(self) -> None:
        """Raises RefusalError (503) unless it is ready and what is asked of it is being answered."""
        self.check_ready()
        now = time.monotonic()
        for one in (self._texts, self._pictures):
            if one.computing_since is not None and now - one.computing_since > self.limits.timeout:
                message = f"a batch of {one.what} has been computed for {now - one.computing_since:.0f} seconds"
                raise RefusalError(503, message, code="stalled", retry_after=5)
        self._decoders.check_moving(asyncio.get_running_loop().time())

    def start(self, then: Callable[[], Coroutine[None, None, None]] | None = None) -> None:
        """Begins to serve: opens the model, runs `then`, and is ready."""
        opening = asyncio.ensure_future(self._opening(then))
        batching = [asyncio.ensure_future(one.run()) for one in (self._texts, self._pictures)]
        for task in batching:
            task.add_done_callback(self._ended)
        self._tasks = [opening, *batching]

    async def stop(self) -> None:
        """Ends the threads, after the batch in hand; what still waits is given up."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._decoders.close()
        self._showing.close()
        for executor in (self._pool, self._searchers, self._waiters, self._thread, self._fetcher):
            executor.shutdown(cancel_futures=True)

    def kill_decoders(self) -> None:
        """Ends the processes that decode; may be called by any thread."""
        self._decoders.kill()
        self._showing.kill()

    async def call(self, function: Callable[..., ResultT], *args: object) -> ResultT:
        """Calls `function` in one of the preparing threads; raises RefusalError (503) when too many wait."""
        with self._call_slots.taken(1):
            return await self._in_pool(function, *args)

    async def ask(self, function: Callable[..., ResultT], *, is_remote: bool) -> ResultT:
        """Calls `function` in one of the threads for the index; raises RefusalError (503) when too many wait.

        is_remote: it waits for a store on a server, for which there are more threads than cores.
        """
        threads = self._waiters if is_remote else self._searchers
        with self._search_slots.taken(1):
            return await asyncio.get_running_loop().run_in_executor(threads, function)

    async def alone(self, function: Callable[..., ResultT], *args: object) -> ResultT:
        """Calls `function` in the computing thread, past the queue of the clients; for what comes before them."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *args)

    async def jpeg(self, read: Callable[[], bytes], param: str) -> bytes:
        """The picture of a file as a JPEG of at most SHOWN_SIDE pixels a side, upright, one file at a time.

        Raises RefusalError: what `read` raises, a picture that cannot be decoded, 503 when too many wait.
        """
        with self._shown_slots.taken(1):
            async with self._shown:
                picture = await self._in_pool(self._file_looked_at, read, param)
                return await self._showing.jpeg(picture)

    def _file_looked_at(self, read: Callable[[], bytes], param: str) -> EncodedPicture:
        return looked_at(read(), param, max_pixels=self.limits.max_pixels, draft_size=SHOWN_SIDE)

    async def embed(self, inputs: Sequence[Text | Picture]) -> tuple[Rows, int]:
        """(unit rows (N, D) in the order given, tokens of the texts), [CLS] and [SEP] included.

        Raises RefusalError: no slot in the queue, a picture that cannot be read, a model that is not ready.
        """
        self.check_ready()
        texts = {position: one.text for position, one in enumerate(inputs) if isinstance(one, Text)}
        pictures = {position: one for position, one in enumerate(inputs) if isinstance(one, Picture)}
        most = self.limits.max_at_once
        num_tokens = 0

        async def text_rows() -> list[Rows]:
            nonlocal num_tokens
            rows, strings = list[Rows](), list(texts.values())
            for start in range(0, len(strings), most):
                token_ids = await self._token_ids(strings[start : start + most])
                num_tokens += sum(map(len, token_ids))
                rows += await self._texts.rows(token_ids)
            return rows

        # Of a long request, no more wait at a time than it has slots: it is never refused in the middle.
        with self._text_slots.taken(min(len(texts), most)), self._picture_slots.taken(min(len(pictures), most)):
            waiting = [text_rows()] if texts else []
            waiting += [self._picture_rows(list(pictures.values()))] if pictures else []
            parts = [await waiting[0]] if len(waiting) == 1 else await joined(waiting)
        rows = dict(zip([*texts, *pictures], [row for part in parts for row in part], strict=True))
        return np.stack([rows[position] for position in range(len(inputs))]), num_tokens

    async def embed_many_texts(self, texts: Sequence[str]) -> Rows:
        """Unit rows of any number of texts, which take no more than a batch of slots in the queue at a time."""
        step = self.limits.max_batch
        parts = [await self.embed(list(map(Text, texts[start : start + step]))) for start in range(0, len(texts), step)]
        return np.concatenate([rows for rows, _ in parts])

    async def _token_ids(self, texts: Sequence[str]) -> list[list[int]]:
        to_token_ids, is_short = self.encoder.texts.rows, sum(map(len, texts)) <= SHORT
        return to_token_ids(texts) if is_short else await self._in_pool(to_token_ids, texts)

    def _encode_token_ids(self, token_ids: Sequence[list[int]]) -> Rows | Callable[[], Rows]:
        return self._now_or_ahead(self.encoder.start_tokens(self.encoder.texts.pad(token_ids)))

    def _encode_pixels(self, pixels: Sequence[AnyPixels]) -> Rows | Callable[[], Rows]:
        return self._now_or_ahead(self.encoder.start_pixels(np.stack(pixels, out=self.encoder.room(len(pixels)))))

    def _now_or_ahead(self, rows_of: Callable[[], Rows]) -> Rows | Callable[[], Rows]:
        return rows_of if self.encoder.facts.is_async else rows_of()

    async def _in_pool(self, function: Callable[..., ResultT], *args: object) -> ResultT:
        return await asyncio.get_running_loop().run_in_executor(self._pool, function, *args)

    async def _picture_rows(self, pictures: Sequence[Picture]) -> list[Rows]:
        # One at a time where they are long: each holds up texts while its base64 is read.
        async with self._reading if sum(len(one.source) for one in pictures) > LONG else contextlib.nullcontext():
            files = await self._in_pool(self._looked_at, pictures)
        # No more at a time than there are processes: a request of many lets others in between.
        turns = asyncio.Semaphore(self._decoders.count)

        async def pixels(picture: EncodedPicture) -> AnyPixels:
            async with turns:
                return await self._decoders.pixels(picture)

        rows, most = list[Rows](), self.limits.max_at_once
        for start in range(0, len(files), most):
            rows += await self._pictures.rows(await joined(map(pixels, files[start : start + most])))
        return rows

    def _looked_at(self, pictures: Sequence[Picture]) -> list[EncodedPicture]:
        """The pictures, not decoded; raises RefusalError when they would have too many pixels together."""
        files, num_pixels = list[EncodedPicture](), 0
        for picture in pictures:
            data = picture_bytes(picture.source, picture.param, self._give_way)
            side = None if self._encoder is None else self._encoder.transform.draft_size
            files.append(looked_at(data, picture.param, max_pixels=self.limits.max_pixels, draft_size=side))
            num_pixels += files[-1].num_pixels
            if num_pixels > self.limits.max_request_pixels:
                message = (
                    f"{picture.param}: at most {self.limits.max_request_pixels} pixels a request are read, and with "
                    f"this picture there are {num_pixels}; send several requests"
                )
                raise RefusalError(400, message, param=picture.param, code="image_too_large")
        return files

    def _give_way(self) -> None:
        """Called in a thread after each millisecond of work that keeps other threads from running."""
        if self._text_slots.num_taken:
            time.sleep(GIVEN_WAY)

    async def _opening(self, then: Callable[[], Coroutine[None, None, None]] | None) -> None:
        try:
            self._encoder = await self.alone(self._open_encoder)
            encoder = self._encoder
            await self._decoders.open(encoder.transform, encoder.pixel_type, upright=encoder.upright)
            if then is not None:
                await then()
            self.is_ready = self.failure is None
        except Exception as error:
            self._fail(error)
        finally:
            self.opened.set()

    def _ended(self, batching: "asyncio.Task[None]") -> None:
        if not batching.cancelled():
            self._fail(batching.exception() or RuntimeError("a queue is no longer computed"))

    def _fail(self, error: BaseException) -> None:
        self.is_ready, self.failure = False, error
        self.opened.set()
        self.failed.set()

    def _not_ready(self) -> RefusalError:
        if self.failure is not None:
            return RefusalError(503, "the model has failed; the server's log tells why", code="not_ready")
        return RefusalError(503, "the model is still being opened; ask again later", code="not_ready", retry_after=5)


def _slots(what: str, limits: Limits, metrics: Metrics) -> Slots:
    slots = Slots(what, limits.text_slots if what == "texts" else limits.slots)
    metrics.watch_queue(what, lambda: slots.num_taken)
    return slots

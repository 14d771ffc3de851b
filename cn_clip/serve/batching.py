"""Inputs of many requests joined into batches for one computing thread: bounded in number, size and waiting time.

And the counters of the service, which Prometheus reads at /metrics.
"""

# N inputs, D dimensions

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, TypeVar

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cn_clip.clip.backends.base import Rows
from cn_clip.errors import NotFiniteError
from cn_clip.serve.schemas import RefusalError, queue_full

log = logging.getLogger(__name__)

# What one more call of the text tower costs, in tokens: with ViT-B-16's on 2 CPU cores 4 ms, when a token takes 0.2.
PART_OVERHEAD = 24

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

_BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Metrics:
    """The counters of one service, in a registry of their own."""

    CONTENT_TYPE = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._depths: dict[str, list[Callable[[], float]]] = {}
        self.requests = Counter(
            "cn_clip_requests", "Requests by route and HTTP status", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "cn_clip_request_seconds",
            "Time from the head of a request to the end of its answer",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.batch_size = Histogram(
            "cn_clip_batch_size",
            "Inputs that were computed together",
            ["inputs"],
            buckets=_BATCH_SIZES,
            registry=self.registry,
        )
        self.queue_depth = Gauge(
            "cn_clip_queue_depth", "Inputs admitted and not yet done", ["inputs"], registry=self.registry
        )

    def watch_queue(self, inputs: str, depth: Callable[[], float]) -> None:
        """Reads the depth of a queue whenever it is asked for; queues of one name, of several models, are added."""
        depths = self._depths.setdefault(inputs, [])
        depths.append(depth)
        self.queue_depth.labels(inputs).set_function(lambda: sum(one() for one in depths))

    def observe_batch(self, inputs: str) -> Callable[[int], None]:
        """What to tell the size of each batch."""
        batch_size = self.batch_size.labels(inputs)
        return lambda size: batch_size.observe(size)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self.registry)


class Slots:
    """A bound on what is admitted and not yet done. what: its name in messages, in the plural."""

    def __init__(self, what: str, limit: int) -> None:
        self.what, self.limit, self.num_taken = what, limit, 0

    @contextlib.contextmanager
    def taken(self, count: int) -> Iterator[None]:
        """Takes `count` slots; raises RefusalError (503) when there are not so many left."""
        if self.num_taken + count > self.limit:
            raise queue_full(self.what, self.limit)
        self.num_taken += count
        try:
            yield
        finally:
            self.num_taken -= count


@dataclass(eq=False)
class _Waiting(Generic[ItemT]):
    item: ItemT
    row: "asyncio.Future[Rows]"
    since: float


class Batcher(Generic[ItemT]):
    """One queue of like inputs, for use on one event loop.

    what: name of the inputs in messages. compute: items to rows (N, D), or to what waits for them in `fetcher` while a
    device computes them; called in `thread`, never twice at a time. in_flight: how many batches may be begun and not
    done, asked after each; 2 where `compute` leaves something to wait for.
    max_wait: seconds, counted from the oldest input of a batch. length: of an item, if `compute` pads all to the
    longest: items of like length are then computed, and answered, together. observe: told, in `thread`, how many
    are computed together.
    """

    def __init__(
        self,
        what: str,
        compute: Callable[[Sequence[ItemT]], Rows | Callable[[], Rows]],
        thread: Executor,
        *,
        max_batch: int,
        max_wait: float,
        fetcher: Executor | None = None,
        in_flight: Callable[[], int] = lambda: 1,
        length: Callable[[ItemT], int] | None = None,
        observe: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.what = what
        self.max_batch = max_batch
        self.max_wait = max_wait
        self._compute = compute
        self._thread, self._fetcher = thread, fetcher or thread
        self._in_flight = in_flight
        self._length = length
        self._observe = observe
        self._waiting: deque[_Waiting[ItemT]] = deque()
        self._arrival = asyncio.Event()
        # When each was begun, by the time of the event loop; one that is done may stay until the next wait.
        self._batches: dict[asyncio.Task[None], float] = {}

    @property
    def computing_since(self) -> float | None:
        """When the oldest batch in hand was begun, by the time of the event loop; None without one."""
        return min((since for batch, since in self._batches.items() if not batch.done()), default=None)

    async def rows(self, items: Sequence[ItemT]) -> list[Rows]:
        """The row (D,) of each item. When cancelled, those not yet computed leave the queue."""
        loop = asyncio.get_running_loop()
        mine = [_Waiting(item, loop.create_future(), loop.time()) for item in items]
        self._waiting.extend(mine)
        self._arrival.set()
        try:
            return await asyncio.gather(*[one.row for one in mine])
        finally:
            for one in mine:
                one.row.cancel()
            self._waiting = deque(one for one in self._waiting if not one.row.done())

    async def run(self) -> None:
        """Computes batch after batch until cancelled: each once it is full, or its oldest input has waited enough."""
        loop = asyncio.get_running_loop()
        try:
            while True:
                while len(self._waiting) < self.max_batch:
                    left = self._waiting[0].since + self.max_wait - loop.time() if self._waiting else None
                    if left is not None and left <= 0:
                        break
                    self._arrival.clear()
                    with contextlib.suppress(asyncio.TimeoutError):
                        await asyncio.wait_for(self._arrival.wait(), left)
                batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self.max_batch))]
                self._batches[asyncio.ensure_future(self._computing(batch))] = loop.time()
                while len(self._batches) >= self._in_flight():
                    done, _ = await asyncio.wait(self._batches, return_when=asyncio.FIRST_COMPLETED)
                    for one in done:
                        del self._batches[one]
                        one.result()
        finally:
            for one in self._batches:
                one.cancel()
            await asyncio.gather(*self._batches, return_exceptions=True)

    async def _computing(self, batch: Sequence[_Waiting[ItemT]]) -> None:
        parts = [list(batch)]
        if self._length is not None:
            lengths = [self._length(one.item) for one in batch]
            parts = [[batch[position] for position in part] for part in alike(lengths)]
        try:
            # All of them at once: the thread does not wait for the event loop, which answers one part during the next.
            await joined(self._computing_part(part) for part in parts)
        finally:
            for one in batch:
                one.row.cancel()

    async def _computing_part(self, part: Sequence[_Waiting[ItemT]]) -> None:
        try:
            loop = asyncio.get_running_loop()
            rows_ND = await loop.run_in_executor(self._thread, self._rows_of, part)
            if callable(rows_ND):
                rows_ND = await loop.run_in_executor(self._fetcher, rows_ND)
            if rows_ND is None:
                return
            for one, row_D in list(zip(part, rows_ND, strict=True)):
                if not one.row.done():
                    one.row.set_result(row_D)
        except NotFiniteError as error:
            # These have no vector; the others only shared their batch.
            log.error("%d of %d %s: %s", len(error.positions), len(part), self.what, error)
            message = f"the model gives NaN or infinity for one of the {self.what}; the server's log tells what to do"
            for position in error.positions:
                if not part[position].row.done():
                    part[position].row.set_exception(RefusalError(500, message, code="not_finite"))
            if others := [one for position, one in enumerate(part) if position not in error.positions]:
                await self._computing_part(others)
        except Exception as error:
            log.exception("a batch of %d %s failed", len(part), self.what)
            failure = RefusalError(500, f"the model could not compute the {self.what}: {type(error).__name__}")
            for one in part:
                if not one.row.done():
                    one.row.set_exception(failure)

    def _rows_of(self, part: Sequence[_Waiting[ItemT]]) -> Rows | Callable[[], Rows] | None:
        """None when all who waited have left."""
        if all(one.row.done() for one in part):
            return None
        self._observe(len(part))
        return self._compute([one.item for one in part])


def alike(lengths: Sequence[int], overhead: int = PART_OVERHEAD) -> list[list[int]]:
    """The positions of `lengths` in parts that, computed one after the other, take the least time.

    A part is padded to its longest: it takes as long as its count times that length, and `overhead` besides.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    ends = [
        end for end in range(1, len(order) + 1) if end == len(order) or lengths[order[end - 1]] < lengths[order[end]]
    ]
    # By where a part ends: the least time until there, and where that part begins.
    best = {0: (0, 0)}
    for end in ends:
        longest = lengths[order[end - 1]]
        best[end] = min((time + overhead + (end - begin) * longest, begin) for begin, (time, _) in best.items())
    parts, end = [], len(order)
    while end:
        begin = best[end][1]
        parts.append(order[begin:end])
        end = begin
    return parts[::-1]


async def joined(parts: Iterable[Awaitable[ResultT]]) -> list[ResultT]:
    """The results of all, in order; the first failure, or cancellation, cancels the rest."""
    tasks = [asyncio.ensure_future(part) for part in parts]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()

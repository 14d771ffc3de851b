"""Inputs of many requests joined into batches for one computing thread: bounded in number, size and waiting time.

And the counters of the service, which Prometheus reads at /metrics.
"""

# N inputs, D dimensions

import asyncio
import contextlib
import itertools
import logging
import threading
import time
from collections import OrderedDict
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
    length: int
    row: "asyncio.Future[Rows]"
    since: float


class _Queue(Generic[ItemT]):
    """What waits, by age and by length; each step takes as long however many wait. For one thread at a time."""

    def __init__(self) -> None:
        self._by_age: OrderedDict[_Waiting[ItemT], None] = OrderedDict()
        self._by_length: dict[int, OrderedDict[_Waiting[ItemT], None]] = {}

    def __len__(self) -> int:
        return len(self._by_age)

    @property
    def oldest(self) -> _Waiting[ItemT]:
        return next(iter(self._by_age))

    @property
    def newest(self) -> _Waiting[ItemT]:
        return next(reversed(self._by_age))

    def add(self, one: _Waiting[ItemT]) -> None:
        self._by_age[one] = None
        self._by_length.setdefault(one.length, OrderedDict())[one] = None

    def drop(self, one: _Waiting[ItemT]) -> None:
        """Takes out one that may be there."""
        if one in self._by_age:
            del self._by_age[one]
            of_length = self._by_length[one.length]
            del of_length[one]
            if not of_length:
                del self._by_length[one.length]

    def take(self, most: int) -> list[_Waiting[ItemT]]:
        """Takes out the oldest, as many as there are."""
        taken = list(itertools.islice(self._by_age, most))
        for one in taken:
            self.drop(one)
        return taken

    def take_like(self, shortest: int, longest: int, most: int) -> list[_Waiting[ItemT]]:
        """Takes out those of some lengths, both ends included, of each length the oldest."""
        found: list[_Waiting[ItemT]] = []
        for length in range(longest, shortest - 1, -1):
            found += itertools.islice(self._by_length.get(length, ()), most - len(found))
        for one in found:
            self.drop(one)
        return found


@dataclass(eq=False)
class _Batch(Generic[ItemT]):
    """since: when it was begun, by time.monotonic(). members: also those that were added. parts_left: not yet done."""

    since: float
    members: list[_Waiting[ItemT]]
    parts_left: int


class Batcher(Generic[ItemT]):
    """One queue of like inputs, for use on one event loop.

    what: name of the inputs in messages. compute: items to rows (N, D), or to what waits for them in `fetcher` while a
    device computes them; called in `thread`, never twice at a time. in_flight: how many batches may be begun and not
    done, asked before each; 2 where `compute` leaves something to wait for.
    max_wait: seconds, counted from the oldest input of a batch; a batch that follows one which waited in vain does not
    wait. length: of an item, if `compute` pads all to the longest: items of like length are then computed, and
    answered, together, also with some that came after those of the batch. observe: told, in `thread`, how many are
    computed together.

    The thread goes from batch to batch by itself: it would stand still while the event loop answers the one before.
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
        # Of the event loop and of the threads; held for a few steps at a time.
        self._lock = threading.Lock()
        self._waiting = _Queue[ItemT]()
        self._batches: set[_Batch[ItemT]] = set()
        self._is_asked = False  # the thread was told to compute one, and has not begun
        self._waited_in_vain = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._end: asyncio.Future[None] | None = None

    @property
    def computing_since(self) -> float | None:
        """When the oldest batch in hand was begun, by time.monotonic(); None without one."""
        with self._lock:
            return min((batch.since for batch in self._batches), default=None)

    async def rows(self, items: Sequence[ItemT]) -> list[Rows]:
        """The row (D,) of each item. When cancelled, those not yet computed leave the queue."""
        loop, now = asyncio.get_running_loop(), time.monotonic()
        length_of = self._length or (lambda _: 0)
        mine = [_Waiting(item, length_of(item), loop.create_future(), now) for item in items]
        with self._lock:
            for one in mine:
                self._waiting.add(one)
        self._look()
        try:
            return [await one.row for one in mine]
        finally:
            with self._lock:
                for one in mine:
                    if not one.row.done():
                        self._waiting.drop(one)
                        one.row.cancel()
                    elif not one.row.cancelled():
                        one.row.exception()  # asyncio warns of those that nobody has looked at

    async def run(self) -> None:
        """Computes batch after batch until cancelled: each once it is full, or its oldest input has waited enough."""
        self._loop = asyncio.get_running_loop()
        self._end = self._loop.create_future()
        try:
            await asyncio.sleep(0)
            self._look()
            await self._end
        finally:
            self._end.cancel()
            if self._timer is not None:
                self._timer.cancel()
            with self._lock:
                given_up = self._waiting.take(len(self._waiting))
                given_up += [one for batch in self._batches for one in batch.members]
            for one in given_up:
                one.row.cancel()

    # On the event loop.

    def _look(self) -> None:
        """Has the next batch computed if it is due, and looks again once it will be."""
        if self._loop is None or self._is_ended:
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        with self._lock:
            left = self._seconds_left()
            if left is not None and left > 0:
                self._timer = self._loop.call_later(left, self._has_waited)
            else:
                self._ask_if_due()

    def _has_waited(self) -> None:
        with self._lock:
            if self._waiting:
                self._waited_in_vain = self._waiting.oldest.since == self._waiting.newest.since
        self._look()

    def _answer(self, answers: Sequence[tuple[_Waiting[ItemT], Rows]]) -> None:
        for one, row_D in answers:
            if not one.row.done():
                one.row.set_result(row_D)

    def _refuse(self, members: Sequence[_Waiting[ItemT]], failure: RefusalError) -> None:
        for one in members:
            if not one.row.done():
                one.row.set_exception(failure)

    # Under the lock.

    @property
    def _is_ended(self) -> bool:
        return self._end is None or self._end.done()

    def _seconds_left(self) -> float | None:
        """Until the next batch is due, 0 or less when it is; None if none can be begun now."""
        if not self._waiting or self._is_asked or len(self._batches) >= self._in_flight():
            return None
        if len(self._waiting) >= self.max_batch or self._waited_in_vain:
            return 0.0
        return self._waiting.oldest.since + self.max_wait - time.monotonic()

    def _ask_if_due(self) -> None:
        left = None if self._is_ended else self._seconds_left()
        if left is not None and left <= 0:
            self._is_asked = True
            self._thread.submit(self._compute_batch)

    # In the threads.

    def _compute_batch(self) -> None:
        try:
            with self._lock:
                self._is_asked = False
                if self._is_ended:
                    return
                members = [one for one in self._waiting.take(self.max_batch) if not one.row.done()]
                if not members:  # they have left since the thread was asked
                    self._tell(self._look)
                    return
                if members[0].since != members[-1].since:
                    self._waited_in_vain = False
                parts = [members]
                if self._length is not None:
                    parts = [[members[position] for position in part] for part in alike([m.length for m in members])]
                batch = _Batch(time.monotonic(), members, len(parts))
                self._batches.add(batch)
            shortest = 0
            for part in parts:
                self._compute_filled(batch, part, shortest)
                shortest = part[-1].length + 1
            if batch.parts_left:  # `fetcher` ends it; meanwhile there may be another
                self._go_on()
        except BaseException as error:
            self._tell(self._fail, error)

    def _compute_filled(self, batch: _Batch[ItemT], part: Sequence[_Waiting[ItemT]], shortest: int) -> None:
        """Computes a part of a batch, without those who have left, and with as many of its lengths as there is room."""
        members = [one for one in part if not one.row.done()]
        if members and self._length is not None:
            with self._lock:
                more = self._waiting.take_like(shortest, members[-1].length, self.max_batch - len(members))
                batch.members += more
            members += more
        if members and not self._is_ended:
            self._compute_part(batch, members)
        else:
            self._end_part(batch)

    def _compute_part(self, batch: _Batch[ItemT], members: Sequence[_Waiting[ItemT]]) -> None:
        self._observe(len(members))
        try:
            rows_ND = self._compute([one.item for one in members])
        except Exception as error:
            self._failed(batch, members, error)
            return
        if callable(rows_ND):
            self._fetcher.submit(self._fetch, batch, members, rows_ND)
        else:
            self._computed(batch, members, rows_ND)

    def _fetch(self, batch: _Batch[ItemT], members: Sequence[_Waiting[ItemT]], rows_of: Callable[[], Rows]) -> None:
        try:
            rows_ND = rows_of()
        except Exception as error:
            self._failed(batch, members, error)
        else:
            self._computed(batch, members, rows_ND)

    def _computed(self, batch: _Batch[ItemT], members: Sequence[_Waiting[ItemT]], rows_ND: Rows) -> None:
        try:
            answers = list(zip(members, rows_ND, strict=True))
        except ValueError as error:
            self._failed(batch, members, error)
            return
        self._end_part(batch)
        self._tell(self._answer, answers)

    def _failed(self, batch: _Batch[ItemT], members: Sequence[_Waiting[ItemT]], error: Exception) -> None:
        if not isinstance(error, NotFiniteError):
            log.error("a batch of %d %s failed", len(members), self.what, exc_info=error)
            message = f"the model could not compute the {self.what}: {type(error).__name__}"
            self._end_part(batch)
            self._tell(self._refuse, members, RefusalError(500, message))
            return
        # These have no vector; the others only shared their batch.
        log.error("%d of %d %s: %s", len(error.positions), len(members), self.what, error)
        message = f"the model gives NaN or infinity for one of the {self.what}; the server's log tells what to do"
        refused = [members[position] for position in error.positions]
        self._tell(self._refuse, refused, RefusalError(500, message, code="not_finite"))
        if others := [one for position, one in enumerate(members) if position not in error.positions]:
            self._thread.submit(self._compute_part, batch, others)
        else:
            self._end_part(batch)

    def _end_part(self, batch: _Batch[ItemT]) -> None:
        with self._lock:
            batch.parts_left -= 1
            if batch.parts_left:
                return
            self._batches.discard(batch)
        self._go_on()

    def _go_on(self) -> None:
        with self._lock:
            self._ask_if_due()
            is_to_look = bool(self._waiting) and not self._is_asked
        if is_to_look:
            self._tell(self._look)

    def _tell(self, told: Callable[..., None], *args: object) -> None:
        """Calls a function on the event loop, unless that has ended."""
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(told, *args)

    def _fail(self, error: BaseException) -> None:
        if self._end is not None and not self._end.done():
            self._end.set_exception(error)


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

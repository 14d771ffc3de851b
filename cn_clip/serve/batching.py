"""Inputs of many requests joined into batches for one computing thread: bounded in number, size and waiting time."""

# N inputs, D dimensions

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Generic, TypeVar

from cn_clip.clip.backends.base import Rows
from cn_clip.errors import NotFiniteError
from cn_clip.serve.refusals import RefusalError, queue_full

log = logging.getLogger(__name__)

# What one more call of the text tower costs, in tokens: with ViT-B-16's on 2 CPU cores 4 ms, when a token takes 0.2.
PART_OVERHEAD = 24

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


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

    what: name of the inputs in messages. compute: items to rows (N, D); called in `thread`, never twice at a time.
    max_wait: seconds, counted from the oldest input of a batch. length: of an item, if `compute` pads all to the
    longest: items of like length are then computed, and answered, together. observe: told, in `thread`, how many
    are computed together.
    """

    def __init__(
        self,
        what: str,
        compute: Callable[[Sequence[ItemT]], Rows],
        thread: Executor,
        *,
        max_batch: int,
        max_wait: float,
        length: Callable[[ItemT], int] | None = None,
        observe: Callable[[int], None] = lambda _: None,
    ) -> None:
        self.what = what
        self.max_batch = max_batch
        self.max_wait = max_wait
        self._compute = compute
        self._thread = thread
        self._length = length
        self._observe = observe
        self._waiting: deque[_Waiting[ItemT]] = deque()
        self._arrival = asyncio.Event()
        # When the batch in hand was begun, by the time of the event loop.
        self.computing_since: float | None = None

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
        """Computes batch after batch until cancelled."""
        while True:
            await self._gathering()
            self.computing_since = asyncio.get_running_loop().time()
            await self._computing([self._waiting.popleft() for _ in range(min(len(self._waiting), self.max_batch))])
            self.computing_since = None

    async def _gathering(self) -> None:
        """Returns when a batch is full, or its oldest input has waited long enough."""
        loop = asyncio.get_running_loop()
        while len(self._waiting) < self.max_batch:
            left = self._waiting[0].since + self.max_wait - loop.time() if self._waiting else None
            if left is not None and left <= 0:
                return
            self._arrival.clear()
            with contextlib.suppress(asyncio.TimeoutError):
                await asyncio.wait_for(self._arrival.wait(), left)

    async def _computing(self, batch: Sequence[_Waiting[ItemT]]) -> None:
        parts = [list(batch)]
        if self._length is not None:
            parts = [
                [batch[position] for position in part] for part in alike([self._length(one.item) for one in batch])
            ]
        try:
            # All of them at once: the thread does not wait for the event loop, which answers one part during the next.
            await joined(self._computing_part(part) for part in parts)
        finally:
            for one in batch:
                one.row.cancel()

    async def _computing_part(self, part: Sequence[_Waiting[ItemT]]) -> None:
        try:
            rows_ND = await asyncio.get_running_loop().run_in_executor(self._thread, self._rows_of, part)
            if rows_ND is None:
                return
            for one, row_D in list(zip(part, rows_ND, strict=True)):
                if not one.row.done():
                    one.row.set_result(row_D)
        except NotFiniteError as error:
            await self._without(part, error)
        except Exception as error:
            log.exception("a batch of %d %s failed", len(part), self.what)
            failure = RefusalError(500, f"the model could not compute the {self.what}: {type(error).__name__}")
            for one in part:
                if not one.row.done():
                    one.row.set_exception(failure)

    async def _without(self, part: Sequence[_Waiting[ItemT]], error: NotFiniteError) -> None:
        """Refuses the inputs that the model has no vector for, and computes those that only shared their batch."""
        log.error("%d of %d %s: %s", len(error.positions), len(part), self.what, error)
        for position in error.positions:
            if not part[position].row.done():
                part[position].row.set_exception(_no_vector(self.what))
        others = [one for position, one in enumerate(part) if position not in error.positions]
        if others:
            await self._computing_part(others)

    def _rows_of(self, part: Sequence[_Waiting[ItemT]]) -> Rows | None:
        """None when all who waited have left."""
        if all(one.row.done() for one in part):
            return None
        self._observe(len(part))
        return self._compute([one.item for one in part])


def _no_vector(what: str) -> RefusalError:
    message = f"the model gives NaN or infinity for one of the {what}; the server's log tells what to do"
    return RefusalError(500, message, code="not_finite")


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

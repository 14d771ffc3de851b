"""The indexes that are open, by the names that requests give them, each with the model of its vectors.

A thread looks once a second whether another process has changed one, and opens it as it is then. A request keeps what
it began with; what cannot be opened changes nothing, and is said once.
"""

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

from cn_clip.errors import AwayError, CnClipError, DataError, UnreadableError
from cn_clip.retrieval import manifest
from cn_clip.retrieval.addresses import Searchable, address_in, open_index, ping
from cn_clip.retrieval.schemes import IndexAddress
from cn_clip.serve.circuits import Circuit
from cn_clip.serve.runner import Runner
from cn_clip.serve.schemas import RefusalError, shown

logger = logging.getLogger(__name__)

# Seconds between two looks; those at a store on another machine are rarer.
LOOK_SECONDS = 1.0
STORE_LOOKS = 30
# What tells one manifest from another without reading it: a new file for each generation.
_Stamp: TypeAlias = tuple[int, int, int] | None


@dataclass(frozen=True)
class Opened:
    """An index as one request sees it, from its first look to its last. is_first: requests need not name it.

    circuit: whether its store answers, one for all looks.
    """

    name: str
    index: Searchable
    runner: Runner
    is_first: bool = True
    circuit: Circuit = field(default_factory=Circuit, compare=False)

    def went_away(self, error: AwayError) -> None:
        """Refuses requests until its store answers again."""
        self.circuit.open(self.name, error, partial(ping, self.index))


class Collection:
    """One index, whose newest generation that could be opened is `now`."""

    def __init__(self, opened: Opened) -> None:
        self.now = opened
        # None is that of an index that is gone.
        self._stamp: _Stamp = (0, 0, 0)
        self._complaint = ""
        self._looks = 0

    def refresh(self, *, is_asked: bool = False) -> None:
        """Opens the newest generation if there is another one; for one thread. is_asked: looks also at what it skips.

        One that is damaged, gone, or of another model is not taken: the one before stays, and the log says so once.
        """
        address, self._looks = address_in(self.now.index), self._looks + 1
        if isinstance(address, Path):
            stamp = _stamp_of(address)
            is_due = stamp != self._stamp
        else:
            stamp, is_due = None, self._looks % STORE_LOOKS == 0
        if not (is_due or is_asked) or self.now.circuit.is_open:
            return
        try:
            self._take(address)
        except AwayError as error:
            self.now.went_away(error)
            return
        except (CnClipError, OSError, MemoryError) as error:
            sentence = f"{error}; the index {self.now.name!r} is served as it was"
            if sentence != self._complaint:
                logger.error("%s", sentence)
            self._complaint = sentence
            if not isinstance(error, DataError) or isinstance(error, UnreadableError):  # the next look may be luckier
                return
        else:
            self._complaint = ""
        self._stamp = stamp

    def _take(self, address: IndexAddress) -> None:
        before = self.now.index
        if isinstance(address, Path) and manifest.read(address) == getattr(before, "manifest", None):
            return
        index = open_index(address, is_served=True)
        if (index.model.fingerprint, index.model.embed_dim) != (before.model.fingerprint, before.model.embed_dim):
            raise DataError(
                f"its vectors are now of the model {index.model.name} ({index.model.fingerprint}), not of "
                f"{before.model.name} ({before.model.fingerprint}); start the server again",
                at=before.address,
            )
        if not manifest.seen_alike(index.pictures, before.pictures):
            raise DataError("its pictures are now seen in another way; start the server again", at=before.address)
        index.prepare()
        self.now = replace(self.now, index=index)
        logger.info("the index %r has %d items now", self.now.name, len(index))


def _stamp_of(folder: Path) -> _Stamp:
    try:
        facts = os.stat(folder / manifest.NAME)
    except OSError:
        return None
    return facts.st_mtime_ns, facts.st_size, facts.st_ino


class Collections:
    """All of them, in the order in which they were given; the first is meant where a request names none."""

    def __init__(self, opened: Sequence[Opened] = ()) -> None:
        self._named = {one.name: Collection(one) for one in opened}
        # One more signal may come while one is handled: to put into this queue waits for no lock, to set an event does.
        self._asked, self._is_ended = queue.SimpleQueue[bool](), False
        self._thread: threading.Thread | None = None

    def __iter__(self) -> Iterator[Opened]:
        return (one.now for one in self._named.values())

    def __len__(self) -> int:
        return len(self._named)

    def get(self, name: str | None, model: str | None = None) -> Opened:
        """The index called so; without a name the first, of a model if one is given.

        Raises RefusalError (404) when there is none.
        """
        if not self._named:
            message = "no index was opened; start the server as: cn-clip serve INDEX"
            raise RefusalError(404, message, code="index_not_found")
        if name is None:
            return next((one for one in self if one.runner.name == model), next(iter(self)))
        if name not in self._named:
            message = f"index: there is no {shown(name)} here; known are {list(self._named)}"
            raise RefusalError(404, message, param="index", code="index_not_found")
        return self._named[name].now

    def watch(self) -> None:
        """Begins to look for changes."""
        if self._named:
            self._thread = threading.Thread(target=self._looking, name="reload", daemon=True)
            self._thread.start()

    def look(self) -> None:
        """Has all of them looked at now; may be called by any thread, and by a handler of signals."""
        self._asked.put(True)

    def end(self) -> None:
        """Looks no more. One look that waits for a disk is not waited for."""
        self._is_ended = True
        for one in self:
            one.circuit.end()
        self._asked.put(False)

    def _looking(self) -> None:
        while not self._is_ended:
            is_asked = False
            with contextlib.suppress(queue.Empty):
                is_asked = self._asked.get(timeout=LOOK_SECONDS)
            for one in self._named.values():
                try:
                    one.refresh(is_asked=is_asked)
                except Exception:
                    logger.exception("the index %r could not be looked at", one.now.name)

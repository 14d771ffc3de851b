"""Who may write what several machines reach, where no system ends a lock with its process: an object store, a server.

A lease is a short text, the claim, kept beside what is written: a random owner, a number that its owner raises every
few seconds, and for how many seconds it holds without a renewal. No clock is compared with that of another machine: a
reader measures with its own for how long it has seen the number stay the same. Only of a process of its own machine, as
the system counts them, it need not wait to know that it has ended. `data.storage` keeps claims in objects,
`retrieval.milvus_collection` in the properties of a collection.

Example, of a reader that looks three times at a claim of 30 seconds, and sees it renewed once:

>>> now = iter([100.0, 120.0, 151.0])
>>> sight = Sight(lambda: next(now))
>>> [sight.is_free(Claim("a", number, 30.0)) for number in (7, 8, 8)]  # 31 seconds after it was seen to rise
[False, False, True]
>>> sight.is_free(None)  # given back
True
"""

import contextlib
import json
import os
import platform
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from cn_clip.errors import CnClipError, ConfigError

# Renewed three times as often. A machine that is this busy, or a network this slow, is taken for a dead one.
TTL_S = 30.0
# From a claim to the look whether another one was written in the same moment.
SETTLING_S = 0.5
_RENEWALS_A_TTL = 3
_POLL_S = 1.0
_FORMAT = "cn_clip lease 1"


class LeaseLostError(ConfigError):
    """Another process has taken the lease meanwhile: what this one would still write is not to count."""


@dataclass(frozen=True)
class Claim:
    """What the owner of a lease writes. number: rises with each renewal; ttl_s: how long it holds without one.

    holder: for people, such as `pid 123 on host, since 2026-01-31 12:00:00`. process: see `_process`.
    """

    owner: str
    number: int
    ttl_s: float
    holder: str = ""
    process: str = ""

    def to_text(self) -> str:
        """One line of JSON."""
        facts = {"owner": self.owner, "number": self.number, "ttl_s": self.ttl_s, "holder": self.holder}
        facts |= {"process": self.process} if self.process else {}
        return json.dumps({"format": _FORMAT, **facts}, ensure_ascii=False)

    @classmethod
    def of_text(cls, text: str | None) -> "Claim | None":
        """None where there is none; a text that is no claim counts as the claim of an owner who never renews it."""
        if not text:
            return None
        with contextlib.suppress(ValueError, KeyError, TypeError):
            facts = json.loads(text)
            told = str(facts["holder"]), str(facts.get("process", ""))
            claim = cls(str(facts["owner"]), int(facts["number"]), float(facts["ttl_s"]), *told)
            if 0 < claim.ttl_s < float("inf"):
                return claim
        return cls(text[:100], 0, TTL_S, "which does not say who it is")


class Sight:
    """What one reader has seen of a claim: when it last changed, by the reader's own clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: tuple[Claim | None, float] | None = None
        self.has_risen = False

    def is_free(self, claim: Claim | None) -> bool:
        """Whether the lease may be taken: nobody claims it, its process has ended on this machine, or it was seen
        unchanged for as long as it holds.

        `has_risen` says afterwards whether the claim was seen to be renewed, or to pass to another owner.
        """
        if claim is None or _has_ended(claim.process):
            return True
        now = self._clock()
        if self._seen is None or self._seen[0] != claim:
            self.has_risen = self._seen is not None
            self._seen = claim, now
        return now - self._seen[1] >= claim.ttl_s


class Board(Protocol):
    """Where a claim is kept for all to see; each method raises CnClipError when the store does not answer."""

    def read(self) -> str | None:
        """The claim that is there now, None without one."""
        ...

    def write(self, text: str) -> None:
        """Puts a claim in place of the one that is there."""
        ...

    def erase(self) -> None:
        """Takes the claim away."""
        ...


class Lease:
    """A claim of this process on a board. `held` takes, renews and gives it back."""

    def __init__(
        self,
        board: Board,
        busy: str,
        *,
        ttl_s: float = TTL_S,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """busy: what to say when another process has it."""
        self._board, self._busy, self._clock, self._sleep = board, busy, clock, sleep
        holder = f"pid {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        self.claim = Claim(secrets.token_hex(8), 1, ttl_s, holder, _process(os.getpid()))

    def take(self, *, waiting: Callable[[str], object] = lambda sentence: None) -> None:
        """Claims the lease once it is free.

        waiting: called once with a sentence while it is not known yet whether the owner of a claim is alive. Raises
        ConfigError when it is, or when another process claims it in the same moment.
        """
        sight, is_told = Sight(self._clock), False
        while not sight.is_free(claim := self._read()):
            assert claim is not None, "what nobody claims is free"
            if sight.has_risen:
                raise ConfigError(f"{self._busy} ({claim.holder}); wait until it has ended, or choose another name")
            if not is_told:
                waiting(f"{self._busy} ({claim.holder})")
                is_told = True
            self._sleep(min(_POLL_S, claim.ttl_s / _RENEWALS_A_TTL))
        self._board.write(self.claim.to_text())
        self._sleep(min(SETTLING_S, self.claim.ttl_s / _RENEWALS_A_TTL))
        found = self._read()
        if not self._is_own(found):
            raise ConfigError(f"{self._busy} ({_holder(found)}); wait until it has ended, or choose another name")

    def confirm(self) -> None:
        """Raises LeaseLostError unless the claim on the board is this process's own."""
        found = self._read()
        if not self._is_own(found):
            raise LeaseLostError(
                f"{self._busy} ({_holder(found)}), since this one did not answer for {self.claim.ttl_s:g} s; wait "
                "until it has ended, and run the same command again"
            )

    def renew(self) -> None:
        """Raises the number; raises LeaseLostError when another process has claimed it since."""
        self.confirm()
        self.claim = replace(self.claim, number=self.claim.number + 1)
        self._board.write(self.claim.to_text())

    def release(self) -> None:
        """Gives it back, unless it is another's by now."""
        with contextlib.suppress(CnClipError):  # a store that is away: the claim runs out by itself
            self.confirm()
            self._board.erase()

    def _read(self) -> Claim | None:
        return Claim.of_text(self._board.read())

    def _is_own(self, found: Claim | None) -> bool:
        return found is not None and found.owner == self.claim.owner


def _process(pid: int) -> str:
    """What no other process ever is: which start of its machine, what numbers it there, its number, when it began.

    "" where the system does not say it, or there is no such process; "ended" for one that waits to be reaped.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        numbered_by = os.readlink("/proc/self/ns/pid")
        # After the name in brackets, which may hold anything: the state is the third field, the start the 22nd.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return "ended" if fields[0] == b"Z" else f"{boot} {numbered_by} {pid} {int(fields[19])}"
    except (OSError, ValueError, IndexError):
        return ""


def _has_ended(process: str) -> bool:
    """Whether a process was one of this machine, and is not any more."""
    own, parts = _process(os.getpid()).split(), process.split()
    if len(own) != 4 or len(parts) != 4 or parts[:2] != own[:2] or not parts[2].isdigit():
        return False
    now = _process(int(parts[2]))
    if now:
        return now != process
    try:
        os.kill(int(parts[2]), 0)
    except ProcessLookupError:
        return True
    except OSError:  # of another user, which the system may hide
        pass
    return False


def _holder(claim: Claim | None) -> str:
    return "which has ended" if claim is None else claim.holder


@contextlib.contextmanager
def held(lease: Lease, *, waiting: Callable[[str], object] = lambda sentence: None) -> Iterator[Lease]:
    """Holds a lease while the block runs: a thread renews it; `lease.confirm` says whether it is still held.

    Raises as `Lease.take`. A store that does not answer for a while loses nothing: renewing is tried again.
    """
    lease.take(waiting=waiting)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(lease.claim.ttl_s / _RENEWALS_A_TTL):
            try:
                lease.renew()
            except LeaseLostError:  # whoever asks `confirm` learns it
                return
            except CnClipError:
                continue

    thread = threading.Thread(target=renew, name="lease", daemon=True)
    thread.start()
    try:
        yield lease
    finally:
        ended.set()
        thread.join()
        lease.release()

"""What a part of the harness counts, and the line it ends with."""

import traceback
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cn_clip import terminal
from cn_clip.errors import CnClipError

if TYPE_CHECKING:
    from typing import Literal

    Outcome = Literal["fine", "sentence", "traceback", "signal", "difference", "lost"]

# Of what must not happen, so many cases a part are told in full.
_MOST_TOLD = 8


@dataclass
class Counts:
    """What came of the inputs of a part.

    signal: also a process that was killed because it did not end in time. killed: processes that were ended on purpose,
    before they were done.
    """

    part: str
    inputs: int = 0
    killed: int = 0
    seconds: float = 0.0
    found: Counter[str] = field(default_factory=Counter)
    told: Counter[str] = field(default_factory=Counter)

    def add(self, outcome: "Outcome", what: str = "") -> None:
        """An input, and what came of it; `what` says of a fault how to see it again."""
        self.inputs += 1
        self.found[outcome] += 1
        if outcome not in ("fine", "sentence"):
            self.told[outcome] += 1
            if self.told[outcome] <= _MOST_TOLD:
                print(f"[{self.part}] {outcome}: {what}", flush=True)

    def merge(self, other: "Counts") -> None:
        """Adds what another process counted."""
        self.inputs += other.inputs
        self.killed += other.killed
        self.found += other.found

    @property
    def faults(self) -> int:
        """Of all that must be 0."""
        return sum(self.found[one] for one in ("traceback", "signal", "difference", "lost"))

    def __str__(self) -> str:
        killed = f" ({self.killed} killed)" if self.killed else ""
        return (
            f"{self.part}: {self.inputs} inputs{killed}, {self.found['sentence']} sentences, {self.found['traceback']} "
            f"tracebacks, {self.found['signal']} signals, {self.found['difference']} silent differences, "
            f"{self.found['lost']} lost, {self.seconds:.0f} s"
        )


def outcome_of(error: BaseException) -> tuple["Outcome", str]:
    """What a command would print for an exception: one sentence, or a traceback, which is given in short."""
    if isinstance(error, CnClipError):
        sentence = str(error)
    elif isinstance(error, Exception):
        sentence = terminal.explained(error) or ""
    else:
        sentence = ""
    if sentence:
        return "sentence", sentence
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/cn_clip/" in frame.filename] or list(frames)
    place = f"{ours[-1].filename.rpartition('/cn_clip/')[2]}:{ours[-1].lineno}" if ours else "?"
    return "traceback", f"{type(error).__name__}: {str(error)[:200]} at {place}"

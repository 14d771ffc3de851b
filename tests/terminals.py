"""Commands on a terminal: what they write and when, for tests of what people see while they wait."""

import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]


@dataclass
class Seen:
    """What came on standard error, a terminal, and on standard output."""

    status: int = -1
    chunks: list[tuple[float, str]] = field(default_factory=list)  # seconds since the start, and what came then
    stdout: str = ""  # where it is a pipe

    @property
    def text(self) -> str:
        """All that came on the terminal."""
        return "".join(text for _, text in self.chunks)

    @property
    def lines(self) -> list[str]:
        """What was drawn or printed, each line that was drawn over too."""
        return [one.strip() for one in self.text.replace("\r", "\n").split("\n") if one.strip()]

    @property
    def screen(self) -> str:
        """What is left on the screen."""
        rows = []
        for row in self.text.replace("\r\n", "\n").split("\n"):
            shown = ""
            for part in row.split("\r"):
                shown = part + shown[len(part) :]
            rows.append(shown.rstrip())
        return "\n".join(rows).rstrip("\n")


def on_terminal(
    command: Sequence[str],
    *,
    columns: int = 100,
    stdout: str = "terminal",
    env: Mapping[str, str] | None = None,
    timeout: float = 120,
) -> Seen:
    """Runs a command whose standard error is a terminal; stdout: "terminal", the same, or "pipe"."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", **(env or {})}
    settings.pop("COLUMNS", None)
    begin, seen = time.monotonic(), Seen()
    out = subprocess.PIPE if stdout == "pipe" else theirs
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=theirs, env=settings)
    os.close(theirs)
    while time.monotonic() - begin < timeout:
        if not select.select([ours], [], [], 0.1)[0]:
            if process.poll() is not None:
                break
            continue
        try:
            data = os.read(ours, 1 << 16)
        except OSError:  # the last that held the terminal has closed it
            break
        if not data:
            break
        seen.chunks.append((time.monotonic() - begin, data.decode(errors="replace")))
    os.close(ours)
    if process.stdout is not None:
        seen.stdout = process.stdout.read().decode()
        process.stdout.close()
    if process.poll() is None and time.monotonic() - begin >= timeout:
        process.kill()
    seen.status = process.wait(10)
    return seen


def python(code: str) -> list[str]:
    """The command that runs `code`."""
    return [sys.executable, "-c", code]

"""Commands on a terminal: what they write and when, for tests of what people see while they wait."""

import os
import select
import signal
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
    seconds: float = 0.0  # of the whole command, or until it was ready

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
    cwd: Path | None = None,
    timeout: float = 600,
    until: str | None = None,
) -> Seen:
    """Runs a command whose standard error is a terminal; stdout: "terminal", the same, or "pipe".

    until: Ctrl-C comes when the terminal shows this; `seconds` are those until then.
    """
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    settings = {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm", "OMP_NUM_THREADS": "1", **(env or {})}
    settings.pop("COLUMNS", None)
    begin, seen = time.monotonic(), Seen()
    out = subprocess.PIPE if stdout == "pipe" else theirs
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=theirs, env=settings, cwd=cwd)
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
        if not seen.seconds:
            seen.chunks.append((time.monotonic() - begin, data.decode(errors="replace")))
        if until is not None and until in seen.text and not seen.seconds:
            seen.seconds = time.monotonic() - begin
            process.send_signal(signal.SIGINT)
    os.close(ours)
    if process.stdout is not None:
        seen.stdout = process.stdout.read().decode()
        process.stdout.close()
    if process.poll() is None and time.monotonic() - begin >= timeout:
        process.kill()
    seen.status = process.wait(60)
    seen.seconds = seen.seconds or time.monotonic() - begin
    return seen


def python(code: str) -> list[str]:
    """The command that runs `code`."""
    return [sys.executable, "-c", code]

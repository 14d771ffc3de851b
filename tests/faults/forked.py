"""Many inputs in one forked child, with bounds on memory and on the time of each: a crash costs only its own input."""

import faulthandler
import gc
import os
import resource
import select
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

MEMORY_BYTES = 2 << 30
# Of a processor, for one input: a busy machine must not look like a hang. Waiting has this many times as long.
SECONDS, PATIENCE = 30.0, 20
# So many inputs a child: what one of them leaves in memory reaches few others.
A_CHILD = 250

# Takes the number of an input; returns what came of it, on one line.
Take = Callable[[int], str]


class Report(NamedTuple):
    """What a child said of an input; None: it died, `signal` says of what (0: it was killed for taking too long)."""

    number: int
    line: str | None
    signal: int = 0


def reports(
    take: Take, numbers: Iterable[int], *, seconds: float = SECONDS, a_child: int = A_CHILD
) -> Iterator[Report]:
    """Runs `take` on each number in forked children, one after the other, and yields a report for each."""
    waiting = list(numbers)
    while waiting:
        for report in _of_child(take, waiting[:a_child], seconds):
            yield report
            waiting.remove(report.number)


def _of_child(take: Take, numbers: list[int], seconds: float) -> Iterator[Report]:
    incoming, outgoing = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(incoming)
        _work(take, numbers, outgoing)
    os.close(outgoing)
    done, buffer, is_late, status = 0, b"", False, 0
    since, used = time.monotonic(), 0.0
    try:
        while True:
            if not select.select([incoming], [], [], 1.0)[0]:
                waited = time.monotonic() - since
                if _cpu_seconds(pid) - used > seconds or waited > PATIENCE * seconds:
                    is_late = True
                    os.kill(pid, signal.SIGKILL)
                    break
                continue
            piece = os.read(incoming, 1 << 16)
            if not piece:
                break
            *lines, buffer = (buffer + piece).split(b"\n")
            for line in lines:
                yield Report(numbers[done], line.decode(errors="replace"))
                done += 1
            since, used = time.monotonic(), _cpu_seconds(pid)
    except GeneratorExit:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(incoming)
        status = os.waitpid(pid, 0)[1]
    if done < len(numbers):
        number_of_signal = os.WTERMSIG(status) if os.WIFSIGNALED(status) and not is_late else 0
        yield Report(numbers[done], None, number_of_signal)


def _cpu_seconds(pid: int) -> float:
    """What a child has used of processors so far."""
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stream:
        fields = stream.read().rpartition(") ")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _work(take: Take, numbers: list[int], outgoing: int) -> None:
    status = 1
    try:
        gc.freeze()
        faulthandler.disable()  # a crash is a line of the report
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # libraries in C print what they think of a file
        limit_memory(MEMORY_BYTES)
        for number in numbers:
            line = take(number).replace("\n", " ").encode(errors="replace")
            os.write(outgoing, line[:2000] + b"\n")
        status = 0
    finally:
        os._exit(status)


def limit_memory(more: int) -> None:
    """Bounds the address space of this process to what it has and `more` bytes."""
    with open("/proc/self/statm", encoding="ascii") as stream:
        pages = int(stream.read().split()[0])
    limit = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))

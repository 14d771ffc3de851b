"""Runs commands on the pretend GPU one after another, in children of one process that has loaded PyTorch already.

Reads a job a line from its input, JSON with the fields of `Job`, and answers each with a line: status and seconds.
tools/pretend_gpu/rig.py starts it.
"""

import contextlib
import json
import os
import runpy
import signal
import socket
import sys
import time
from dataclasses import dataclass

import pretend_meter
import torch
import torch._dynamo
import torch.distributed
import torch.utils.data

import cn_clip.cli
import cn_clip.clip
import cn_clip.training.building
import cn_clip.training.main

# What torchrun grants the others, once one of several processes has failed.
GRACE_SECONDS = 20


@dataclass(frozen=True)
class Job:
    """words: `-m cn_clip ...`, `-c CODE` or `FILE.py ...`, as Python takes them. processes: as torchrun starts them."""

    words: list[str]
    folder: str
    log: str
    report: str
    environment: dict[str, str]
    processes: int
    seconds: float


def begin(job: Job, environment: dict[str, str]) -> int:
    """Forks a child that does the job, and returns its number."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.setsid()
        log = os.open(job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(job.folder)
        os.environ.update({**environment, "PRETEND_REPORT": job.report})
        pretend_meter.report_at_exit()
        status = outcome(job.words)
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def outcome(words: list[str]) -> int:
    """Runs the words in this process; returns the exit status."""
    try:
        if words[:2] == ["-m", "cn_clip"]:
            sys.argv = ["cn-clip", *words[2:]]
            cn_clip.cli.main(words[2:])
        elif words[0] == "-c":
            exec(words[1], {"__name__": "__main__"})
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    return 0


def environments(job: Job) -> list[dict[str, str]]:
    """The environment of each process of a job; several get what torchrun would give them."""
    if job.processes == 1:
        return [job.environment]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    size = {"WORLD_SIZE": str(job.processes), "LOCAL_WORLD_SIZE": str(job.processes)}
    ranks = range(job.processes)
    return [{**job.environment, **address, **size, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in ranks]


def finish(children: set[int], seconds: float) -> int:
    """Waits for the children; returns the first status that is not 0, and 124 when they had to be killed."""
    until, status = time.monotonic() + seconds, 0
    while children:
        child, ended = os.waitpid(-1, os.WNOHANG)
        if child in children:
            children.remove(child)
            status = status or os.waitstatus_to_exitcode(ended)
            if status:
                until = min(until, time.monotonic() + GRACE_SECONDS)
        elif time.monotonic() > until:
            status = status or 124
            for one in children:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(one, signal.SIGKILL)
            until = float("inf")
        else:
            time.sleep(0.05)
    return status


def main() -> None:
    """Answers jobs until the input ends."""
    assert not torch.cuda.is_initialized(), "a child could not use CUDA after its parent has"
    print("ready", flush=True)
    for line in sys.stdin:
        job, began = Job(**json.loads(line)), time.monotonic()
        status = finish({begin(job, environment) for environment in environments(job)}, job.seconds)
        print(json.dumps({"status": status, "seconds": time.monotonic() - began}), flush=True)


if __name__ == "__main__":
    main()

"""Runs commands on the pretend GPU and tells what each made it do; tests/test_pretend_gpu.py says which commands."""

import json
import os
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cn_clip import terminal

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
# Numbered from 1, as tools/pretend_gpu/site/pretend_meter.py looks at them: caches are filled, and nothing else is due.
STEADY = range(3, 7)
WAITS = ("wait_event", "wait_stream", "wait_device", "wait_free", "down_pageable")
COLUMNS = ("run", "status", "s", "waits a step", "launches a step", "bytes a picture", "largest pageable", "peak")


@dataclass(frozen=True)
class Result:
    """What came of a command. records: what each of its processes counted, by rank."""

    name: str
    status: int
    seconds: float
    log: str
    records: list[dict[str, Any]] = field(default_factory=list)

    @property
    def steps(self) -> list[dict[str, int]]:
        """What the first process counted in each steady step of training; empty for other commands."""
        return self.records[0]["steps"][STEADY.start - 1 : STEADY.stop - 1] if self.records else []

    @property
    def waits(self) -> list[dict[str, int]]:
        """The waits of each steady step, by kind without `wait_`."""
        return waits_of(self.steps)

    @property
    def waits_at(self) -> dict[str, int]:
        """Where PyTorch saw the steady steps wait, and how often; it does not see events."""
        return self.records[0]["waits_at"] if self.records else {}

    @property
    def launches(self) -> float | None:
        """Kernels that a steady step launches."""
        return sum(step.get("launches", 0) for step in self.steps) / len(self.steps) if self.steps else None

    @property
    def bytes_a_picture(self) -> float | None:
        """Bytes that go to the device for each picture: of the steady steps, else since the first batch."""
        if self.steps:
            return sum(step.get("up_bytes", 0) for step in self.steps) / sum(step["pictures"] for step in self.steps)
        if not self.records or not self.records[0]["pictures"]:
            return None
        return self.records[0]["since_first_batch"].get("up_bytes", 0) / self.records[0]["pictures"]

    @property
    def largest_pageable(self) -> int | None:
        """Bytes of the largest copy to the device from memory that is not pinned, since the first batch."""
        return self.records[0]["largest_pageable"] if self.records else None

    @property
    def peak_bytes(self) -> int:
        """The most memory of the device that tensors of one process took."""
        return max((record["peak_bytes"] for record in self.records), default=0)

    def row(self) -> list[str]:
        """The cells of COLUMNS."""
        kinds = [" + ".join(f"{number} {kind}" for kind, number in waits.items()) or "0" for waits in self.waits]
        whole = [None if one is None else f"{one:,.0f}" for one in (self.launches, self.bytes_a_picture)]
        pageable = None if self.largest_pageable is None else f"{self.largest_pageable:,}"
        peak = f"{self.peak_bytes / 2**20:.1f} MiB" if self.peak_bytes else None
        cells = [" | ".join(dict.fromkeys(kinds)) or None, *whole, pageable, peak]
        return [self.name, str(self.status), f"{self.seconds:.1f}", *(cell or "-" for cell in cells)]

    def entry(self) -> dict[str, Any]:
        """The same as values, for JSON, and where the waits are."""
        return {
            "run": self.name,
            "status": self.status,
            "seconds": round(self.seconds, 1),
            "waits": self.waits,
            "waits_at": self.waits_at,
            "launches": self.launches,
            "bytes_a_picture": self.bytes_a_picture,
            "largest_pageable": self.largest_pageable,
            "peak_bytes": self.peak_bytes,
        }


def waits_of(steps: Sequence[Mapping[str, int]]) -> list[dict[str, int]]:
    """The waits of each of these steps, by kind without `wait_`."""
    return [{kind.removeprefix("wait_"): step[kind] for kind in WAITS if step.get(kind)} for step in steps]


def table(results: Sequence[Result]) -> str:
    """The results as lines, a run each, under the names of the columns."""
    return "\n".join(terminal.align([list(COLUMNS), *(result.row() for result in results)]))


class Rig:
    """The pretend GPU that setup.sh made in `folder`; logs and reports go to `work`, where the commands run."""

    def __init__(self, folder: Path, work: Path) -> None:
        """Raises FileNotFoundError when setup.sh has not been run."""
        self.python, self.work = folder / "python", work
        if not self.python.exists():
            raise FileNotFoundError(f"{self.python}: run tools/pretend_gpu/setup.sh {folder} first")
        self.results: list[Result] = []
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TRITON_LIBCUDA_PATH": str(folder),
        }
        (work / "logs").mkdir(parents=True)
        with (work / "logs" / "fork_server.txt").open("w", encoding="utf-8") as errors:
            command = [self.python, HERE / "fork_server.py"]
            pipe = subprocess.PIPE
            settings: dict[str, Any] = {"cwd": work, "env": self.environment, "encoding": "utf-8"}
            self._server = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, **settings)
        if self._answer() != "ready":
            raise RuntimeError((work / "logs" / "fork_server.txt").read_text(encoding="utf-8"))

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

    def close(self) -> None:
        """Ends the server."""
        self._server.communicate()

    def run(
        self,
        name: str,
        words: Sequence[object],
        *,
        gpus: int = 1,
        gpu_bytes: int | None = None,
        processes: int = 1,
        seconds: float = 600,
    ) -> Result:
        """Runs Python with `words`, in as many processes as torchrun would; see `Job` of the server."""
        log, report = self._files(name)
        environment = {"PRETEND_GPUS": str(gpus), "PRETEND_BYTES": "" if gpu_bytes is None else str(gpu_bytes)}
        job = {
            "words": [str(word) for word in words],
            "folder": str(self.work),
            "log": str(log),
            "report": str(report),
            "environment": environment,
            "processes": processes,
            "seconds": seconds,
        }
        assert self._server.stdin is not None
        print(json.dumps(job), file=self._server.stdin, flush=True)
        answer = json.loads(self._answer())
        return self._kept(name, answer["status"], answer["seconds"], log, report)

    def run_program(self, name: str, command: Sequence[object], *, gpus: int = 1, **variables: str) -> Result:
        """Runs a program that starts Python itself, by the name in PYTHON."""
        log, report = self._files(name)
        environment = {**self.environment, "PRETEND_GPUS": str(gpus), "PRETEND_REPORT": str(report)}
        environment |= {"PYTHON": str(self.python), **variables}
        began = time.monotonic()
        with log.open("w", encoding="utf-8") as stream:
            done = subprocess.run(
                [str(word) for word in command],
                cwd=self.work,
                env=environment,
                stdout=stream,
                stderr=subprocess.STDOUT,
                timeout=600,
            )
        return self._kept(name, done.returncode, time.monotonic() - began, log, report)

    def _files(self, name: str) -> tuple[Path, Path]:
        stem = f"{len(self.results):03d} {name}".replace("/", "_").replace(" ", "_")
        return self.work / "logs" / f"{stem}.txt", self.work / "logs" / f"{stem}.jsonl"

    def _kept(self, name: str, status: int, seconds: float, log: Path, report: Path) -> Result:
        lines = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
        records = sorted((json.loads(line) for line in lines), key=lambda record: (not record["steps"], record["rank"]))
        text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        result = Result(name, status, seconds, text, records)
        self.results.append(result)
        return result

    def write_report(self, path: Path) -> None:
        """All results, as JSON."""
        path.write_text(json.dumps([one.entry() for one in self.results], indent=1) + "\n", encoding="utf-8")

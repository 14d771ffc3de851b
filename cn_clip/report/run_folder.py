"""What the folder of a training run holds: settings, curves, times, checkpoints."""

# N points

import math
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from cn_clip.errors import DataError
from cn_clip.report.log_lines import Log, read_logs
from cn_clip.training.curves import Points
from cn_clip.training.metrics_file import METRICS, Record, read_records

if TYPE_CHECKING:
    from typing import TypeGuard

CHECKPOINTS, BEST, LATEST = "checkpoints", "epoch_best.pt", "epoch_latest.pt"
DIRECTIONS = ("text_to_image", "image_to_text")


@dataclass(frozen=True)
class Run:
    """A run as its folder tells it. records: as in metrics.jsonl, `source`: the file they come from."""

    folder: Path
    source: str
    records: list[Record]
    params: dict[str, str]
    log: Log

    @property
    def name(self) -> str:
        """The name it was given."""
        return self.folder.resolve().name

    @property
    def last_step(self) -> int:
        """The last step that was logged or validated."""
        return max((record["step"] for record in self.records), default=0)

    @property
    def max_steps(self) -> int | None:
        """The steps it was to do, None where no log says so."""
        return self.log.max_steps

    @property
    def global_batch(self) -> int | None:
        """Pairs of a step over all processes, None where no log says so."""
        return self.log.global_batch

    @property
    def begin_and_end(self) -> tuple[datetime, datetime] | None:
        """The times of the first and the last log line."""
        return (self.log.begin, self.log.end) if self.log.begin and self.log.end else None

    @property
    def num_infinite(self) -> int:
        """Logged steps whose loss is no number."""
        return sum(record["kind"] == "train" and not is_finite(record.get("loss")) for record in self.records)

    @property
    def checkpoints(self) -> list[str]:
        """The names of the checkpoint files."""
        return sorted(path.name for path in (self.folder / CHECKPOINTS).glob("*.pt"))

    def points(self, kind: str, name: str, *, factor: float = 1.0) -> Points:
        """Steps (N,) in order and values (N,) times `factor`; the last value of a step counts.

        Values that are no number are left out.
        """
        values = {
            record["step"]: value * factor
            for record in self.records
            if record["kind"] == kind and is_finite(value := record.get(name))
        }
        steps = sorted(values)
        return np.array(steps, dtype=np.float64), np.array([values[step] for step in steps], dtype=np.float64)

    def validations(self) -> list[Record]:
        """The records of the validations, by step."""
        found = {record["step"]: record for record in self.records if record["kind"] == "valid"}
        return [found[step] for step in sorted(found)]

    def best(self) -> tuple[int, float] | None:
        """(step, mean recall of both directions) of the best validation, the first of equals; None without recalls."""
        scores = {record["step"]: score for record in self.validations() if (score := mean_recall(record)) is not None}
        if not scores:
            return None
        step = max(scores, key=lambda step: (scores[step], -step))
        return step, scores[step]

    def best_checkpoint(self) -> Path:
        """The checkpoint of the best validation, else the latest; raises DataError where there is neither."""
        for name in (BEST, LATEST):
            path = self.folder / CHECKPOINTS / name
            if path.is_file():
                return path
        raise DataError(
            f"neither {BEST} nor {LATEST} is there; name a checkpoint with --checkpoint", at=self.folder / CHECKPOINTS
        )


def is_finite(value: float | None) -> "TypeGuard[float]":
    """Whether a value of a record is there and a number."""
    return value is not None and math.isfinite(value)


def mean_recall(record: Record) -> float | None:
    """The mean of both directions of a validation: what the best checkpoint is chosen by."""
    ways = [record.get(f"{way}_mean_recall") for way in DIRECTIONS]
    known = [value for value in ways if is_finite(value)]
    return sum(known) / len(ways) if len(known) == len(ways) else None


def read_run(folder: Path) -> Run:
    """Reads the folder of a run; curves from metrics.jsonl, or from the logs where it is missing.

    Raises DataError where there is no such folder, and where neither holds a step.
    """
    if not folder.is_dir():
        raise DataError("no such folder; expected the folder of a run, LOGS/NAME of cn-clip train", at=folder)
    logs = sorted(folder.glob("out_*.log"))
    log = read_logs(logs)
    records, source = read_records(folder / METRICS)[0], METRICS
    if not records:
        records, source = log.records, ", ".join(path.name for path in logs)
    if not records:
        raise DataError(
            f"neither {METRICS} nor an out_*.log with a step is here; "
            "expected the folder of a run, LOGS/NAME of cn-clip train",
            at=folder,
        )
    return Run(folder, source, records, _params(folder) or log.params, log)


def _params(folder: Path) -> dict[str, str]:
    """The settings of the last start, as `params_*.txt` has them; empty without one."""
    paths = sorted(folder.glob("params_*.txt"))
    if not paths:
        return {}
    try:
        lines = paths[-1].read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", at=paths[-1]) from error
    parts = (line.partition(": ") for line in lines)
    return {name.strip(): value for name, colon, value in parts if colon}

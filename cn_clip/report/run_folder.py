"""What the folder of a training run holds: settings, curves, times, checkpoints; from its log where it has no metrics.

A log, `out_*.log`, is read for runs of Chinese-CLIP, and for those that have lost their metrics file.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path, PurePath
from typing import Any, TypeGuard

from cn_clip.errors import DataError
from cn_clip.jsonl import numbered_lines
from cn_clip.training.logger import TIME_FORMAT
from cn_clip.training.monitor import METRICS, Kind, Points, Record, points, read_records

CHECKPOINTS, BEST, LATEST = "checkpoints", "epoch_best.pt", "epoch_latest.pt"
DIRECTIONS = ("text_to_image", "image_to_text")

_LINE = re.compile(r"(?P<time>[\d-]{10},[\d:]{8}) \| \w+ \| (?:Rank \d+ \| )?(?P<message>.*)")
_SETTING = re.compile(r"  (?P<name>\w+): (?P<value>.*)")
_LOADED = re.compile(r"=> loaded checkpoint '(?P<path>.*)' \(epoch ")
_VALUE = r"(-?\d+(?:\.\d+)?(?:e[-+]?\d+)?|nan|-?inf)"
_STEP = re.compile(
    rf"Global Steps: (\d+)/(\d+) \| .*\| Loss: {_VALUE} \| .*Batch Time: {_VALUE}s \| LR: {_VALUE} \| "
    rf"logit_scale: {_VALUE} \| Global Batch Size: (\d+)"
)
_SPEED = re.compile(rf"Speed: {_VALUE} samples/s \| Peak Memory: {_VALUE} GiB")
_WHERE = r"\(epoch \d+ @ (\d+) steps\) \| "
_VALIDATION = re.compile(
    rf"Validation Result {_WHERE}Valid Loss: {_VALUE} \| Image2Text Acc: {_VALUE} \| Text2Image Acc: {_VALUE} \| "
)
_RECALLS = rf"R@1: {_VALUE} R@5: {_VALUE} R@10: {_VALUE}"
_RECALL = re.compile(rf"Validation Recall {_WHERE}.*\| Text2Image {_RECALLS} \| Image2Text {_RECALLS}")
_KS = ("r1", "r5", "r10")


@dataclass
class Log:
    """What the log files of one run say.

    names: of the files. records: as those of the metrics file. seconds: from the first to the last line of each file.
    loaded: the checkpoint that the last file begins with.
    """

    names: list[str]

    records: list[Record] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    max_steps: int | None = None
    global_batch: int | None = None
    seconds: float = 0.0
    begin: datetime | None = None
    end: datetime | None = None
    loaded: str | None = None

    def take(self, message: str) -> None:
        """Adds what one line says; a line of any other form is passed over."""
        values: dict[str, Any]
        last: Record = self.records[-1] if self.records else {"kind": None}
        if found := _STEP.match(message):
            self.max_steps, self.global_batch = int(found[2]), int(found[7])
            loss, seconds, rate, scale = map(_finite, found.group(3, 4, 5, 6))
            speed = self.global_batch / seconds if seconds else None
            values = {"loss": loss, "lr": rate, "logit_scale": scale, "samples_per_second": speed}
            self.records.append({"step": int(found[1]), "kind": "train", **values})
        elif (found := _SPEED.match(message)) and last["kind"] == "train":
            last |= {"samples_per_second": _finite(found[1]), "peak_memory_gib": _finite(found[2])}
        elif found := _VALIDATION.match(message):
            values = {"loss": _finite(found[2])}
            values |= {"image_to_text_acc": _share(found[3]), "text_to_image_acc": _share(found[4])}
            self.records.append({"step": int(found[1]), "kind": "valid", **values})
        elif (found := _RECALL.match(message)) and last["kind"] == "valid":
            for way, first in (("text_to_image", 2), ("image_to_text", 5)):
                shares = [_share(found[first + position]) for position in range(len(_KS))]
                known = [share for share in shares if share is not None]
                last |= {f"{way}_{name}": share for name, share in zip(_KS, shares, strict=True)}
                last[f"{way}_mean_recall"] = sum(known) / len(known) if known else None
        elif found := _LOADED.match(message):
            self.loaded = found["path"]
        elif found := _SETTING.match(message):
            self.params[found["name"]] = found["value"]

    def continues(self, earlier: "Log") -> bool:
        """Whether it goes on where `earlier` stopped: it loads a checkpoint of its own, and begins behind its start.

        A log without settings or without a loaded checkpoint in it says nothing of that; then the steps decide.
        """
        first, first_before = (min(record["step"] for record in log.records) for log in (self, earlier))
        if first <= first_before:
            return False
        folder = PurePath(self.params.get("checkpoint_path", ""))
        if not folder.parts:
            return True
        return self.loaded is not None and PurePath(self.loaded).parts[-3:-1] == folder.parts[-2:]


def read_logs(paths: Iterable[Path]) -> Log:
    """The log files of the last run among them, in the order of their starts; steps done again count once.

    A file without a step is passed over: its start was refused. Raises DataError for a file that cannot be read.
    Worked example: files with steps 10-50, 30-90 (begun with its own checkpoint of step 20) and 5-15: the first two
    are one run, with steps 10-20 of the first; the third is another run of the same name, and all that is read.
    """
    whole = Log([])
    for path in paths:
        log = Log([path.name])
        for _, line in numbered_lines(path):
            found = _LINE.fullmatch(line.decode("utf-8", errors="replace"))
            if found is None:
                continue
            try:
                log.end = datetime.strptime(found["time"], TIME_FORMAT)
            except ValueError:
                continue
            log.begin = log.begin or log.end
            log.take(found["message"])
        if log.begin is not None and log.end is not None:
            log.seconds = max(0.0, (log.end - log.begin).total_seconds())
        if not log.records:
            continue
        if whole.records and log.continues(whole):
            first = min(record["step"] for record in log.records)
            log.records = [record for record in whole.records if record["step"] < first] + log.records
            log.params, log.names = {**whole.params, **log.params}, whole.names + log.names
            log.seconds, log.begin = whole.seconds + log.seconds, whole.begin
            log.max_steps, log.global_batch = log.max_steps or whole.max_steps, log.global_batch or whole.global_batch
        whole = log
    return whole


def _finite(text: str) -> float | None:
    return None if text.endswith(("nan", "inf")) else float(text)


def _share(text: str) -> float | None:
    value = _finite(text)
    return None if value is None else value / 100


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
    def num_infinite(self) -> int:
        """Logged steps whose loss is no number."""
        return sum(record["kind"] == "train" and not is_finite(record.get("loss")) for record in self.records)

    @property
    def checkpoints(self) -> list[str]:
        """The names of the checkpoint files."""
        return sorted(path.name for path in (self.folder / CHECKPOINTS).glob("*.pt"))

    def points(self, kind: Kind, name: str, *, factor: float = 1.0) -> Points:
        """As `monitor.points`, of this run's records."""
        return points(self.records, kind, name, factor=factor)

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

    def facts(self) -> dict[str, Any]:
        """What `--json` prints of the run."""
        best = self.best()
        _, losses = self.points("train", "loss")
        return {
            "name": self.name,
            "source": self.source,
            "last_step": self.last_step,
            "max_steps": self.log.max_steps,
            "seconds": self.log.seconds or None,
            "last_loss": float(losses[-1]) if len(losses) else None,
            "best_step": best[0] if best else None,
            "best_mean_recall": best[1] if best else None,
        }

    def best_checkpoint(self) -> Path:
        """The checkpoint of the best validation, else the latest; raises DataError where there is neither."""
        for name in (BEST, LATEST):
            path = self.folder / CHECKPOINTS / name
            if path.is_file():
                return path
        raise DataError(
            f"neither {BEST} nor {LATEST} is there; name a checkpoint with --checkpoint", at=self.folder / CHECKPOINTS
        )


def is_finite(value: float | None) -> TypeGuard[float]:
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
    log = read_logs(sorted(folder.glob("out_*.log")))
    records, source = read_records(folder / METRICS)[0], METRICS
    if not records:
        records, source = log.records, ", ".join(log.names)
    if not records:
        raise DataError(
            f"neither {METRICS} nor an out_*.log with a step is here; "
            "expected the folder of a run, LOGS/NAME of cn-clip train",
            at=folder,
        )
    params = log.params
    if paths := sorted(folder.glob("params_*.txt")):
        # The settings of a start bear the time of its log. A later start may have been refused.
        own = folder / f"params_{log.names[-1][4:-4]}.txt" if log.names else paths[-1]
        path = own if own in paths else paths[-1]
        try:
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})", at=path) from error
        parts = (line.partition(": ") for line in lines)
        params = {name.strip(): value for name, colon, value in parts if colon} or params
    return Run(folder, source, records, params, log)

"""The log of a run, `out_*.log`, as numbers: for runs of Chinese-CLIP, and those that have lost their metrics file."""

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from cn_clip.jsonl import numbered_lines
from cn_clip.training.logs import TIME_FORMAT
from cn_clip.training.metrics_file import Record

_LINE = re.compile(r"(?P<time>[\d-]{10},[\d:]{8}) \| \w+ \| (?:Rank \d+ \| )?(?P<message>.*)")
_SETTING = re.compile(r"  (?P<name>\w+): (?P<value>.*)")
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
    """What log files say. records: as those of the metrics file; seconds: from first to last line of each file."""

    records: list[Record] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    max_steps: int | None = None
    global_batch: int | None = None
    seconds: float = 0.0
    begin: datetime | None = None
    end: datetime | None = None

    def read(self, path: Path) -> None:
        """Adds a log file, later than those before; steps that it does again replace the earlier ones.

        A file that begins at or before the first step so far is a new run of the name: all before it is forgotten.
        Lines of any other form are passed over. Raises DataError for a file that cannot be read.
        """
        records, params, seconds, begin = self.records, self.params, self.seconds, self.begin
        self.records, self.params, self.seconds, self.begin = [], {}, 0.0, None
        for time, message in _messages(path):
            self.begin, self.end = self.begin or time, time
            self._take(message)
        if self.begin is not None and self.end is not None:
            self.seconds = max(0.0, (self.end - self.begin).total_seconds())
        first = min((record["step"] for record in self.records), default=math.inf)
        if self.records and first <= min((record["step"] for record in records), default=math.inf):
            return
        self.records = [record for record in records if record["step"] < first] + self.records
        self.params, self.seconds, self.begin = {**params, **self.params}, seconds + self.seconds, begin or self.begin

    def _take(self, message: str) -> None:
        for pattern, take in _TAKERS:
            if found := pattern.match(message):
                take(self, found)
                return

    def _take_setting(self, found: re.Match[str]) -> None:
        self.params[found["name"]] = found["value"]

    def _take_step(self, found: re.Match[str]) -> None:
        self.max_steps, self.global_batch = int(found[2]), int(found[7])
        loss, seconds, rate, scale = map(_finite, found.group(3, 4, 5, 6))
        speed = self.global_batch / seconds if seconds else None
        values = {"loss": loss, "lr": rate, "logit_scale": scale, "samples_per_second": speed}
        self.records.append({"step": int(found[1]), "kind": "train", **values})

    def _take_speed(self, found: re.Match[str]) -> None:
        if self.records and self.records[-1]["kind"] == "train":
            values = {"samples_per_second": _finite(found[1]), "peak_memory_gib": _finite(found[2])}
            self.records[-1].update(values)

    def _take_validation(self, found: re.Match[str]) -> None:
        values = {"loss": _finite(found[2])}
        values |= {"image_to_text_acc": _share(found[3]), "text_to_image_acc": _share(found[4])}
        self.records.append({"step": int(found[1]), "kind": "valid", **values})

    def _take_recall(self, found: re.Match[str]) -> None:
        if not self.records or self.records[-1]["kind"] != "valid":
            return
        for way, first in (("text_to_image", 2), ("image_to_text", 5)):
            shares = [_share(found[first + place]) for place in range(len(_KS))]
            values = {f"{way}_{name}": share for name, share in zip(_KS, shares, strict=True)}
            known = [share for share in shares if share is not None]
            values[f"{way}_mean_recall"] = sum(known) / len(known) if known else None
            self.records[-1].update(values)


_TAKERS: tuple[tuple[re.Pattern[str], Callable[[Log, re.Match[str]], None]], ...] = (
    (_STEP, Log._take_step),
    (_SPEED, Log._take_speed),
    (_VALIDATION, Log._take_validation),
    (_RECALL, Log._take_recall),
    (_SETTING, Log._take_setting),
)


def read_logs(paths: Iterable[Path]) -> Log:
    """The logs of one run, in the order of their starts."""
    log = Log()
    for path in paths:
        log.read(path)
    return log


def _messages(path: Path) -> Iterator[tuple[datetime, str]]:
    for _, line in numbered_lines(path):
        found = _LINE.fullmatch(line.decode("utf-8", errors="replace"))
        if found is None:
            continue
        try:
            yield datetime.strptime(found["time"], TIME_FORMAT), found["message"]
        except ValueError:
            continue


def _finite(text: str) -> float | None:
    return None if text.endswith(("nan", "inf")) else float(text)


def _share(text: str) -> float | None:
    value = _finite(text)
    return None if value is None else value / 100

"""The numbers of a run in its folder: `metrics.jsonl`, `curves.png`, and events for TensorBoard."""

# N points

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from cn_clip.digests import is_there
from cn_clip.errors import CnClipError, DataError, MissingExtraError
from cn_clip.extras import require
from cn_clip.files import atomic_write
from cn_clip.jsonl import json_object, numbered_lines
from cn_clip.training.logger import logger

Kind = Literal["train", "valid", "end"]
KINDS = get_args(Kind)
Record = dict[str, Any]
Points = tuple[NDArray[np.float64], NDArray[np.float64]]

METRICS, CURVES, EVENTS = "metrics.jsonl", "curves.png", "tensorboard"


class Monitor:
    """Keeps the numbers of a run in its folder; for one process of a run, rank 0. A context manager.

    `metrics.jsonl`: one line a call, {"step", "kind": "train" | "valid" | "end", ...values}; numbers that are not
    finite are null. `curves.png` is drawn anew at every validation and at the end, from these names where they are
    given: train "loss", "lr", "chance_loss" (ln of the pairs contrasted; leave it out where guessing costs something
    else); valid "loss" and "{text_to_image,image_to_text}_{r1,r5,r10,mean_recall}", shares in [0, 1].

    start_step: the steps done so far; what an earlier process wrote of later steps is dropped. A run that begins at 0,
    or with the checkpoint of another run (not goes_on), gives the file of an earlier one of its name the name
    `metrics_{time}.jsonl`. tensorboard: also write events; raises
    MissingExtraError without the package.
    Raises CnClipError when the metrics cannot be written.
    """

    def __init__(self, folder: Path, *, start_step: int, tensorboard: bool, goes_on: bool = True) -> None:
        events: Any = None
        if tensorboard:
            events = require("torch.utils.tensorboard", extra="tensorboard", purpose="--report-to tensorboard")
        self.folder, self.path = folder, folder / METRICS
        self._stream: IO[str] | None = None
        self._can_draw, self._is_drawn = True, False
        if (not start_step or not goes_on) and is_there(self.path) and self.path.stat().st_size:
            changed = time.strftime("%Y-%m-%d-%H-%M-%S", time.gmtime(self.path.stat().st_mtime))
            with self._writing():
                os.replace(self.path, self.path.with_name(f"{self.path.stem}_{changed}{self.path.suffix}"))
        self._keep(lambda record: record["step"] <= start_step and record["kind"] != "end")
        # TensorBoard hides what earlier processes wrote of the steps from purge_step on.
        purge_step = start_step + 1 if start_step else 0
        self._events = events and events.SummaryWriter(str(folder / EVENTS), purge_step=purge_step)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Records the numbers of a training step."""
        self._record("train", step, values)

    def validation(self, step: int, values: Mapping[str, float]) -> None:
        """Records the numbers of a validation after `step` steps, and draws the curves."""
        self._record("valid", step, values)
        self._draw()

    def end(self, step: int, values: Mapping[str, float]) -> None:
        """Records what the validations up to `step` came to; a run that goes on later has a new one in its place."""
        self._record("end", step, values)

    def close(self) -> None:
        """Draws the curves for the last time; twice does no harm."""
        if self._stream is None:
            return
        self._close_file()
        if self._events is not None:
            self._events.close()
        self._draw()

    def _record(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        if step <= self._last_step[kind]:  # done again after a resume: the later numbers are the run's
            self._keep(lambda record: record["kind"] != kind or record["step"] < step)
        record: Record = {"step": step, "kind": kind}
        record |= {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        assert self._stream is not None
        with self._writing():
            self._stream.write(json.dumps(record, allow_nan=False) + "\n")
            self._stream.flush()  # other processes see the line at once
        self._records.append(record)
        self._last_step[kind], self._is_drawn = step, False
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def _keep(self, wanted: Callable[[Record], bool]) -> None:
        """Leaves only the wanted records in the file, logs what went, and opens it for more."""
        self._close_file()
        records, num_torn = read_records(self.path)
        self._records = [record for record in records if wanted(record)]
        self._last_step = dict.fromkeys(KINDS, -1)
        for record in self._records:
            self._last_step[record["kind"]] = max(record["step"], self._last_step[record["kind"]])
        num_dropped = len(records) - len(self._records)
        num_again = sum(record["kind"] != "end" and not wanted(record) for record in records)
        if num_torn:
            logger.warning("%s: left out %d lines that are no record (a torn write?)", self.path, num_torn)
        if num_again:
            logger.info("%s: left out %d records of steps that are done again", self.path, num_again)
        with self._writing():
            if num_torn or num_dropped:
                with atomic_write(self.path) as stream:
                    stream.writelines(json.dumps(record) + "\n" for record in self._records)
            self._stream = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed by _close_file

    def _close_file(self) -> None:
        if self._stream is not None:
            stream, self._stream = self._stream, None
            with self._writing():
                stream.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CnClipError(f"{self.path}: cannot be written ({error.strerror}); is the disk full?") from error

    def _draw(self) -> None:
        """A picture that cannot be drawn is no reason to end a training."""
        if self._is_drawn or not self._can_draw:
            return
        path = self.folder / CURVES
        try:
            require("matplotlib", extra="plot", purpose="the plot of loss and recall")
            from cn_clip.training import curves

            curves.draw(all_points(self._records), path, title=self.folder.name)
            self._is_drawn = True
        except MissingExtraError as error:
            self._can_draw = False
            logger.info("No %s: %s", CURVES, error)
        except OSError as error:
            logger.warning("%s: cannot be written (%s)", path, error.strerror)


def read_records(path: Path) -> tuple[list[Record], int]:
    """The records of a metrics file, none if it does not exist, and how many of its lines are no record.

    Raises DataError for a file that cannot be opened.
    """
    records, num_torn = [], 0
    for _, line in numbered_lines(path) if is_there(path) else ():
        try:
            record = json_object(line)
        except DataError:
            record = {}
        values = [value for name, value in record.items() if name != "kind"]
        are_numbers = all(value is None or type(value) in (int, float) for value in values)
        if type(record.get("step")) is int and record.get("kind") in KINDS and are_numbers:
            records.append(record)
        else:
            num_torn += 1
    return records, num_torn


def points(records: Iterable[Record], kind: Kind, name: str, *, factor: float = 1.0) -> Points:
    """Steps (N,) in order and values (N,) times `factor`, both float64; the last value of a step counts.

    Values that are missing, null or not finite are left out.
    """
    values: dict[int, float] = {}
    for record in records:
        value = record.get(name)
        if record["kind"] == kind and value is not None and math.isfinite(value):
            values[record["step"]] = value * factor
    steps = sorted(values)
    return np.array(steps, dtype=np.float64), np.array([values[step] for step in steps], dtype=np.float64)


def smoothed(values_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over a window around each point, about a fortieth of all (9 at least); shorter at both ends."""
    half = max(4, len(values_N) // 80)
    sums = np.concatenate([[0.0], np.cumsum(values_N)])
    index = np.arange(len(values_N))
    start, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values_N))
    means: NDArray[np.float64] = (sums[end] - sums[start]) / (end - start)
    return means


def all_points(records: Sequence[Record]) -> dict[str, Points]:
    """The points of every value by KIND/NAME, e.g. "train/loss", and of the smoothed loss, "train/loss smoothed"."""
    names = {(record["kind"], name) for record in records for name in record if name not in ("step", "kind")}
    found = {f"{kind}/{name}": points(records, kind, name) for kind, name in names}
    if "train/loss" in found:
        steps, losses = found["train/loss"]
        found["train/loss smoothed"] = (steps, smoothed(losses))
    return found

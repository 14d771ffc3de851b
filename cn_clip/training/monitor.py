"""What tells a trainer how a run goes: `metrics.jsonl`, TensorBoard events, `curves.png`, and a few warnings."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

import torch

from cn_clip.errors import MissingExtraError
from cn_clip.extras import require
from cn_clip.processes import peak_bytes
from cn_clip.training.curves import History, draw
from cn_clip.training.logs import logger
from cn_clip.training.metrics_file import METRICS, MetricsFile, Record

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Kind = Literal["train", "valid"]

CURVES, EVENTS = "curves.png", "tensorboard"

# The published fine-tuning settings: this rate at this global batch.
FINE_TUNING_RATE, FINE_TUNING_BATCH = 5e-5, 1024
RATE_MARGIN = 4
HIGHEST_RATE = 5e-3


class Monitor:
    """Keeps the numbers of a run in its folder; for one process of a run, rank 0. A context manager.

    `metrics.jsonl`: one line a call, {"step", "kind": "train" | "valid", ...values}; numbers that are not finite are
    null. `curves.png` is drawn anew at every validation and at the end, from these names where they are given:
    train "loss", "lr", "chance_loss" (ln of the pairs contrasted; leave it out where guessing costs something else);
    valid "loss" and "{text_to_image,image_to_text}_{r1,r5,r10,mean_recall}", shares in [0, 1].

    start_step: the steps done so far; what an earlier process wrote of later steps is dropped. A run that begins at 0,
    or with the checkpoint of another run (not goes_on), gives the file of an earlier one of its name the name
    `metrics_{time}.jsonl`. tensorboard: also write events; raises
    MissingExtraError without the package.
    Raises CnClipError when the metrics cannot be written.
    """

    def __init__(self, folder: Path, *, start_step: int, tensorboard: bool, goes_on: bool = True) -> None:
        if tensorboard:
            require("tensorboard", extra="tensorboard", purpose="--report-to tensorboard")
        self.folder = folder
        self._can_draw, self._is_drawn = True, False
        self._file = MetricsFile(folder / METRICS)
        if not start_step or not goes_on:
            self._file.set_aside()
        self._keep(lambda record: record["step"] <= start_step)
        self._events = _event_writer(folder / EVENTS, start_step) if tensorboard else None

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

    def close(self) -> None:
        """Draws the curves for the last time; twice does no harm."""
        if not self._file.is_open:
            return
        self._file.close()
        if self._events is not None:
            self._events.close()
        self._draw()

    def _record(self, kind: Kind, step: int, values: Mapping[str, float]) -> None:
        if step <= self._last_step[kind]:  # done again after a resume: the later numbers are the run's
            self._keep(lambda record: record["kind"] != kind or record["step"] < step)
        record: Record = {"step": step, "kind": kind}
        record |= {name: float(value) if math.isfinite(value) else None for name, value in values.items()}
        self._file.append(record)
        self._remember(record)
        self._is_drawn = False
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{kind}/{name}", value, step)

    def _keep(self, wanted: Callable[[Record], bool]) -> None:
        """Drops the other records from the file, and begins the history with those that stay."""
        self._history, self._last_step = History(), {"train": -1, "valid": -1}
        for record in self._file.keep(wanted):
            self._remember(record)

    def _remember(self, record: Record) -> None:
        kind, step = record["kind"], record["step"]
        self._last_step[kind] = max(step, self._last_step[kind])
        self._history.add(kind, step, {name: value for name, value in record.items() if name not in ("step", "kind")})

    def _draw(self) -> None:
        """A picture that cannot be drawn is no reason to end a training."""
        if self._is_drawn or not self._can_draw:
            return
        try:
            draw(self._history, self.folder / CURVES, title=self.folder.name)
            self._is_drawn = True
        except MissingExtraError as error:
            self._can_draw = False
            logger.info("No %s: %s", CURVES, error)
        except OSError as error:
            logger.warning("%s: cannot be written (%s)", self.folder / CURVES, error.strerror)


def _event_writer(folder: Path, start_step: int) -> "SummaryWriter":
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard then hides what earlier processes wrote of these steps.
    purge_step = start_step + 1 if start_step else 0
    return SummaryWriter(str(folder), purge_step=purge_step)


def peak_memory(device: torch.device | str) -> int:
    """The most memory in use so far, in bytes: on a GPU this process's CUDA tensors, else what was resident."""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_bytes()


class StuckLoss:
    """Notices a loss that stays at ln(batch), what guessing among the texts of a batch costs.

    warmup: steps that do not count. patience: observed steps in a row. band: nats around ln(batch).
    """

    def __init__(self, *, warmup: int, patience: int = 200, band: float = 0.05) -> None:
        self.warmup, self.patience, self.band = warmup, patience, band
        self._smoothed: float | None = None
        self._count = 0
        self._has_warned = False

    def observe(self, step: int, loss: float, batch: int) -> str | None:
        """A warning, once, or None. batch: pairs that the loss contrasted; a loss that is not finite is passed over."""
        if self._has_warned or step <= self.warmup or batch < 2 or not math.isfinite(loss):
            return None
        self._smoothed = loss if self._smoothed is None else 0.95 * self._smoothed + 0.05 * loss
        chance = math.log(batch)
        self._count = self._count + 1 if abs(self._smoothed - chance) <= self.band else 0
        self._has_warned = self._count >= self.patience
        if not self._has_warned:
            return None
        return (
            f"the loss has stayed at {self._smoothed:.3f}, that is ln({batch}) = {chance:.3f}, up to step {step}: the "
            "model guesses which text belongs to which picture. Either the learning rate is too high and all features "
            "have become the same (start again from the pretrained weights with a tenth of --lr and more --warmup), "
            "or texts and pictures do not belong together (look at the data with cn-clip dataset check)"
        )


def rate_warning(lr: float, global_batch: int, *, pretrained: bool) -> str | None:
    """What speaks against this learning rate, or None.

    Fine-tuning: more than 4 times 5e-5 * global_batch / 1024, the rate of the published settings made smaller with the
    batch. From scratch: above 5e-3, with which AdamW trains no model of this kind.
    """
    if not pretrained:
        if lr <= HIGHEST_RATE:
            return None
        return f"--lr {lr:g} is far above what AdamW bears when training from scratch; try --lr 5e-4 or less"
    fitting = FINE_TUNING_RATE * global_batch / FINE_TUNING_BATCH
    if lr <= RATE_MARGIN * fitting:
        return None
    return (
        f"--lr {lr:g} is {lr / fitting:.0f} times what fits a global batch of {global_batch}: the published "
        f"fine-tuning uses {FINE_TUNING_RATE:g} at {FINE_TUNING_BATCH}, in proportion {fitting:.2g} here. Accuracy "
        f"may fall to chance at the start and take hundreds of epochs to return; try --lr {fitting:.1g} "
        f"to {RATE_MARGIN * fitting:.1g}, or a larger batch (--accum-freq)"
    )


class EarlyStop:
    """The best score so far, and how many scores in a row were not better. Higher is better."""

    def __init__(self) -> None:
        self.best: float | None = None
        self.bad = 0

    def observe(self, score: float) -> bool:
        """Whether `score` is the best one; equal is not better, and NaN never is."""
        is_best = not math.isnan(score) and (self.best is None or score > self.best)
        self.best, self.bad = (score, 0) if is_best else (self.best, self.bad + 1)
        return is_best

    def should_stop(self, patience: int | None) -> bool:
        """Whether `patience` scores in a row were not better; None: never."""
        return patience is not None and self.bad >= patience

    def state_dict(self) -> dict[str, Any]:
        """Plain values for the checkpoint."""
        return {"best": self.best, "bad": self.bad}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from `state_dict()`."""
        self.best, self.bad = state["best"], state["bad"]

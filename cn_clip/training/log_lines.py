"""What a run logs: the lines of Chinese-CLIP, speed and memory, and warnings; its numbers go to the monitor too."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch

from cn_clip.processes import peak_bytes
from cn_clip.training.advice import FINE_TUNING_BATCH, FINE_TUNING_RATE, RATE_MARGIN
from cn_clip.training.logger import logger
from cn_clip.training.loss import Scores
from cn_clip.training.monitor import Monitor
from cn_clip.training.state import Position
from cn_clip.training.stopping import Outcome
from cn_clip.training.validation import Validation

HIGHEST_RATE = 5e-3
# Compiling takes minutes, and a step on a GPU some tenths of a second.
STEPS_WORTH_COMPILING = 500


@dataclass(frozen=True)
class Plan:
    """The sizes of a run. num_padded: pairs of an epoch. contrasted: pairs among which the loss lets the model choose.

    has_chance_loss: whether guessing among them costs ln(contrasted).
    """

    max_steps: int
    steps_per_epoch: int
    num_padded: int
    global_batch: int
    contrasted: int
    has_chance_loss: bool


def validation_line(
    where: str, loss: float, image_to_text_acc: float, text_to_image_acc: float, *, logit_scale: float, batch_size: int
) -> str:
    """Chinese-CLIP's line on a validation; accuracies are shares in [0, 1]."""
    return (
        f"Validation Result {where} | Valid Loss: {loss:.6f} | Image2Text Acc: {image_to_text_acc * 100:.2f} | "
        f"Text2Image Acc: {text_to_image_acc * 100:.2f} | logit_scale: {logit_scale:.3f} | "
        f"Valid Batch Size: {batch_size}"
    )


def arithmetic_words(
    mixed: torch.dtype | None, weights: torch.dtype, *, validates_in_float32: bool, is_tf32: bool
) -> str:
    """What a run computes in, as `mixed bfloat16, validation float32`.

    mixed: the type of mixed precision, None for none. is_tf32: whether float32 products are TF32.
    """
    float32 = "float32 (TF32 products)" if is_tf32 else "float32"
    if mixed is not None:
        words = f"mixed {mixed}".replace("torch.", "")
        return f"{words}, validation {float32}" if validates_in_float32 else words
    return float32 if weights is torch.float32 else str(weights).replace("torch.", "")


def compile_advice(num_steps: int, *, compiles: bool, device_type: str) -> str | None:
    """That --compile may pay off in a run of so many steps, or None."""
    if compiles or device_type != "cuda" or num_steps <= STEPS_WORTH_COMPILING:
        return None
    return (
        f"--compile may make the {num_steps} steps to come faster: it takes minutes, before the first step and before "
        "the first validation"
    )


class Clock:
    """Seconds of the last step, how many of them it waited for data, and pairs a second since the last question.

    The wait is the loader's alone: copies to the device, and whatever the device makes this process wait for, belong
    to the step.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """now: gives seconds."""
        self._now = now
        self.data_time = self.batch_time = 0.0
        self._samples, self._seconds = 0, 0.0
        self.restart()

    def restart(self) -> None:
        """Leaves out what has happened since the last step."""
        self._begin, self._waited = self._now(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """The block waits for data of the step, and does nothing else."""
        begin = self._now()
        try:
            yield
        finally:
            self._waited += self._now() - begin

    def step_done(self, samples: int) -> None:
        """The step is done, on the whole."""
        self.data_time, self._waited = self._waited, 0.0
        self.batch_time = self._now() - self._begin
        self._begin += self.batch_time
        self._samples, self._seconds = self._samples + samples, self._seconds + self.batch_time

    def samples_per_second(self) -> float:
        """Since this was last asked."""
        speed = self._samples / max(self._seconds, 1e-9)
        self._samples, self._seconds = 0, 0.0
        return speed


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


@dataclass
class Report:
    """Writes what happens into the log and, if given, the monitor, which only rank 0 has."""

    plan: Plan
    device: torch.device
    warmup: int
    log_interval: int
    with_accuracy: bool = False
    monitor: Monitor | None = None
    clock: Clock = field(default_factory=Clock)
    num_skipped: int = 0
    _told_skipped: int = 0
    _told_zero: bool = False
    _compiled: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.stuck = StuckLoss(warmup=self.warmup, patience=max(20, 200 // self.log_interval))

    def step(self, position: Position, scores: Scores, *, rate: float, logit_scale: float) -> None:
        """The step before `position`."""
        loss, plan, batch = scores.loss.item(), self.plan, position.batch
        seen, percent = batch * plan.global_batch, 100.0 * batch / plan.steps_per_epoch
        accuracies = ""
        if self.with_accuracy:
            counts = (scores.images_right.item(), scores.texts_right.item())
            images, texts = (100 * count / plan.contrasted for count in counts)
            accuracies = f"Image2Text Acc: {images:.2f} | Text2Image Acc: {texts:.2f} | "
        logger.info(
            f"Global Steps: {position.step}/{plan.max_steps} | "
            f"Train Epoch: {position.epoch + 1} [{seen}/{plan.num_padded} ({percent:.0f}%)] | "
            f"Loss: {loss:.6f} | {accuracies}"
            f"Data Time: {self.clock.data_time:.3f}s | Batch Time: {self.clock.batch_time:.3f}s | "
            f"LR: {rate:5f} | logit_scale: {logit_scale:.3f} | Global Batch Size: {plan.global_batch}"
        )
        speed, memory = self.clock.samples_per_second(), peak_memory(self.device) / 2**30
        logger.info(f"Speed: {speed:.1f} samples/s | Peak Memory: {memory:.2f} GiB")
        if self.num_skipped > self._told_skipped:
            logger.warning("%d pictures could not be read so far and were passed over.", self.num_skipped)
            self._told_skipped = self.num_skipped
        values = {"loss": loss, "lr": rate, "logit_scale": logit_scale}
        values |= {"samples_per_second": speed, "peak_memory_gib": memory}
        if loss == 0 and not self._told_zero:
            self._told_zero = True
            logger.warning(
                "step %d: the loss is 0, so this step trains nothing: the pairs of the batch share their texts or "
                "pictures (are the data sorted?), or are known by heart",
                position.step,
            )
        if plan.has_chance_loss:
            values["chance_loss"] = math.log(plan.contrasted)
            warning = self.stuck.observe(position.step, loss, plan.contrasted)
            if warning:
                logger.warning("%s", warning)
        if self.monitor is not None:
            self.monitor.step(position.step, values)

    def validation(
        self, where: str, result: Validation, *, step: int, logit_scale: float, batch_size: int, sizes: tuple[int, int]
    ) -> None:
        """The result of a validation; sizes: pictures and texts it ranked."""
        in_batches = (result.loss, result.image_to_text_acc, result.text_to_image_acc)
        logger.info(validation_line(where, *in_batches, logit_scale=logit_scale, batch_size=batch_size))
        logger.info(
            f"Validation Recall {where} | {sizes[0]} images, {sizes[1]} texts | "
            f"Text2Image {result.text_to_image.line()} | Image2Text {result.image_to_text.line()}"
        )
        if self.monitor is not None:
            self.monitor.validation(step, result.values())

    def outcome(self, outcome: Outcome, line: str) -> None:
        """What the validations of the run came to, as the last line of its log; see `advice.verdict`."""
        logger.info("%s", line)
        if self.monitor is not None:
            values = {"best_mean_recall": outcome.best, "best_step": outcome.best_step, "mean_recall": outcome.last}
            if outcome.start is not None:
                values |= {"start_mean_recall": outcome.start, "is_better": float(outcome.is_better)}
            self.monitor.end(outcome.last_step, values)

    def compiling(self, what: Literal["training", "validation"]) -> None:
        """Says once for each that the towers are compiled, so that nobody takes the silence for a run that hangs."""
        if what in self._compiled:
            return
        self._compiled.add(what)
        more = {
            "training": "texts of another length compile it once more",
            "validation": "it is another program than that of training, as it has no gradients",
        }
        logger.info("--compile: compiling the towers for %s, which may take minutes; %s", what, more[what])

    def end(self) -> None:
        """What the run must not end without saying."""
        if self.num_skipped:
            logger.warning("%d pictures could not be read in this run and were passed over.", self.num_skipped)

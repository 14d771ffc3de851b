"""What a run tells of itself: the log lines of Chinese-CLIP, speed and memory, warnings, and the monitor's numbers."""

import math
import time
from dataclasses import dataclass, field

import torch

from cn_clip.training.logs import logger
from cn_clip.training.loss import Scores
from cn_clip.training.monitor import Monitor, StuckLoss, peak_memory
from cn_clip.training.state import Position
from cn_clip.training.validation import Validation


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


class Clock:
    """Seconds of the last step, and pairs a second since the last question."""

    def __init__(self) -> None:
        self.data_time = self.batch_time = 0.0
        self._samples, self._seconds = 0, 0.0
        self.restart()

    def restart(self) -> None:
        """Leaves out what has happened since the last step."""
        self._begin = time.monotonic()

    def data_ready(self) -> None:
        """The batches of the step are there."""
        self.data_time = time.monotonic() - self._begin

    def step_done(self, samples: int) -> None:
        """The step is done, on the whole."""
        self.batch_time = time.monotonic() - self._begin
        self._begin += self.batch_time
        self._samples, self._seconds = self._samples + samples, self._seconds + self.batch_time

    def samples_per_second(self) -> float:
        """Since this was last asked."""
        speed = self._samples / max(self._seconds, 1e-9)
        self._samples, self._seconds = 0, 0.0
        return speed


@dataclass
class Report:
    """Writes what happens into the log and, where there is one, the monitor: that of rank 0, None elsewhere."""

    plan: Plan
    stuck: StuckLoss
    device: torch.device
    with_accuracy: bool = False
    monitor: Monitor | None = None
    clock: Clock = field(default_factory=Clock)
    num_skipped: int = 0
    _told_skipped: int = 0
    _told_zero: bool = False

    def step(self, position: Position, scores: Scores, *, rate: float, logit_scale: float) -> None:
        """The step before `position`."""
        loss, plan = scores.loss.item(), self.plan
        batch = position.batch
        seen, percent = batch * plan.global_batch, 100.0 * batch / plan.steps_per_epoch
        logger.info(
            f"Global Steps: {position.step}/{plan.max_steps} | "
            f"Train Epoch: {position.epoch + 1} [{seen}/{plan.num_padded} ({percent:.0f}%)] | "
            f"Loss: {loss:.6f} | {self._accuracies(scores)}"
            f"Data Time: {self.clock.data_time:.3f}s | Batch Time: {self.clock.batch_time:.3f}s | "
            f"LR: {rate:5f} | logit_scale: {logit_scale:.3f} | Global Batch Size: {plan.global_batch}"
        )
        speed, memory = self.clock.samples_per_second(), peak_memory(self.device) / 2**30
        logger.info(f"Speed: {speed:.1f} samples/s | Peak Memory: {memory:.2f} GiB")
        self._tell_skipped()
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

    def _accuracies(self, scores: Scores) -> str:
        if not self.with_accuracy:
            return ""
        counts = (scores.images_right.item(), scores.texts_right.item())
        images, texts = (100 * count / self.plan.contrasted for count in counts)
        return f"Image2Text Acc: {images:.2f} | Text2Image Acc: {texts:.2f} | "

    def _tell_skipped(self) -> None:
        if self.num_skipped > self._told_skipped:
            logger.warning("%d pictures could not be read so far and were passed over.", self.num_skipped)
            self._told_skipped = self.num_skipped

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

    def end(self) -> None:
        """What the run must not end without saying."""
        if self.num_skipped:
            logger.warning("%d pictures could not be read in this run and were passed over.", self.num_skipped)

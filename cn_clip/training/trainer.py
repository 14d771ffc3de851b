"""The training loop: steps, log lines, validation and checkpoints of one run."""

# B batch, L tokens, R resolution

import contextlib
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cn_clip.clip.model import CLIP
from cn_clip.data.datasets import Loader
from cn_clip.errors import CnClipError
from cn_clip.training import state
from cn_clip.training.logs import logger
from cn_clip.training.loss import batch_accuracy, contrastive_loss, similarity_logits
from cn_clip.training.optim import clamp_logit_scale, learning_rate, set_learning_rate
from cn_clip.training.params import Options
from cn_clip.training.sampling import EpochSampler
from cn_clip.training.state import Position
from cn_clip.training.validation import Split, Validation, validate


@dataclass(frozen=True)
class TrainingData:
    """Batches of (pixels, token ids) in the order of the sampler."""

    loader: Loader[Any]
    sampler: EpochSampler


@dataclass(frozen=True)
class ValidationData:
    """The validation split, its pictures in order, and the pairs of each validation batch."""

    split: Split
    pixels: Loader[Any]
    sampler: EpochSampler


@dataclass(frozen=True)
class StepResult:
    """One update: loss in nats, in-batch accuracies in [0, 1]."""

    loss: Tensor
    image_to_text_acc: Tensor
    text_to_image_acc: Tensor


class Trainer:
    """One run. `train()` goes from `position` to the last step."""

    def __init__(
        self,
        options: Options,
        model: CLIP,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler,
        training: TrainingData,
        validation: ValidationData | None,
        *,
        device: torch.device,
        autocast_dtype: torch.dtype | None,
        checkpoint_dir: Path,
    ) -> None:
        self.options, self.model, self.optimizer, self.scaler = options, model, optimizer, scaler
        self.training, self.validation = training, validation
        self.device, self.autocast_dtype, self.checkpoint_dir = device, autocast_dtype, checkpoint_dir
        self.steps_per_epoch = training.sampler.num_batches
        self.max_steps = options.max_steps or self.steps_per_epoch * options.max_epochs
        self.max_epochs = -(-self.max_steps // self.steps_per_epoch)
        self.position = Position()
        self.validated_step = -1

    def autocast(self) -> AbstractContextManager[object]:
        """Mixed precision for training."""
        if self.autocast_dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.autocast_dtype)

    def arithmetic(self) -> str:
        """Precision in words, for the log."""
        if self.autocast_dtype is None:
            return str(self.model.dtype).removeprefix("torch.")
        return f"mixed {str(self.autocast_dtype).removeprefix('torch.')}"

    def validation_autocast(self) -> AbstractContextManager[object]:
        """Chinese-CLIP validates "amp" runs in float32; only an explicit bf16 asks for less."""
        return self.autocast() if self.options.precision == "bf16" else contextlib.nullcontext()

    def train(self) -> None:
        """Runs the remaining epochs."""
        while self._next_step() < self.max_steps:
            epoch = self.position.epoch
            logger.info("Start epoch %d", epoch + 1)
            self._train_epoch(epoch)
            if self.position.batch == self.steps_per_epoch:
                self.position = Position(epoch + 1, 0, self.position.step)
            if _is_due(epoch + 1, self.options.valid_epoch_interval):
                self.validate(epoch, self.position.step)
            self._save_epoch(epoch)

    def _next_step(self) -> int:
        return self.steps_per_epoch * self.position.epoch + self.position.batch

    def _train_epoch(self, epoch: int) -> None:
        self._set_training_mode()
        self.training.sampler.epoch, self.training.sampler.start = epoch, self.position.batch
        end = time.monotonic()
        for batch, (pixels, tokens) in enumerate(self._batches(), start=self.position.batch):
            step = self.steps_per_epoch * epoch + batch
            if step >= self.max_steps:
                logger.info("Stopping training due to step %d has reached max_steps %d", step, self.max_steps)
                return
            data_time = time.monotonic() - end
            result = self._step(step, pixels, tokens)
            self.position = Position(epoch, batch + 1, step + 1)
            if (step + 1) % self.options.log_interval == 0:
                self._log_step(epoch, batch, result, len(pixels), data_time, time.monotonic() - end)
            end = time.monotonic()
            if _is_due(step + 1, self.options.valid_step_interval):
                self.validate(epoch, step + 1)
                self._set_training_mode()
            if _is_due(step + 1, self.options.save_step_frequency):
                self._save([f"epoch_{epoch + 1}_{step + 1}.pt", state.LATEST], epoch)

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for pixels, tokens, *_ in self.training.loader:
            yield pixels.to(self.device, non_blocking=True), cut_to_longest(tokens).to(self.device, non_blocking=True)

    def _set_training_mode(self) -> None:
        self.model.train()
        if self.options.freeze_vision:
            self.model.visual.eval()  # running statistics of batch normalisation stay as they are

    def _step(self, step: int, pixels_B3RR: Tensor, tokens_BL: Tensor) -> StepResult:
        """One update of the weights."""
        self._set_rate(step)
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            image_BD, text_BD, scale = self.model(pixels_B3RR, tokens_BL, self.options.mask_ratio)
            logits_BB = similarity_logits(image_BD, text_BD, scale)
            loss = contrastive_loss(logits_BB)
        torch.autograd.backward(self.scaler.scale(loss))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        clamp_logit_scale(self.model.logit_scale)
        right = batch_accuracy(logits_BB.detach())
        return StepResult(loss.detach(), *(count / len(logits_BB) for count in right))

    def _set_rate(self, step: int) -> None:
        settings = self.options
        rate_step = min(step, settings.warmup) if settings.skip_scheduler else step
        lr = learning_rate(
            rate_step,
            base_lr=settings.optimizer_setting("lr"),
            warmup=settings.warmup,
            total_steps=self.max_steps,
        )
        set_learning_rate(self.optimizer, lr)

    def _log_step(
        self, epoch: int, batch: int, result: StepResult, batch_size: int, data_time: float, batch_time: float
    ) -> None:
        loss = result.loss.item()
        if not torch.isfinite(result.loss):
            raise CnClipError(
                f"step {self.position.step}: the loss is {loss}, logit_scale {self.model.logit_scale.item():.3f}; "
                "the last checkpoint is intact; lower --lr, raise --warmup, or use --precision fp32 or bf16"
            )
        num_samples, percent = (batch + 1) * batch_size, 100.0 * (batch + 1) / self.steps_per_epoch
        accuracies = ""
        if self.options.report_training_batch_acc:
            accuracies = (
                f"Image2Text Acc: {result.image_to_text_acc.item() * 100:.2f} | "
                f"Text2Image Acc: {result.text_to_image_acc.item() * 100:.2f} | "
            )
        logger.info(
            f"Global Steps: {self.position.step}/{self.max_steps} | "
            f"Train Epoch: {epoch + 1} [{num_samples}/{self.training.sampler.num_padded} ({percent:.0f}%)] | "
            f"Loss: {loss:.6f} | {accuracies}"
            f"Data Time: {data_time:.3f}s | Batch Time: {batch_time:.3f}s | "
            f"LR: {self.optimizer.param_groups[0]['lr']:5f} | "
            f"logit_scale: {self.model.logit_scale.item():.3f} | Global Batch Size: {batch_size}"
        )

    def validate(self, epoch: int, step: int) -> Validation | None:
        """Validates and logs; None without validation data, or when this step has been validated already."""
        data = self.validation
        if data is None or step == self.validated_step:
            return None
        self.validated_step = step
        logger.info("Begin to eval on validation set (epoch %d @ %d steps)...", epoch + 1, step)
        pixels = (batch for _, batch in data.pixels)
        result = validate(self.model, data.split, pixels, data.sampler, self.validation_autocast)
        where = f"(epoch {epoch + 1} @ {step} steps)"
        logger.info(
            f"Validation Result {where} | Valid Loss: {result.loss:.6f} | "
            f"Image2Text Acc: {result.image_to_text_acc * 100:.2f} | "
            f"Text2Image Acc: {result.text_to_image_acc * 100:.2f} | "
            f"logit_scale: {self.model.logit_scale.item():.3f} | Valid Batch Size: {data.sampler.batch_size}"
        )
        logger.info(
            f"Validation Recall {where} | {len(data.split.image_ids)} images, {len(data.split.tokens)} texts | "
            f"Text2Image {result.text_to_image.line()} | Image2Text {result.image_to_text.line()}"
        )
        return result

    def _save_epoch(self, epoch: int) -> None:
        is_last = epoch + 1 == self.max_epochs
        names = [state.LATEST]
        if is_last or _is_due(epoch + 1, self.options.save_epoch_frequency):
            names = [f"epoch{epoch + 1}.pt", *names]
        self._save(names, epoch)

    def _save(self, names: list[str], epoch: int) -> None:
        content = state.checkpoint_content(
            self.model,
            self.optimizer,
            self.scaler,
            name=self.options.name,
            position=self.position,
            num_batches=self.steps_per_epoch,
        )
        paths = [self.checkpoint_dir / name for name in names]
        seconds = state.save(content, paths)
        for path in paths:
            logger.info(
                f"Saved checkpoint {path} (epoch {epoch + 1} @ {self.position.step} steps) "
                f"(writing took {seconds} seconds)"
            )


def cut_to_longest(tokens_BL: Tensor) -> Tensor:
    """Token ids without the columns in which every row has padding."""
    longest = int(tokens_BL.ne(0).any(dim=0).nonzero().max()) + 1
    return tokens_BL[:, :longest]


def _is_due(count: int, interval: int | None) -> bool:
    """Whether `count` is a multiple of a positive interval; None, 0 and -1 mean never."""
    return interval is not None and interval > 0 and count % interval == 0

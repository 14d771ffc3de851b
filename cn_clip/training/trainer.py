"""The training loop: steps, log lines, validation and checkpoints of one run."""

import math
import signal
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cn_clip import ranks
from cn_clip.clip.checkpoint import Checkpoint
from cn_clip.data.datasets import Loader, PairBatch
from cn_clip.data.records import RecordId
from cn_clip.data.splits import Split
from cn_clip.errors import CheckpointError, CnClipError, ConfigError
from cn_clip.training import adapt, distributed, state
from cn_clip.training.logs import logger
from cn_clip.training.loss import Scores
from cn_clip.training.monitor import EarlyStop, Monitor, StuckLoss, peak_memory
from cn_clip.training.optim import (
    clamp_logit_scale,
    decay_groups,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
    set_learning_rate,
)
from cn_clip.training.params import Options
from cn_clip.training.sampling import EpochSampler
from cn_clip.training.state import Extent, Position
from cn_clip.training.step import Batch, Learner, make_batch
from cn_clip.training.validation import Validation, validate


@dataclass(frozen=True)
class TrainingData:
    """Batches of `Pair` in the order of the sampler."""

    loader: Loader[Any]
    sampler: EpochSampler

    def start_epoch(self, epoch: int, batch: int) -> None:
        """The next pass over the loader is this epoch's, from this batch on."""
        self.sampler.epoch, self.sampler.start = epoch, batch


@dataclass(frozen=True)
class ValidationData:
    """The validation split, token ids of its texts, this process's share of its pictures, and the batches to score."""

    split: Split
    tokens: list[list[int]]
    pixels: Loader[Any]
    sampler: EpochSampler


class Trainer:
    """One run. `train()` goes from `position` to the last step."""

    def __init__(
        self,
        options: Options,
        learner: Learner,
        optimizer: torch.optim.Optimizer,
        training: TrainingData,
        validation: ValidationData | None,
        *,
        checkpoint_dir: Path,
        monitor: Monitor | None = None,
    ) -> None:
        """monitor: of rank 0, None on other processes."""
        self.options, self.learner, self.optimizer, self.monitor = options, learner, optimizer, monitor
        self.training, self.validation, self.checkpoint_dir = training, validation, checkpoint_dir
        self.parallel, self.model, self.device = learner.parallel, learner.parallel.model, learner.parallel.device
        self.steps_per_epoch = training.sampler.num_batches // options.accum_freq
        if not self.steps_per_epoch:
            raise ConfigError(
                f"--accum-freq {options.accum_freq}: an epoch has {training.sampler.num_batches} batches, too few for "
                "one update; lower --accum-freq or --batch-size"
            )
        self.max_steps = options.max_steps or self.steps_per_epoch * options.max_epochs
        self.max_epochs = -(-self.max_steps // self.steps_per_epoch)
        self.global_batch = options.batch_size * options.accum_freq * ranks.world_size()
        self.position = Position()
        self.early_stop = EarlyStop()
        self.stuck = StuckLoss(warmup=options.warmup, patience=max(20, 200 // options.log_interval))
        self.validated_step, self.num_skipped, self.reported_skips = -1, 0, 0
        self.unchecked: tuple[int, Tensor, list[tuple[RecordId, RecordId]]] | None = None
        self.signal: int | None = None
        self.clock = Clock()

    @property
    def extent(self) -> Extent:
        """What positions of this run count in."""
        sampler = self.training.sampler
        processes = ranks.world_size()
        return Extent(self.steps_per_epoch, self.global_batch, sampler.num_samples, processes, sampler.num_streams)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on where a checkpoint stands, as far as the reset flags let it; the weights are loaded already.

        Raises CheckpointError when the file has no fitting optimizer state, or counts in another extent.
        """
        saved = checkpoint.extra.get("resume")
        if not self.options.reset_data_offset:
            self.position = state.resume_position(checkpoint, self.extent)
        if not self.options.reset_optimizer:
            self._restore_optimizer(checkpoint)
            logger.info("=> optimizer state is restored from the checkpoint")
        if saved and not self.options.reset_data_offset:
            state.restore_rng(saved["rng"][ranks.rank()])
            self.early_stop.load_state_dict(saved["early_stop"])
        step = self.position.step
        logger.info("=> loaded checkpoint '%s' (epoch %d @ %d steps)", checkpoint.path, checkpoint.epoch, step)

    def _restore_optimizer(self, checkpoint: Checkpoint) -> None:
        if checkpoint.optimizer is None:
            raise CheckpointError(f"{checkpoint.path}: no optimizer state in it; add --reset-optimizer")
        try:
            load_optimizer_state(self.optimizer, decay_groups(self.model), checkpoint.optimizer)
        except (ValueError, KeyError) as error:
            reason = f"optimizer state does not fit ({error}); add --reset-optimizer"
            raise CheckpointError(f"{checkpoint.path}: {reason}") from error
        scaler = checkpoint.extra.get("resume", {}).get("scaler")
        if scaler:
            self.learner.scaler.load_state_dict(scaler)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Runs the remaining epochs. Raises SystemExit after SIGTERM or SIGINT, with a checkpoint written."""
        with self._signals_noted(), state.explained_memory():
            if self.position.step == 0 and self._ever_validates():
                self.validate(-1)
            while self._next_step() < self.max_steps and not self._should_stop():
                self._run_epoch(self.position.epoch)
        if self.num_skipped:
            logger.warning("%d pictures could not be read in this run and were passed over.", self.num_skipped)

    def _run_epoch(self, epoch: int) -> None:
        logger.info("Start epoch %d", epoch + 1)
        self._train_epoch(epoch)
        if self.position.batch == self.steps_per_epoch:
            self.position = Position(epoch + 1, 0, self.position.step)
        if _is_due(epoch + 1, self.options.valid_epoch_interval):
            self.validate(epoch)
        self._save_epoch(epoch)

    def _ever_validates(self) -> bool:
        intervals = (self.options.valid_step_interval, self.options.valid_epoch_interval)
        return any(interval is not None and interval > 0 for interval in intervals)

    def _next_step(self) -> int:
        return self.steps_per_epoch * self.position.epoch + self.position.batch

    def _should_stop(self) -> bool:
        if not self.early_stop.should_stop(self.options.early_stop):
            return False
        best = self.early_stop.best or 0.0
        logger.info(
            f"Stopping training: {self.early_stop.bad} validations without a better mean recall than {best * 100:.2f}"
        )
        return True

    def _train_epoch(self, epoch: int) -> None:
        self._set_training_mode()
        self.clock.restart()
        for batch, batches in enumerate(self._updates(epoch), start=self.position.batch):
            step = self.steps_per_epoch * epoch + batch
            if step >= self.max_steps:
                logger.info("Stopping training due to step %d has reached max_steps %d", step, self.max_steps)
                return
            self.clock.data_ready()
            scores = self._step(step, batches)
            self.position = Position(epoch, batch + 1, step + 1)
            self.clock.step_done(self.global_batch)
            if (step + 1) % self.options.log_interval == 0:
                self._log_step(epoch, batch, scores)
            if _is_due(step + 1, self.options.valid_step_interval):
                self.validate(epoch)
                self._set_training_mode()
            if _is_due(step + 1, self.options.save_step_frequency):
                self._save([f"epoch_{epoch + 1}_{step + 1}.pt", state.LATEST], epoch)
            self._leave_if_asked(epoch)
            if self.early_stop.should_stop(self.options.early_stop):
                return

    def _updates(self, epoch: int) -> Iterator[list[Batch]]:
        """The batches of each update, from where the run stands."""
        number = self.options.accum_freq
        self.training.start_epoch(epoch, self.position.batch * number)
        batches: list[Batch] = []
        for pairs in self.training.loader:
            assert isinstance(pairs, PairBatch)
            self.num_skipped += sum(pairs.num_skipped)
            batches.append(make_batch(pairs, self.device))
            if len(batches) == number:
                yield batches
                batches = []

    def _set_training_mode(self) -> None:
        adapt.set_training_mode(self.model, self.options)

    def _step(self, step: int, batches: list[Batch]) -> Scores:
        """One update of the weights."""
        ids = [pair for batch in batches for pair in batch.ids]
        logger.debug("Step %d: (image id, text id) of the batch: %s", step + 1, _listed(ids))
        set_learning_rate(self.optimizer, self._rate(step))
        self.optimizer.zero_grad(set_to_none=True)
        scores = self.learner.backward(batches)
        self._check_loss()  # of the step before: asking now would make the device wait
        self.unchecked = (step + 1, scores.loss, ids)
        self.learner.scaler.step(self.optimizer)
        self.learner.scaler.update()
        clamp_logit_scale(self.model.logit_scale)
        return scores

    def _rate(self, step: int) -> float:
        settings = self.options
        rate_step = min(step, settings.warmup) if settings.skip_scheduler else step
        base_lr = settings.optimizer_setting("lr")
        return learning_rate(rate_step, base_lr=base_lr, warmup=settings.warmup, total_steps=self.max_steps)

    def _check_loss(self) -> None:
        """Raises CnClipError for a loss that is not finite, before anything is saved or validated."""
        if self.unchecked is None or torch.isfinite(self.unchecked[1]):
            return
        step, loss, ids = self.unchecked
        more = f", ... {len(ids)} in all" if len(ids) > 8 else ""
        raise CnClipError(
            f"step {step}: the loss is {loss.item()}, logit_scale {self.model.logit_scale.item():.3f}, "
            f"(image id, text id) of the batch: {_listed(ids[:8])}{more}; the last checkpoint is intact; "
            "lower --lr, raise --warmup, or use --precision fp32 or bf16"
        )

    # --- signals ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end the run after the step at hand; a second one at once."""
        names = (signal.SIGTERM, signal.SIGINT)
        try:
            before = [signal.signal(name, self._note_signal) for name in names]
        except ValueError:  # not in the main thread
            yield
            return
        try:
            yield
        finally:
            for name, handler in zip(names, before, strict=True):
                signal.signal(name, handler)

    def _note_signal(self, number: int, _frame: object) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def _leave_if_asked(self, epoch: int) -> None:
        if not distributed.any_process(self.signal is not None):
            return
        self._save([state.LATEST], epoch)
        number = self.signal or signal.SIGTERM
        logger.warning("Stopped by %s; the same command goes on from here.", signal.Signals(number).name)
        raise SystemExit(128 + number)

    # --- what people see ----------------------------------------------------------------------------------------------

    def _log_step(self, epoch: int, batch: int, scores: Scores) -> None:
        self._check_loss()
        loss, step = scores.loss.item(), self.position.step
        seen, rate = (batch + 1) * self.global_batch, self.optimizer.param_groups[0]["lr"]
        percent = 100.0 * (batch + 1) / self.steps_per_epoch
        scale = self.model.logit_scale.item()
        accuracies = ""
        if self.options.report_training_batch_acc:
            pairs = self.global_batch // (ranks.world_size() if self.learner.gather == "none" else 1)
            right = (scores.images_right.item() / pairs, scores.texts_right.item() / pairs)
            accuracies = f"Image2Text Acc: {right[0] * 100:.2f} | Text2Image Acc: {right[1] * 100:.2f} | "
        logger.info(
            f"Global Steps: {step}/{self.max_steps} | "
            f"Train Epoch: {epoch + 1} [{seen}/{self.training.sampler.num_padded} ({percent:.0f}%)] | "
            f"Loss: {loss:.6f} | {accuracies}"
            f"Data Time: {self.clock.data_time:.3f}s | Batch Time: {self.clock.batch_time:.3f}s | "
            f"LR: {rate:5f} | logit_scale: {scale:.3f} | Global Batch Size: {self.global_batch}"
        )
        speed, memory = self.clock.samples_per_second(), peak_memory(self.device) / 2**30
        logger.info(f"Speed: {speed:.1f} samples/s | Peak Memory: {memory:.2f} GiB")
        if self.num_skipped > self.reported_skips:
            logger.warning("%d pictures could not be read so far and were passed over.", self.num_skipped)
            self.reported_skips = self.num_skipped
        contrasted = self._contrasted()
        self._record_step(loss, contrasted, {"lr": rate, "logit_scale": scale, "samples_per_second": speed})
        warning = self.stuck.observe(step, loss, contrasted) if contrasted else None
        if warning:
            logger.warning("%s", warning)

    def _contrasted(self) -> int:
        """Pairs among which the loss lets the model choose; 0 where guessing costs something else."""
        if self.options.loss != "clip" or self.options.distillation:
            return 0
        return self.global_batch // (ranks.world_size() if self.learner.gather == "none" else 1)

    def _record_step(self, loss: float, contrasted: int, values: dict[str, float]) -> None:
        if self.monitor is None:
            return
        values = {"loss": loss, **values, "peak_memory_gib": peak_memory(self.device) / 2**30}
        if contrasted > 1:
            values["chance_loss"] = math.log(contrasted)
        self.monitor.step(self.position.step, values)

    def validate(self, epoch: int) -> Validation | None:
        """Validates, logs, and keeps the best; None without validation data, or when this step has been validated."""
        data, step = self.validation, self.position.step
        if data is None or step == self.validated_step:
            return None
        self._check_loss()
        self.validated_step = step
        logger.info("Begin to eval on validation set (epoch %d @ %d steps)...", epoch + 1, step)
        pixels = (batch for _, batch in data.pixels)
        result = validate(self.model, data.split, data.tokens, pixels, data.sampler, self.validation_autocast)
        where = f"(epoch {epoch + 1} @ {step} steps)"
        logger.info(
            f"Validation Result {where} | Valid Loss: {result.loss:.6f} | "
            f"Image2Text Acc: {result.image_to_text_acc * 100:.2f} | "
            f"Text2Image Acc: {result.text_to_image_acc * 100:.2f} | "
            f"logit_scale: {self.model.logit_scale.item():.3f} | Valid Batch Size: {data.sampler.batch_size}"
        )
        logger.info(
            f"Validation Recall {where} | {len(data.split.image_ids)} images, {len(data.tokens)} texts | "
            f"Text2Image {result.text_to_image.line()} | Image2Text {result.image_to_text.line()}"
        )
        if self.monitor is not None:
            self.monitor.validation(step, result.values())
        if self.early_stop.observe(result.mean_recall) and step:
            self._save_best(epoch)
        self.clock.restart()
        return result

    def validation_autocast(self) -> AbstractContextManager[object]:
        """Chinese-CLIP validates "amp" runs in float32; only an explicit bf16 asks for less."""
        return self.learner.autocast() if self.options.precision == "bf16" else nullcontext()

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save_epoch(self, epoch: int) -> None:
        is_last = epoch + 1 == self.max_epochs
        names = [state.LATEST]
        if is_last or _is_due(epoch + 1, self.options.save_epoch_frequency):
            names = [f"epoch{epoch + 1}.pt", *names]
        self._save(names, epoch)

    def _save(self, names: list[str], epoch: int) -> None:
        self._check_loss()
        resume = {
            "extent": asdict(self.extent),
            "scaler": self.learner.scaler.state_dict(),
            "rng": distributed.every_object(state.rng_state()),
            "early_stop": self.early_stop.state_dict(),
        }
        optimizer = optimizer_state(self.optimizer, decay_groups(self.model))
        self._write(names, epoch, optimizer=optimizer, resume=resume)
        if ranks.rank() == 0:
            for path in state.prune(self.checkpoint_dir, self.options.keep_checkpoints):
                logger.info("Deleted old checkpoint %s (--keep-checkpoints %d)", path, self.options.keep_checkpoints)

    def _save_best(self, epoch: int) -> None:
        """The best weights so far, without what only going on would need."""
        self._write([state.BEST], epoch, optimizer=None, resume=None)

    def _write(
        self, names: list[str], epoch: int, *, optimizer: dict[str, Any] | None, resume: dict[str, Any] | None
    ) -> None:
        tensors = adapt.file_names(self.parallel.state_dict())
        bias = tensors.pop("logit_bias", None)  # no model but the one in training has a place for it
        if ranks.rank() != 0:
            return
        if resume is not None and bias is not None:
            resume["logit_bias"] = bias
        lora = adapt.lora_settings(self.model)
        content = state.checkpoint_content(
            tensors,
            optimizer,
            name=self.options.name,
            position=self.position,
            resume=resume,
            lora=None if lora is None else lora.entry(),
        )
        paths = [self.checkpoint_dir / name for name in names]
        seconds = state.save(content, paths)
        for path in paths:
            logger.info(
                f"Saved checkpoint {path} (epoch {epoch + 1} @ {self.position.step} steps) "
                f"(writing took {seconds} seconds)"
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


def _listed(ids: list[tuple[RecordId, RecordId]]) -> str:
    return ", ".join(f"({image_id}, {text_id})" for image_id, text_id in ids)


def _is_due(count: int, interval: int | None) -> bool:
    """Whether `count` is a multiple of a positive interval; None, 0 and -1 mean never."""
    return interval is not None and interval > 0 and count % interval == 0

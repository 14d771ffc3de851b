"""The training loop: steps, log lines, validation and checkpoints of one run."""

import logging
import math
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cn_clip import ranks
from cn_clip.clip.weights import low_rank
from cn_clip.clip.weights.base import Base
from cn_clip.clip.weights.checkpoint import SIGMOID_BIAS, Checkpoint
from cn_clip.data.datasets import Loader, PairBatch
from cn_clip.data.records import RecordId
from cn_clip.errors import CheckpointError, CnClipError, ConfigError, reading
from cn_clip.language import both
from cn_clip.progress import Step, counted, progress
from cn_clip.settings import flag
from cn_clip.stopping import StopRequest, StopWaiting
from cn_clip.training import adapt, distributed, saving, state
from cn_clip.training.advice import Situation, verdict, what_to_try
from cn_clip.training.inputs import TrainingData, ValidationData
from cn_clip.training.log_lines import Plan, Report
from cn_clip.training.logger import logger
from cn_clip.training.loss import Scores
from cn_clip.training.params import KEPT_CHECKPOINTS, Options, is_due
from cn_clip.training.scheduler import (
    assign_learning_rate,
    clamp_logit_scale,
    decay_groups,
    learning_rate,
    load_optimizer_state,
    optimizer_state,
)
from cn_clip.training.state import Extent, Position, Start
from cn_clip.training.step import Batch, Learner, joined, make_batch
from cn_clip.training.stopping import EarlyStop
from cn_clip.training.validation import Validation, validate


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
        base: Base | None = None,
    ) -> None:
        """base: of the adapters, if they are all that the files of the run hold.

        Raises ConfigError when an epoch has too few batches for one update.
        """
        self.options, self.learner, self.optimizer = options, learner, optimizer
        self.training, self.validation, self.checkpoint_dir = training, validation, checkpoint_dir
        self.base = base
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
        self.start: Start | None = None
        self.early_stop = EarlyStop()
        self.groups = decay_groups(self.model)  # once: FSDP shows other parameters while it holds a layer together
        self.validated_step = -1
        self.has_new_best = False  # the weights as they are had the best validation, and no file has them yet
        self.closed = True  # whether the epoch that was begun last has been validated and saved
        self.unchecked: tuple[int, Later, list[tuple[RecordId, RecordId]]] | None = None
        self.stop_request = StopRequest()
        self.bar = Step("")
        self.kept = KEPT_CHECKPOINTS if options.keep_checkpoints is None else options.keep_checkpoints
        # Of a run that kept all, as those of Chinese-CLIP do: deleted only if the user says how many to keep.
        self.is_told_to_delete = options.keep_checkpoints is not None or options.overwrite
        self.spared = frozenset(() if self.is_told_to_delete else state.epoch_files(checkpoint_dir))
        self.writer = saving.Writer(in_background=saving.is_worth_a_copy(self.device))
        plan = Plan(
            max_steps=self.max_steps,
            steps_per_epoch=self.steps_per_epoch,
            num_padded=training.sampler.num_padded,
            global_batch=self.global_batch,
            contrasted=options.num_contrasted,
            has_chance_loss=options.loss == "clip" and not options.distillation,
        )
        with_accuracy = options.report_training_batch_acc
        self.report = Report(plan, self.device, options.warmup, options.log_interval, with_accuracy)

    @property
    def extent(self) -> Extent:
        """What positions of this run count in."""
        sampler = self.training.sampler
        return Extent(
            num_batches=self.steps_per_epoch,
            batch_size=sampler.batch_size,
            global_batch=self.global_batch,
            num_samples=sampler.num_samples,
            world_size=ranks.world_size(),
            num_streams=sampler.num_streams,
            seed=self.options.seed,
        )

    @property
    def situation(self) -> Situation:
        """What advice on the settings depends on."""
        options = self.options
        moves = not options.freeze_bn and not options.freeze_vision and not adapt.lora_settings(self.model)
        return Situation(
            num_pairs=self.training.sampler.num_samples,
            global_batch=self.global_batch,
            max_steps=self.max_steps,
            # A run that goes on with its optimizer may have begun from scratch.
            is_pretrained=bool(
                options.init or (options.resume and options.reset_optimizer) or options.clip_weight_path
            ),
            moves_statistics=moves and adapt.have_learned(adapt.norms(self.model)),
        )

    def restore(self, checkpoint: Checkpoint, start: Start) -> None:
        """Takes from a checkpoint what `start` says; the weights are loaded already.

        Raises CheckpointError when the file has no fitting optimizer state, or counts in another extent.
        """
        self.start = start
        saved = state.resume_entry(checkpoint)
        if start.with_position:
            self.position = state.resume_position(checkpoint, self.extent)
        if start.with_optimizer:
            if checkpoint.optimizer is None:
                raise CheckpointError(
                    "no optimizer state in it; to begin with its weights, give it as --init, or add --reset-optimizer",
                    at=checkpoint.path,
                )
            what = "optimizer state does not fit"
            with reading(checkpoint.path, CheckpointError, what=what, step="add --reset-optimizer"):
                load_optimizer_state(self.optimizer, self.groups, checkpoint.optimizer)
                if scaler := saved.get("scaler"):
                    self.learner.scaler.load_state_dict(scaler)
            logger.info("=> optimizer state is restored from the checkpoint")
        if saved and start.with_position:
            what = "the state of its run does not fit"
            with reading(checkpoint.path, CheckpointError, what=what, step="add --reset-data-offset"):
                state.restore_rng(saved["rng"][ranks.rank()], self.device)
                self.early_stop.load_state_dict(saved["early_stop"])
                self.validated_step, self.closed = saved["validated_step"], saved["closed"]
                kept = saved.get("kept", {})
                if start.is_own and not self.is_told_to_delete and kept.get("number") == self.kept:
                    self.spared = frozenset(self.checkpoint_dir / name for name in kept["spared"])
        step = self.position.step
        logger.info("=> loaded checkpoint '%s' (epoch %d @ %d steps)", checkpoint.path, checkpoint.epoch, step)

    # --- the loop -----------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Runs the remaining epochs. Raises SystemExit after SIGTERM or SIGINT, with a checkpoint written."""
        if ranks.rank() == 0:
            self._tell_disk()
        what, unit = both("训练", "training"), both("步", "steps")
        with (
            self.stop_request.noted(),
            self.writer,
            progress(self.max_steps, unit, what, done=self.position.step) as self.bar,
        ):
            try:
                if self.position.step == 0 and self.options.validates:
                    self.validate(-1)
                    self._leave_if_asked()
                while (
                    not self.closed or self.steps_per_epoch * self.position.epoch + self.position.batch < self.max_steps
                ):
                    if self.early_stop.should_stop(self.options.early_stop):
                        bad, best = self.early_stop.bad, self.early_stop.best or 0.0
                        logger.info(
                            f"Stopping training: {bad} validations without a better mean recall than {best * 100:.2f}"
                        )
                        break
                    epoch = self.position.epoch
                    logger.info("Start epoch %d", epoch + 1)
                    self._train_epoch(epoch)
                    if self.position.batch == self.steps_per_epoch:
                        self.position = Position(epoch + 1, 0, self.position.step)
                    is_end = self.position.step >= self.max_steps and self.options.validates
                    if is_end or is_due(epoch + 1, self.options.valid_epoch_interval):
                        self.validate(epoch)
                    self.closed = True
                    self._save_epoch(epoch)
                    self._leave_if_asked(is_saved=True)
            except StopWaiting:
                self._leave_if_asked()
            distributed.fail_together(self.writer.wait())
        self.report.end()
        if (outcome := self.early_stop.outcome) is not None:
            self.report.outcome(outcome, verdict(outcome, what_to_try(self.options, self.situation)))

    def _train_epoch(self, epoch: int) -> None:
        self._set_training_mode()
        self.report.clock.restart()
        for batch, batches in enumerate(self._updates(epoch), start=self.position.batch):
            step = self.steps_per_epoch * epoch + batch
            if step >= self.max_steps:
                logger.info("Stopping training due to step %d has reached max_steps %d", step, self.max_steps)
                return
            scores = self._step(step, batches)
            self.position, self.closed = Position(epoch, batch + 1, step + 1), False
            self.report.clock.step_done(self.global_batch)
            self.bar.advance()
            if is_due(step + 1, self.options.log_interval):
                self._check_loss()
                rate, scale = self.optimizer.param_groups[0]["lr"], self.model.logit_scale.item()
                self.report.step(self.position, scores, rate=rate, logit_scale=scale)
            if is_due(step + 1, self.options.valid_step_interval):
                self.validate(epoch)
                self._set_training_mode()
            is_closed_next = batch + 1 == self.steps_per_epoch or step + 1 == self.max_steps
            if is_due(step + 1, self.options.save_step_frequency):
                self._save([f"epoch_{epoch + 1}_{step + 1}.pt", state.LATEST])
            elif self.has_new_best and not is_closed_next:
                self._write([], None)
            if not is_closed_next:
                self._leave_if_asked()
            if self.early_stop.should_stop(self.options.early_stop):
                return

    def _updates(self, epoch: int) -> Iterator[list[Batch]]:
        """The batches of each update, from the position of the run on."""

        def batches() -> Iterator[Batch]:
            for pairs in self._awaited(self.training.loader):
                assert isinstance(pairs, PairBatch)
                self.report.num_skipped += sum(pairs.num_skipped)
                yield make_batch(pairs, self.device, with_keys=self.learner.multi_positive)

        self.training.start_epoch(epoch, self.position.batch * self.options.accum_freq)
        return joined(batches(), self.options.accum_freq)

    def _awaited(self, loader: Loader[Any]) -> Iterator[Any]:
        """The batches of a loader; a signal ends the wait for one, which a disk that hangs would make endless.

        Not with several processes, which must leave at the same step: the others wait for this one, and torchrun ends
        them all after 30 seconds.
        """
        batches = iter(loader)
        waiting = self.stop_request.waiting if ranks.world_size() == 1 else nullcontext
        while True:
            with self.report.clock.waiting(), waiting():
                batch = next(batches, None)
            if batch is None:
                return
            yield batch

    def _set_training_mode(self) -> None:
        adapt.set_training_mode(self.model, self.options)

    def _step(self, step: int, batches: list[Batch]) -> Scores:
        """One update of the weights."""
        ids = [pair for batch in batches for pair in batch.ids]
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("Step %d: (image id, text id) of the batch: %s", step + 1, _listed(ids))
        if self.options.compile:
            self.report.compiling("training")
        assign_learning_rate(self.optimizer, self._rate(step))
        self.optimizer.zero_grad(set_to_none=True)
        scores = self.learner.backward(batches)
        self._check_loss()  # of the step before: asking now would make the device wait
        self.unchecked = (step + 1, Later(scores.loss), ids)
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
        if self.unchecked is None:
            return
        step, later, ids = self.unchecked
        loss = later.item()
        if math.isfinite(loss):
            self.bar.tell(f"loss {loss:.3f}")
            return
        more = f", ... {len(ids)} in all" if len(ids) > 8 else ""
        raise CnClipError(
            f"step {step}: the loss is {loss}, logit_scale {self.model.logit_scale.item():.3f}, "
            f"(image id, text id) of the batch: {_listed(ids[:8])}{more}; the last checkpoint is intact; "
            "lower --lr, raise --warmup, or use --precision fp32 or bf16"
        )

    # --- stopping, validating ----------------------------------------------------------------------------------------

    def _leave_if_asked(self, *, is_saved: bool = False) -> None:
        """Ends the run when a signal asks for it, with a checkpoint as soon as a step is done.

        Raises the CheckpointError of a file that could not be written meanwhile, in every process.
        """
        if not distributed.any_process(self.stop_request.number is not None or self.writer.error is not None):
            return
        distributed.fail_together(self.writer.error)
        if self.position.step and not is_saved:
            self._save([state.LATEST])
        distributed.fail_together(self.writer.wait())
        number = self.stop_request.number or signal.SIGTERM
        names = [name for name in ("reset_optimizer", "reset_data_offset", "overwrite") if getattr(self.options, name)]
        left_out = [f"--resume {self.options.resume}"] if self.options.resume is not None else []
        left_out += map(flag, names)
        without = f" without {' '.join(left_out)}" if left_out else ""
        how = f"the same command{without} goes on from here"
        logger.warning("Stopped by %s; %s.", signal.Signals(number).name, how)
        raise SystemExit(128 + number)

    def validate(self, epoch: int) -> Validation | None:
        """Validates, logs, and notes a best result, whose weights the next `_write` keeps.

        Returns None without validation data, or when this step has been validated.
        """
        data, step = self.validation, self.position.step
        if data is None or step == self.validated_step:
            return None
        self._check_loss()
        logger.info("Begin to eval on validation set (epoch %d @ %d steps)...", epoch + 1, step)
        if self.options.compile:
            self.report.compiling("validation")
        self.parallel.share_statistics()
        unit, what = both("批", "batches"), both("验证", "validating")
        pixels = (batch for _, batch in counted(self._awaited(data.pixels), unit, what, total=len(data.pixels)))
        result = validate(self.model, data.split, data.tokens, pixels, data.sampler, self.validation_autocast)
        self.validated_step = step
        self.report.validation(
            f"(epoch {epoch + 1} @ {step} steps)",
            result,
            step=step,
            logit_scale=self.model.logit_scale.item(),
            batch_size=data.sampler.batch_size,
            sizes=(len(data.split.image_ids), len(data.tokens)),
        )
        if self.early_stop.observe(result.mean_recall, step) and step:
            self.has_new_best = True
        self.report.clock.restart()
        return result

    def validation_autocast(self) -> AbstractContextManager[object]:
        """The arithmetic of the training or float32, as --valid-precision says."""
        return self.learner.autocast() if self.options.validates_as_trained(self.device.type) else nullcontext()

    # --- checkpoints --------------------------------------------------------------------------------------------------

    def _save_epoch(self, epoch: int) -> None:
        is_done = self.position.batch == 0 or self.position.step == self.max_steps  # not when stopped early
        is_last = epoch + 1 == self.max_epochs
        names = [state.LATEST]
        if is_done and (is_last or is_due(epoch + 1, self.options.save_epoch_frequency)):
            names = [f"epoch{epoch + 1}.pt", *names]
        self._save(names)

    def _save(self, names: list[str]) -> None:
        self._check_loss()
        resume = {
            "extent": asdict(self.extent),
            "scaler": self.learner.scaler.state_dict(),
            "rng": distributed.every_object(state.rng_state(self.device)),
            "early_stop": self.early_stop.state_dict(),
            "validated_step": self.validated_step,
            "closed": self.closed,
            "kept": {"number": self.kept, "spared": sorted(path.name for path in self.spared)},
            "origin": None if self.start is None else self.start.origin,
            "freeze_bn": self.options.freeze_bn,
        }
        self._write(names, resume)

    def _write(self, names: list[str], resume: dict[str, Any] | None) -> None:
        """Begins the files of `names`, and that of the best weights if they are new, once those before are whole.

        The first process writes; every process must ask. Raises the CheckpointError of a file that could not be
        written, in every process.
        """
        distributed.fail_together(self.writer.wait())
        self.parallel.share_statistics()
        tensors = adapt.file_names(self.parallel.state_dict())
        bias = tensors.pop(SIGMOID_BIAS, None)  # no model but the one in training has it
        if self.base is not None:
            tensors = low_rank.trained(tensors)
        optimizer = None if resume is None else optimizer_state(self.optimizer, self.groups)
        if ranks.rank() == 0:
            if resume is not None and bias is not None:
                resume[SIGMOID_BIAS] = bias
            files = [(names, self._content(tensors, optimizer, resume))] if names else []
            if self.has_new_best:  # first: a run that goes on from the other file takes the best for written
                files.insert(0, ([state.BEST], self._content(tensors, None, None)))
            self.writer.write(files, self._save_and_prune)
        self.has_new_best = False
        distributed.fail_together(self.writer.error)  # no process leaves before the one that writes

    def _content(
        self, tensors: dict[str, Tensor], optimizer: dict[str, Any] | None, resume: dict[str, Any] | None
    ) -> dict[str, Any]:
        lora = adapt.lora_settings(self.model)
        return state.checkpoint_content(
            tensors,
            optimizer,
            name=self.options.name,
            position=self.position,
            context_length=self.options.context_length,
            matryoshka=self.options.dimensions,
            resume=resume,
            lora=None if lora is None else lora.entry(),
            base=None if self.base is None else self.base.entry(),
        )

    def _save_and_prune(self, files: list[tuple[list[str], dict[str, Any]]]) -> None:
        """Writes each content under its names; old files go once the new ones are whole."""
        for names, content in files:
            state.save(content, [self.checkpoint_dir / name for name in names])
        for path in state.prune(self.checkpoint_dir, self.kept, spared=self.spared):
            logger.info("Deleted old checkpoint %s (--keep-checkpoints %d)", path, self.kept)

    def disk_plan(self) -> state.DiskPlan:
        """What the checkpoints of the rest of this run take on the disk."""
        options, epochs = self.options, self.max_epochs - self.position.epoch
        num_files = -(-epochs // options.save_epoch_frequency) if options.save_epoch_frequency > 0 else 1
        if options.save_step_frequency > 0:
            num_files += (self.max_steps - self.position.step) // options.save_step_frequency
        tensors = adapt.file_names(self.model.state_dict())
        if self.base is not None:
            tensors = low_rank.trained(tensors)
        weights = sum(value.numel() * value.element_size() for value in tensors.values())
        trained = (parameter for group in self.groups for parameter in group)
        moments = 2 * sum(parameter.numel() * parameter.element_size() for parameter in trained)
        num_kept = 1 + (num_files if self.kept < 0 else min(self.kept, num_files))
        return state.DiskPlan(weights + moments, num_kept, weights if options.validates else 0)

    def _tell_disk(self) -> None:
        """Says what the checkpoints will take, and how many of earlier runs stay."""
        plan = self.disk_plan()
        logger.info("Checkpoints: %s", plan.line(self.checkpoint_dir, self.kept))
        if not plan.fits(self.checkpoint_dir, self.kept, spared=self.spared):
            logger.warning(
                "The disk may fill up, and the run would then stop: free some space, or lower --keep-checkpoints"
            )
        if self.spared:
            words = "%d checkpoints of runs before are kept; --keep-checkpoints %d would delete the old ones"
            logger.info(words, len(self.spared), self.kept)


class Later:
    """A number of the device, fetched without waiting for it until it is asked for."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._event = value, None
        if value.device.type == "cuda":
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._event.record()

    def item(self) -> float:
        """The number, once the device has come that far."""
        if self._event is not None:
            self._event.synchronize()
        return self._value.item()


def _listed(ids: list[tuple[RecordId, RecordId]]) -> str:
    return ", ".join(f"({image_id}, {text_id})" for image_id, text_id in ids)

"""One epoch and one validation under Chinese-CLIP's names, for programs that bring their own loop over epochs.

The gradients come from `step` and the log lines from `log_lines`, as those of `cn-clip train`, whose loop is `trainer`.
"""

# B batch, N rows of all processes, D embedding

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cn_clip import drop_in, ranks
from cn_clip.clip.transfers import on_device
from cn_clip.errors import ConfigError
from cn_clip.training import saving, state
from cn_clip.training.distributed import Gather, Parallel, gather_rows
from cn_clip.training.log_lines import Clock, Plan, Report, validation_line
from cn_clip.training.logger import logger
from cn_clip.training.loss import Objective, Pairs, contrastive_scores, feature_distillation_loss
from cn_clip.training.params import is_due
from cn_clip.training.scheduler import clamp_logit_scale
from cn_clip.training.state import Position
from cn_clip.training.step import Batch, Learner, Teacher, cut_to_longest, joined

__getattr__ = drop_in.names(__name__)


def is_master(args: Any) -> bool:
    """Whether this is the first process, which logs and saves."""
    return bool(args.rank == 0)


def torch_version_str_compare_lessequal(version1: str, version2: str) -> bool:
    """Whether a version X.Y.Z, or X.Y.Z+BUILD, is not above another; raises AssertionError for other forms."""
    parts = [[int(part) for part in version.split("+")[0].split(".")] for version in (version1, version2)]
    for version, numbers in zip((version1, version2), parts, strict=True):
        if len(numbers) != 3:
            raise AssertionError(f"expected a version such as 2.6.0, got {version!r}")
    return parts[0] <= parts[1]


def cosineSimilarityLoss(feature1: Tensor, feature2: Tensor) -> Tensor:  # noqa: N802
    """`feature_distillation_loss` of a teacher's rows and a student's."""
    return feature_distillation_loss(feature1, feature2)


def freeze_vision_bn(args: Any, model: nn.Module) -> None:
    """Holds the statistics of batch normalisation in the picture tower of a ResNet, named by `args.vision_model`."""
    if "RN" in args.vision_model:
        visual: Any = _unwrapped(model).visual
        for module in visual.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()


def get_loss(
    model: nn.Module,
    images: Tensor,
    texts: Tensor,
    loss_img: Callable[[Tensor, Tensor], Tensor],
    loss_txt: Callable[[Tensor, Tensor], Tensor],
    args: Any,
    accum_image_features: list[Tensor] | None = None,
    accum_text_features: list[Tensor] | None = None,
    accum_idx: int = -1,
    teacher_model: Any = None,
    teacher_accum_image_features: list[Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """(loss, {"i2t", "t2i"} accuracies or None) of a batch that may be one of several taken as one.

    loss_img, loss_txt: of logits (N, N) and the own column of each row. With `args.accum_freq` above 1 the features of
    all batches are given, those of batch `accum_idx` are computed again. Of `args` also: mask_ratio, aggregate,
    gather_with_grad, report_training_batch_acc, distillation, kd_loss_weight.
    """
    image_BD, text_BD, scale = model(images, texts, args.mask_ratio)
    taught = [_teacher(teacher_model).features(images)] if args.distillation else []
    if args.accum_freq > 1:
        if not accum_image_features or not accum_text_features or accum_idx == -1:
            raise AssertionError("args.accum_freq is above 1; expected the features of all batches, and accum_idx")
        image_BD = _with(accum_image_features, accum_idx, image_BD)
        text_BD = _with(accum_text_features, accum_idx, text_BD)
        taught = [_with(teacher_accum_image_features or taught, accum_idx, rows) for rows in taught]
    mode = _gather_mode(args)
    image_ND, text_ND = gather_rows(image_BD, mode), gather_rows(text_BD, mode)
    logits_NN = scale.mean() * image_ND @ text_ND.t()
    own_N = torch.arange(len(logits_NN), device=logits_NN.device)
    loss = (loss_img(logits_NN, own_N) + loss_txt(logits_NN.t(), own_N)) / 2
    for rows in taught:
        loss = loss + args.kd_loss_weight * cosineSimilarityLoss(gather_rows(rows, mode), image_ND)
    if not args.report_training_batch_acc:
        return loss, None
    shares = [(logits.argmax(dim=-1) == own_N).float().mean() for logits in (logits_NN, logits_NN.t())]
    return loss, dict(zip(("i2t", "t2i"), shares, strict=True))


def _with(rows: list[Tensor], position: int, own: Tensor) -> Tensor:
    return torch.cat([*rows[:position], own, *rows[position + 1 :]])


def _gather_mode(args: Any) -> Gather:
    if not args.aggregate:
        return "none"
    return "gradients" if args.gather_with_grad else "values"


def _teacher(teacher_model: Any) -> Teacher:
    return Teacher(_unwrapped(teacher_model).get_feature, resolution=None)


def _unwrapped(model: Any) -> Any:
    inner = getattr(model, "module", None)
    return inner if isinstance(inner, nn.Module) else model


class _Given(Parallel):
    """A model as the caller has wrapped it: DistributedDataParallel, or not at all."""

    def __init__(self, model: nn.Module) -> None:
        self.module, self.model, self.loose, self.fsdp = model, _unwrapped(model), [], False
        self.device = next(model.parameters()).device

    @property
    def logit_bias(self) -> nn.Parameter | None:
        return getattr(self.model, "logit_bias", None)

    @contextmanager
    def accumulating(self, more_to_come: bool) -> Iterator[None]:
        """Passes before the last one go past the wrapper: `no_sync` fails with a static graph, which Chinese-CLIP asks
        for with --grad-checkpointing."""
        wrapped = self.module
        self.module = self.model if more_to_come else wrapped
        try:
            yield
        finally:
            self.module = wrapped


def train(
    model: nn.Module,
    data: dict[str, Any],
    epoch: int,
    optimizer: torch.optim.Optimizer,
    scaler: Any,
    scheduler: Callable[[int], object],
    args: Any,
    global_trained_steps: int,
    teacher_model: Any = None,
) -> int:
    """Trains for one epoch, counted from 0, or until `args.max_steps`; returns the number of updates.

    data: of `training.data.get_data`. scaler: a GradScaler, or None. scheduler: of `cosine_lr`, asked before each
    update. Validates, logs and saves at the steps that `args` name. Steps are counted from the epoch, not from
    `global_trained_steps`. Raises ConfigError when torch.distributed and WORLD_SIZE do not agree.
    """
    dataloader, sampler = data["train"].dataloader, data["train"].sampler
    learner = _learner(model, scaler, args, teacher_model)
    batch_size = getattr(dataloader, "batch_size", None) or dataloader.num_samples // (
        dataloader.num_batches * ranks.world_size()
    )
    report = _report(learner, dataloader, batch_size, args)
    steps_per_epoch = dataloader.num_batches // args.accum_freq
    if sampler is not None:
        sampler.set_epoch(epoch)
    _set_training_mode(model, args)
    trained = 0
    report.clock.restart()
    batches_on_device = _batches(dataloader, learner.parallel.device, report.clock)
    for number, batches in enumerate(joined(batches_on_device, args.accum_freq)):
        step = steps_per_epoch * epoch + number
        if step >= args.max_steps:
            logger.info("Stopping training due to step %d has reached max_steps %d", step, args.max_steps)
            break
        scheduler(step)
        optimizer.zero_grad()
        scores = learner.backward(batches)
        learner.scaler.step(optimizer)
        learner.scaler.update()
        clamp_logit_scale(learner.parallel.model.logit_scale)
        trained += 1
        report.clock.step_done(report.plan.global_batch)
        if is_master(args) and is_due(step + 1, args.log_interval):
            rate, scale = optimizer.param_groups[0]["lr"], learner.parallel.model.logit_scale.item()
            report.step(Position(epoch, number + 1, step + 1), scores, rate=rate, logit_scale=scale)
        if args.val_data is not None and is_due(step + 1, args.valid_step_interval):
            evaluate(model, data, epoch, args, step + 1)
            _set_training_mode(model, args)
            report.clock.restart()
        if args.should_save and is_due(step + 1, args.save_step_frequency):
            _save(model, optimizer, epoch, step + 1, args)
    return trained


def _set_training_mode(model: nn.Module, args: Any) -> None:
    model.train()
    if args.freeze_vision:
        freeze_vision_bn(args, model)


def _learner(model: nn.Module, scaler: Any, args: Any, teacher_model: Any) -> Learner:
    if dist.is_initialized() and dist.get_world_size() != ranks.world_size():
        raise ConfigError(
            f"torch.distributed has {dist.get_world_size()} processes, WORLD_SIZE says {ranks.world_size()}; start the "
            "program with torchrun, or set RANK and WORLD_SIZE as it does"
        )
    parallel = _Given(model)
    dtype = ranks.autocast_dtype("amp", parallel.device) if args.precision == "amp" else None
    return Learner(
        parallel,
        Objective("clip", args.kd_loss_weight if args.distillation else 0.0),
        scaler or torch.amp.GradScaler(parallel.device.type, enabled=False),
        nullcontext if dtype is None else partial(torch.autocast, parallel.device.type, dtype=dtype),
        gather=_gather_mode(args),
        mask_ratio=args.mask_ratio,
        teacher=_teacher(teacher_model) if args.distillation else None,
    )


def _report(learner: Learner, dataloader: Any, batch_size: int, args: Any) -> Report:
    global_batch = batch_size * args.accum_freq * ranks.world_size()
    plan = Plan(
        max_steps=args.max_steps,
        steps_per_epoch=dataloader.num_batches // args.accum_freq,
        num_padded=dataloader.num_samples,
        global_batch=global_batch,
        contrasted=global_batch // (ranks.world_size() if learner.gather == "none" else 1),
        has_chance_loss=not args.distillation,
    )
    warmup, with_accuracy = getattr(args, "warmup", 0), args.report_training_batch_acc
    return Report(plan, learner.parallel.device, warmup, args.log_interval, with_accuracy)


def _batches(dataloader: Any, device: torch.device, clock: Clock) -> Iterator[Batch]:
    with clock.waiting():
        loaded = islice(dataloader, dataloader.num_batches)
    while True:
        with clock.waiting():
            batch = next(loaded, None)
        if batch is None:
            return
        images, texts, *_ = batch
        pixels, tokens = on_device([images, cut_to_longest(texts)], device)
        yield Batch(pixels, tokens, [(number, number) for number in range(len(images))], None)


def _save(model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, step: int, args: Any) -> None:
    """Writes epoch_EPOCH_STEP.pt and epoch_latest.pt into `args.checkpoint_path`; raises CheckpointError."""
    content = {
        "epoch": epoch + 1,
        "step": step,
        "name": args.name,
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    content = saving.in_host_memory(content)  # for readers without this device
    state.save(content, [Path(args.checkpoint_path) / name for name in (f"epoch_{epoch + 1}_{step}.pt", state.LATEST)])


@torch.no_grad()
def evaluate(model: nn.Module, data: dict[str, Any], epoch: int, args: Any, steps: int) -> None:
    """Logs the mean loss and accuracy of the batches of `data["val"]`; leaves the model in evaluation mode."""
    logger.info("Begin to eval on validation set (epoch %d @ %d steps)...", epoch + 1, steps)
    model.eval()
    device, dataloader = next(model.parameters()).device, data["val"].dataloader
    totals, batch_size = torch.zeros(4, dtype=torch.float32, device=device), 0
    for images, texts, *_ in islice(dataloader, dataloader.num_batches):
        image_BD, text_BD, scale = model(images.to(device), texts.to(device))
        scores, batch_size = contrastive_scores(Pairs(image_BD, text_BD, scale.mean())), len(images)
        totals += torch.stack(
            [scores.loss * batch_size, scores.images_right, scores.texts_right, torch.tensor(batch_size, device=device)]
        )
    if dist.is_initialized():
        dist.all_reduce(totals)
    loss, image_to_text_acc, text_to_image_acc = (totals[:3] / totals[3]).tolist()
    where, scale = f"(epoch {epoch + 1} @ {steps} steps)", _unwrapped(model).logit_scale.item()
    in_batches = (loss, image_to_text_acc, text_to_image_acc)
    logger.info(validation_line(where, *in_batches, logit_scale=scale, batch_size=batch_size))

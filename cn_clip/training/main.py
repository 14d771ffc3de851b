"""Trains or fine-tunes: `python cn_clip/training/main.py --train-data=…/lmdb/train …` or `cn-clip train …`."""

import contextlib
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cn_clip import command, drop_in, ranks, settings, terminal, zoo
from cn_clip.errors import CheckpointError, CnClipError, ConfigError, OutputError
from cn_clip.files import alone
from cn_clip.training.params import RULES, Options

if TYPE_CHECKING:
    import torch

    from cn_clip.clip.model import CLIP
    from cn_clip.clip.weights.checkpoint import Checkpoint
    from cn_clip.training.distill import Teacher
    from cn_clip.training.loss import Objective
    from cn_clip.training.monitor import Monitor
    from cn_clip.training.state import Start
    from cn_clip.training.trainer import Trainer

__getattr__ = drop_in.names(__name__)

LOCK = ".lock"


def run(options: Options) -> None:
    """Trains to the last step; raises CnClipError with the reason when it cannot."""

    from cn_clip.training import distributed, state

    # Python 3.14 starts workers by a server: it imports PyTorch once, else every worker would, at every epoch.
    multiprocessing.set_forkserver_preload(["__main__", "cn_clip.training.inputs"])
    ranks.use_threads(options.num_threads)
    device = ranks.own_device(options.device)
    folder = Path(options.logs) / options.name
    started = time.strftime("%Y-%m-%d-%H-%M-%S", time.gmtime())
    with contextlib.ExitStack() as stack:
        refused: CnClipError | None = None
        try:
            stack.enter_context(run_folder(options, folder, started))
        except CnClipError as error:
            refused = error
        stack.enter_context(distributed.process_group(device))
        distributed.together(partial(_raise, refused))  # none waits for one that cannot begin
        stack.enter_context(state.explained_memory())
        train_in_group(options, device, folder, started)


@contextlib.contextmanager
def run_folder(options: Options, folder: Path, started: str) -> Iterator[None]:
    """The folder of a run, made, for this run alone, and its log; of several processes the first takes it for all.

    Raises OutputError when it cannot be written, ConfigError when another run is at it.
    """
    from cn_clip.training import logs, state

    with contextlib.ExitStack() as stack:
        try:
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            if ranks.rank() == 0:
                busy = f"--name {options.name}: another process is training in {folder}"
                stack.enter_context(alone(folder / LOCK, busy))
                state.clear_leftovers(folder / "checkpoints")
            log = folder / f"out_{started}.log"
            stack.enter_context(logs.logging_to(log, rank=ranks.rank(), debug=options.debug))
        except OSError as error:
            raise OutputError(
                f"--logs {options.logs}: the folder {folder} cannot be made or written ({error.strerror}); "
                "choose another --logs"
            ) from error
        yield


def _raise(error: CnClipError | None) -> None:
    if error is not None:
        raise error


def train_in_group(options: Options, device: "torch.device", folder: Path, started: str) -> None:
    """Builds and trains. A function of its own, so that nothing of it outlives the process group."""
    from cn_clip.training import logs

    checkpoint_dir = folder / "checkpoints"
    trainer = build_trainer(options, device, checkpoint_dir)
    options = trainer.options
    if options.overwrite:
        set_aside_old_run(folder, trainer.start)
    values = {**asdict(options), "checkpoint_path": str(checkpoint_dir), "device": device}
    values |= {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
    values |= {name: options.optimizer_setting(name) for name in ("lr", "beta1", "beta2", "eps")}
    values |= {"world_size": ranks.world_size()}
    if ranks.rank() == 0:
        logs.log_params(values, folder / f"params_{started}.txt")
    logs.logger.info("Use device: %s for training, precision %s", device, arithmetic(options, trainer))
    goes_on = trainer.start is not None and trainer.start.is_own
    with monitor(options, folder, start_step=trainer.position.step, goes_on=goes_on) as trainer.report.monitor:
        trainer.train()


def set_aside_old_run(folder: Path, start: "Start | None") -> None:
    """Deletes the checkpoints of the run that --overwrite replaces, but for the one that the new run begins from.

    Every process must ask.
    """
    from cn_clip.training import distributed, state
    from cn_clip.training.logs import logger

    if ranks.rank() == 0:
        for path in state.discard(folder / "checkpoints", kept=None if start is None else start.path):
            logger.info("Deleted %s of the run before (--overwrite)", path)
    distributed.wait_for_all()


def build_trainer(options: Options, device: "torch.device", checkpoint_dir: Path) -> "Trainer":
    """Model, data, optimizer and loop of a run, at the place where --resume, its latest checkpoint or --init begins."""
    import torch

    from cn_clip.training import distributed, inputs
    from cn_clip.training.optim import build_optimizer
    from cn_clip.training.step import Learner
    from cn_clip.training.trainer import Trainer

    torch.manual_seed(options.seed)
    model = build_model(options, device)
    start, checkpoint = load_start(options, model, checkpoint_dir)
    options = with_length_of(options, checkpoint)
    torch.manual_seed(options.seed + ranks.rank())  # every process draws its own dropout
    training = inputs.training_data(options, model.resolution, device)
    validation = inputs.validation_data(options, model.resolution)
    if options.compile:
        distributed.compile_blocks(model)
    parallel = distributed.Parallel(model, device, fsdp=options.fsdp)
    optimizer = build_optimizer(
        model,
        lr=options.optimizer_setting("lr"),
        betas=(options.optimizer_setting("beta1"), options.optimizer_setting("beta2")),
        eps=options.optimizer_setting("eps"),
        weight_decay=options.wd,
    )
    dtype = ranks.autocast_dtype(options.precision, device)
    learner = Learner(
        parallel,
        objective(options),
        torch.amp.GradScaler(device.type, enabled=dtype is torch.float16),
        nullcontext if dtype is None else partial(torch.autocast, device.type, dtype=dtype),
        gather="none" if options.skip_aggregate else "gradients" if options.gather_with_grad else "values",
        mask_ratio=options.mask_ratio,
        multi_positive=options.multi_positive,
        teacher=open_teacher(options, device),
    )
    trainer = Trainer(options, learner, optimizer, training, validation, checkpoint_dir=checkpoint_dir)
    if start is not None and checkpoint is not None:
        trainer.restore(checkpoint, start)
    agree_on_start(trainer)
    if ranks.rank() == 0:
        warn_of_rate(options, trainer.global_batch, trainer.max_steps)
    return trainer


def build_model(options: Options, device: "torch.device") -> "CLIP":
    """The model before training: random, or initialised from other models' weights; towers frozen as asked."""
    from cn_clip.clip.loading import load
    from cn_clip.clip.model import CLIP, convert_weights
    from cn_clip.training import adapt
    from cn_clip.training.logs import logger

    if ranks.rank() == 0:
        print("Loading vision model config from", zoo.config_path(options.vision_model))
        print("Loading text model config from", zoo.config_path(options.text_model))
        for rule in settings.broken(options, RULES):
            logger.warning("%s", rule.message)
    model = CLIP.from_config(zoo.model_config(options.vision_model, options.text_model))
    if options.loss == "siglip":
        model.add_logit_bias()
    load(model, device, clip_path=options.clip_weight_path, bert_path=options.bert_weight_path)
    if options.precision == "fp16":
        if device.type != "cuda":
            raise ConfigError(f"--precision fp16: needs CUDA, the device is {device}; use bf16, amp or fp32")
        convert_weights(model)
        logger.warning(
            "--precision fp16 keeps weights and Adam's moments in float16, as Chinese-CLIP does: gradients below 1e-3 "
            "hardly count; --precision amp and bf16 train better in as little time"
        )
    if options.grad_checkpointing:
        model.set_grad_checkpointing()
        logger.info("Grad-checkpointing activated.")
    adapt.freeze(model, vision=options.freeze_vision, text=options.freeze_text, text_layers=options.freeze_text_layers)
    if options.lora_rank:
        adapt.add_lora(model, options.lora_rank, options.lora_alpha)
        model.to(device)
    return synchronise_norms(options, model, device)


def synchronise_norms(options: Options, model: "CLIP", device: "torch.device") -> "CLIP":
    """The model with batch normalisation over all processes, where --use-bn-sync asks for it and it can be had."""
    from torch import nn

    from cn_clip.training.logs import logger

    if not options.use_bn_sync:
        return model
    if ranks.world_size() == 1:
        logger.warning("--use-bn-sync changes nothing: there is one process.")
        return model
    if device.type != "cuda":
        raise ConfigError(f"--use-bn-sync: PyTorch has it for CUDA alone, the device is {device}; leave it out")
    synchronised: CLIP = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return synchronised


def load_start(options: Options, model: "CLIP", checkpoint_dir: Path) -> "tuple[Start, Checkpoint] | tuple[None, None]":
    """What the run begins from, as rank 0 chooses, and its checkpoint, whose weights are put into the model.

    Adapters (LoRA) of a file that is gone on from stay apart when the run has adapters too; those of --init are merged.
    """
    from cn_clip.clip.weights.checkpoint import SIGMOID_BIAS, read_checkpoint
    from cn_clip.training import adapt, distributed, state
    from cn_clip.training.logs import logger

    choose = partial(state.choose_start, options, checkpoint_dir)
    chosen = distributed.together(choose if ranks.rank() == 0 else lambda: None)
    start: Start | None = distributed.from_first(chosen)
    if start is None:
        return None, None
    if not start.is_own and options.init is not None:
        read: Callable[[Path], Checkpoint] = read_checkpoint
    else:
        read = partial(adapt.read_for_training, model)
    logger.info("=> begin to load checkpoint '%s'", start.path)
    checkpoint = distributed.together(lambda: read(start.path))
    bias = state.resume_entry(checkpoint).get(SIGMOID_BIAS)
    tensors = checkpoint.state_dict if bias is None else {**checkpoint.state_dict, SIGMOID_BIAS: bias}
    try:
        adapt.load_plain_state_dict(model, tensors, checkpoint.path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}{_advice(options, checkpoint)}") from error
    return start, checkpoint


def with_length_of(options: Options, checkpoint: "Checkpoint | None") -> Options:
    """The settings with the context length of the checkpoint that a run begins from, unless they ask for another."""
    from cn_clip.clip.inputs import text_length

    if checkpoint is None:
        return options
    return replace(
        options, context_length=text_length(options.context_length, checkpoint.context_length, checkpoint.path)
    )


def _advice(options: Options, checkpoint: "Checkpoint") -> str:
    """The flags that fit the checkpoint, where its towers have names and others were asked for."""
    from cn_clip.clip.weights.checkpoint import infer_config

    try:
        vision, text = zoo.tower_names(infer_config(checkpoint))
    except CheckpointError:
        return ""
    if None in (vision, text) or (vision, text) == (options.vision_model, options.text_model):
        return ""
    return f" It holds {vision} @ {text}: give --vision-model {vision} --text-model {text}"


def agree_on_start(trainer: "Trainer") -> None:
    """Raises ConfigError when the processes would begin at different places: each looks for checkpoints by itself."""
    from cn_clip.training.distributed import every_object

    places = every_object(trainer.position)
    if any(place != places[0] for place in places):
        steps = ", ".join(str(place.step) for place in places)
        raise ConfigError(
            f"the processes begin at different steps ({steps}), because they do not see the same checkpoint; put "
            "--logs on a disk that all machines share, or give --resume a file that all have"
        )


def objective(options: Options) -> "Objective":
    """The loss that the options ask for."""
    from cn_clip.training.loss import Objective

    return Objective(options.loss, options.kd_loss_weight if options.distillation else 0.0)


def open_teacher(options: Options, device: "torch.device") -> "Teacher | None":
    """The teacher of --distillation, or None."""
    if not options.distillation or options.teacher_model_name is None:
        return None
    from cn_clip.training import distill

    return distill.open_teacher(options.teacher_model_name, device)


def warn_of_rate(options: Options, global_batch: int, max_steps: int) -> None:
    """Says when the learning rate is far above what the batch size bears, and when the warm-up never ends."""
    from cn_clip.training.logs import logger
    from cn_clip.training.monitor import rate_warning

    # A run that goes on with its optimizer may have begun from scratch; adapters bear more than weights.
    pretrained = bool(options.init or (options.resume and options.reset_optimizer) or options.clip_weight_path)
    # The rule is that of the published models, which see 224 pixels and more; the small towers bear more too.
    is_small = zoo.vision_config(options.vision_model).image_resolution < 224
    pretrained = pretrained and not options.lora_rank and not is_small
    warning = rate_warning(options.optimizer_setting("lr"), global_batch, pretrained=pretrained)
    if warning:
        logger.warning("%s", warning)
    if options.warmup > max_steps:
        logger.warning("--warmup %d: the run has %d steps, so the rate never reaches --lr", options.warmup, max_steps)


def monitor(
    options: Options, folder: Path, *, start_step: int, goes_on: bool
) -> "AbstractContextManager[Monitor | None]":
    """Keeps the numbers of the run in its folder; on other processes than the first, nothing."""
    from cn_clip.training.monitor import Monitor

    if ranks.rank() != 0:
        return nullcontext()
    return Monitor(folder, start_step=start_step, goes_on=goes_on, tensorboard=options.report_to == "tensorboard")


def arithmetic(options: Options, trainer: "Trainer") -> str:
    """Precision in words, for the log."""
    dtype = ranks.autocast_dtype(options.precision, trainer.device)
    if dtype is None:
        return str(trainer.model.dtype).removeprefix("torch.")
    return f"mixed {str(dtype).removeprefix('torch.')}"


def without_local_rank(args: Sequence[str]) -> list[str]:
    """The arguments without --local_rank N, which launchers before torchrun give and LOCAL_RANK says too."""
    kept: list[str] = []
    rest = iter(args)
    for word in rest:
        name = word.split("=")[0].replace("_", "-")
        if name != "--local-rank":
            kept.append(word)
            continue
        print(f"{word}: changes nothing; LOCAL_RANK says it, and torchrun sets it", file=sys.stderr)
        if "=" not in word:
            next(rest, None)
    return kept


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, without_local_rank(sys.argv[1:] if args is None else args))
    if ranks.world_size() > 1:
        # DTensor's caches keep the process group of FSDP, whose threads may abort a process that ends in the usual way:
        # torchrun would call a run failed that has saved everything.
        terminal.leave(0)


if __name__ == "__main__":
    main()

"""A run from its settings: its folder, model, data, optimizer and teacher, and the `Trainer` of them; for `main`."""

import contextlib
import multiprocessing
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from cn_clip import ranks, settings, zoo
from cn_clip.clip.loading import load, open_model
from cn_clip.clip.model import CLIP, convert_weights
from cn_clip.clip.tokenizer import text_length
from cn_clip.clip.weights.checkpoint import SIGMOID_BIAS, Checkpoint, infer_config, read_checkpoint
from cn_clip.errors import CheckpointError, CnClipError, ConfigError, DownloadError, lacked_memory
from cn_clip.extras import require
from cn_clip.files import alone
from cn_clip.language import translated
from cn_clip.training import adapt, distributed, inputs, state
from cn_clip.training.advice import Situation, better_settings, is_small
from cn_clip.training.log_lines import arithmetic_words, compile_advice, rate_warning
from cn_clip.training.logger import log_params, logger, logging_to
from cn_clip.training.loss import Objective
from cn_clip.training.monitor import Monitor
from cn_clip.training.params import RULES, Options, has_resnet
from cn_clip.training.scheduler import build_optimizer
from cn_clip.training.state import Start
from cn_clip.training.step import Learner, Teacher
from cn_clip.training.trainer import Trainer

LOCK = ".lock"
# Where the picture encoder sits in the models of ModelScope that Chinese-CLIP names as teachers, by their kind.
MODELSCOPE_ENCODERS = (("clip_model", "encode_image"), ("model", "encode_image"), ("model", "image_model"))
_MODELSCOPE_ID = re.compile(r"[\w-]+/[\w.-]+")
_WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


def run(options: Options) -> None:
    """Trains to the last step; raises CnClipError with the reason when it cannot, OSError when --logs is no folder."""
    # Python 3.14 starts workers by a server: it imports PyTorch once, else every worker would, at every epoch.
    multiprocessing.set_forkserver_preload(["__main__", "cn_clip.training.inputs"])
    ranks.use_threads(options.num_threads)
    device = ranks.own_device(options.device)
    ranks.set_float32_products(device, is_strict=options.strict_fp32)
    folder = Path(options.logs) / options.name
    started = time.strftime("%Y-%m-%d-%H-%M-%S", time.gmtime())
    with contextlib.ExitStack() as stack:
        refused: Exception | None = None
        try:
            stack.enter_context(run_folder(options, folder, started))
        except (CnClipError, OSError) as error:
            refused = error
        stack.enter_context(distributed.process_group(device))
        distributed.fail_together(refused)
        stack.enter_context(explained_memory())
        train_in_group(options, device, folder, started)


@contextlib.contextmanager
def run_folder(options: Options, folder: Path, started: str) -> Iterator[None]:
    """Makes the folder of a run, locks it, and logs into it while the block runs; the first process locks for all.

    Raises OSError when it cannot be made or written, ConfigError when another run is at it.
    """
    with contextlib.ExitStack() as stack:
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        if ranks.rank() == 0:
            busy = f"--name {options.name}: another process is training in {folder}"
            stack.enter_context(alone(folder / LOCK, busy))
            state.clear_leftovers(folder / "checkpoints")
        stack.enter_context(logging_to(folder / f"out_{started}.log", rank=ranks.rank(), debug=options.debug))
        yield


@contextlib.contextmanager
def explained_memory() -> Iterator[None]:
    """Turns "out of memory" into a ConfigError that names the flags that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, CnClipError) or not lacked_memory(error):
            raise
        text = str(error)
        raise ConfigError(
            f"out of memory ({text.splitlines()[0] if text else 'no details'}); these flags need less, in this order: "
            "--grad-checkpointing, --precision bf16, a smaller --batch-size with a larger --accum-freq (the same "
            "global batch), --mask-ratio 0.5, --lora-rank 16, --freeze-vision, and on several devices --fsdp"
        ) from error


def train_in_group(options: Options, device: torch.device, folder: Path, started: str) -> None:
    """Builds and trains. A function of its own, so that nothing of it outlives the process group."""
    checkpoint_dir = folder / "checkpoints"
    trainer = build_trainer(options, device, checkpoint_dir)
    options, is_first = trainer.options, ranks.rank() == 0
    if options.overwrite:
        if is_first:
            for path in state.discard(checkpoint_dir, kept=None if trainer.start is None else trainer.start.path):
                logger.info("Deleted %s of the run before (--overwrite)", path)
        distributed.wait_for_all()
    values = {**asdict(options), "checkpoint_path": str(checkpoint_dir), "device": device}
    values |= {"max_steps": trainer.max_steps, "max_epochs": trainer.max_epochs}
    values |= {name: options.optimizer_setting(name) for name in ("lr", "beta1", "beta2", "eps")}
    values |= {"world_size": ranks.world_size()}
    if is_first:
        log_params(values, folder / f"params_{started}.txt")
    dtype = ranks.autocast_dtype(options.precision, device)
    arithmetic = arithmetic_words(
        dtype,
        trainer.model.dtype,
        validates_in_float32=options.validates and not options.validates_as_trained(device.type),
        is_tf32=ranks.computes_in_tf32(device, is_strict=options.strict_fp32),
    )
    logger.info("Use device: %s for training, precision %s", device, arithmetic)
    num_left = trainer.max_steps - trainer.position.step
    if advice := compile_advice(num_left, compiles=options.compile, device_type=device.type):
        logger.info("%s", advice)
    with_events = options.report_to == "tensorboard"
    goes_on = trainer.start is not None and trainer.start.is_own
    monitor: AbstractContextManager[Monitor | None] = nullcontext()
    if is_first:
        monitor = Monitor(folder, start_step=trainer.position.step, tensorboard=with_events, goes_on=goes_on)
    with monitor as trainer.report.monitor:
        trainer.train()


def build_trainer(options: Options, device: torch.device, checkpoint_dir: Path) -> Trainer:
    """Model, data, optimizer and loop of a run, at the step where --resume, its latest checkpoint or --init begins."""
    torch.manual_seed(options.seed)
    model = build_model(options, device)
    start, checkpoint = load_start(options, model, checkpoint_dir)
    if checkpoint is not None:
        length = text_length(options.context_length, checkpoint.context_length, checkpoint.path)
        options = replace(options, context_length=length)
    saved = {} if checkpoint is None else state.resume_entry(checkpoint)
    options = replace(options, freeze_bn=adapt.keeps_statistics(options, model, start, saved))
    named = partial(adapt.base_of_run, options, model, start, checkpoint, checkpoint_dir)
    base = distributed.together(named if options.save_adapters and ranks.rank() == 0 else lambda: None)
    torch.manual_seed(options.seed + ranks.rank())  # every process draws its own dropout
    training = inputs.training_data(options, model.resolution, device)
    validation = inputs.validation_data(options, model.resolution, device)
    if options.compile:
        distributed.compile_blocks(model)
    dtype = ranks.autocast_dtype(options.precision, device)
    gathered_type = fsdp_type(options, device, dtype)
    parallel = distributed.Parallel(model, device, fsdp=options.fsdp, gathered_type=gathered_type)
    optimizer = build_optimizer(
        model,
        lr=options.optimizer_setting("lr"),
        betas=(options.optimizer_setting("beta1"), options.optimizer_setting("beta2")),
        eps=options.optimizer_setting("eps"),
        weight_decay=options.wd,
    )
    name = options.teacher_model_name if options.distillation else None
    learner = Learner(
        parallel,
        Objective(options.loss, options.kd_loss_weight if options.distillation else 0.0, options.dimensions),
        torch.amp.GradScaler(device.type, enabled=dtype is torch.float16),
        nullcontext if dtype is None else partial(torch.autocast, device.type, dtype=dtype),
        gather="none" if options.skip_aggregate else "gradients" if options.gather_with_grad else "values",
        mask_ratio=options.mask_ratio,
        multi_positive=options.multi_positive,
        local_loss=options.local_loss,
        teacher=None if name is None else open_teacher(name, device),
    )
    trainer = Trainer(options, learner, optimizer, training, validation, checkpoint_dir=checkpoint_dir, base=base)
    if start is not None and checkpoint is not None:
        trainer.restore(checkpoint, start)
    agree_on_start(trainer)
    if ranks.rank() == 0:
        warn_of_settings(options, trainer.situation)
    return trainer


def fsdp_type(options: Options, device: torch.device, mixed: torch.dtype | None) -> torch.dtype | None:
    """The type in which FSDP gathers weights: half the bytes of float32 where products are in bfloat16 on a GPU anyway.

    None: their own. Raises ConfigError for a validation in float32, which would have only the rounded weights.
    """
    # Batch normalisation wants weights of the type of its running statistics.
    if not options.fsdp or device.type != "cuda" or mixed is not torch.bfloat16 or has_resnet(options):
        return None
    if options.valid_precision == "fp32":
        raise ConfigError(
            "--fsdp and --valid-precision fp32: FSDP gathers the weights in bfloat16; leave one out, or use "
            "--precision fp32 or amp"
        )
    return torch.bfloat16


def build_model(options: Options, device: torch.device) -> CLIP:
    """The model before training: random, or initialised from other models' weights; towers frozen as asked."""
    if ranks.rank() == 0:
        print("Loading vision model config from", zoo.config_path(options.vision_model))
        print("Loading text model config from", zoo.config_path(options.text_model))
        for rule in settings.broken(options, RULES):
            logger.warning("%s", translated(rule.message))
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


def synchronise_norms(options: Options, model: CLIP, device: torch.device) -> CLIP:
    """The model with batch normalisation over all processes, where --use-bn-sync asks for it and it can be had."""
    if not options.use_bn_sync:
        return model
    if ranks.world_size() == 1:
        logger.warning("--use-bn-sync changes nothing: there is one process.")
        return model
    if device.type != "cuda":
        raise ConfigError(f"--use-bn-sync: PyTorch has it for CUDA alone, the device is {device}; leave it out")
    synchronised: CLIP = nn.SyncBatchNorm.convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return synchronised


def load_start(options: Options, model: CLIP, checkpoint_dir: Path) -> tuple[Start, Checkpoint] | tuple[None, None]:
    """What the run begins from, as rank 0 chooses, and its checkpoint, whose weights are put into the model.

    Adapters (LoRA) of a file that is gone on from stay apart when the run has adapters too; those of --init are merged.
    """
    choose = partial(state.choose_start, options, checkpoint_dir)
    chosen = distributed.together(choose if ranks.rank() == 0 else lambda: None)
    start: Start | None = distributed.from_first(chosen)
    if start is None:
        return None, None
    if start.is_first(options):
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
        advice = ""
        with contextlib.suppress(CheckpointError):
            vision, text = zoo.tower_names(infer_config(checkpoint))
            if None not in (vision, text) and (vision, text) != (options.vision_model, options.text_model):
                advice = f" It holds {vision} @ {text}: give --vision-model {vision} --text-model {text}"
        raise CheckpointError(f"{error}{advice}") from error
    return start, checkpoint


def agree_on_start(trainer: Trainer) -> None:
    """Raises ConfigError when the processes would begin at different steps: each looks for checkpoints by itself."""
    positions = distributed.every_object(trainer.position)
    if any(position != positions[0] for position in positions):
        steps = ", ".join(str(position.step) for position in positions)
        raise ConfigError(
            f"the processes begin at different steps ({steps}), because they do not see the same checkpoint; put "
            "--logs on a disk that all machines share, or give --resume a file that all have"
        )


def warn_of_settings(options: Options, situation: Situation) -> None:
    """Says when the learning rate is far above what the batch size bears, and which settings suit tower and data."""
    # The rule is that of the published models; `better_settings` knows what adapters and small towers bear.
    if not situation.is_pretrained or not (options.lora_rank or is_small(options)):
        rate = options.optimizer_setting("lr")
        if warning := rate_warning(rate, situation.global_batch, pretrained=situation.is_pretrained):
            logger.warning("%s", warning)
    if options.warmup > situation.max_steps:
        logger.warning(
            "--warmup %d: the run has %d steps, so the rate never reaches --lr", options.warmup, situation.max_steps
        )
    if line := better_settings(options, situation):
        logger.warning("%s", line)


def open_teacher(name: str, device: torch.device | str) -> Teacher:
    """The teacher of this name on `device`: a checkpoint file, a model's name, or "OWNER/MODEL" on ModelScope.

    Raises CheckpointError for a file that cannot be read or a name that is not known, ConfigError for a ModelScope
    model that encodes no pictures, DownloadError when ModelScope fails, MissingExtraError without its package.
    """
    is_local = zoo.named(name) is not None or Path(name).exists() or name.endswith(_WEIGHT_SUFFIXES)
    resolution, details = None, ""
    if not is_local and _MODELSCOPE_ID.fullmatch(name):
        models = require("modelscope.models", extra="modelscope", purpose=f"the teacher {name} from ModelScope")
        try:
            model = models.Model.from_pretrained(name)
        except Exception as error:  # whatever its loaders raise
            reason = " ".join(str(error).split()) or type(error).__name__
            if "Unexpected key(s) in state_dict" in reason:
                message = f"{name} on ModelScope: {reason}; try pip install --upgrade modelscope"
                raise CheckpointError(message) from error
            raise DownloadError(
                f"{name} on ModelScope: {reason}; try again, or give --teacher-model-name a checkpoint file or ViT-L-14"
            ) from error
        found = (getattr(getattr(model, part, None), method, None) for part, method in MODELSCOPE_ENCODERS)
        encode = next(filter(callable, found), None)
        if encode is None:
            expected = ", ".join(".".join(path) for path in MODELSCOPE_ENCODERS)
            kind = type(model).__name__
            raise ConfigError(f"--teacher-model-name {name}: a {kind} has none of {expected} for pictures")
    else:
        clip, _ = open_model(name)
        del clip.bert  # the text tower would only take memory
        model, encode, resolution = clip, clip.encode_image, clip.resolution
        details = f" ({clip.config.vision.embed_dim} features)"
    model.requires_grad_(False).eval().to(device)
    logger.info("Teacher model loaded from %s%s", name, details)
    return Teacher(encode, resolution=resolution)

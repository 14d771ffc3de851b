"""Which weights a run trains: frozen towers and layers, and low-rank adapters (LoRA) instead of the weights."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from cn_clip import extras
from cn_clip.clip.model import CLIP
from cn_clip.clip.visual import ModifiedResNet
from cn_clip.clip.weights.base import Base
from cn_clip.clip.weights.checkpoint import POSITION_KEYS, SIGMOID_BIAS, Checkpoint, base_of, fit, read_checkpoint
from cn_clip.clip.weights.low_rank import LowRank, is_adapter
from cn_clip.errors import CheckpointError, ConfigError
from cn_clip.language import both
from cn_clip.settings import flag
from cn_clip.training.logger import logger
from cn_clip.training.params import Options
from cn_clip.training.state import Start

JOINED_WEIGHT = ".attn.in_proj_weight"


# --- freezing ---------------------------------------------------------------------------------------------------------


def freeze(model: CLIP, *, vision: bool, text: bool, text_layers: int) -> None:
    """Takes the picture tower, the text tower, or the embeddings and first `text_layers` layers of it out of training.

    `text_projection` and `logit_scale` belong to no tower and stay. Call it before `add_lora`.
    Raises ConfigError when the text tower has fewer layers.
    """
    depth = len(model.bert.encoder.layer)
    if text_layers > depth:
        raise ConfigError(f"--freeze-text-layers {text_layers}: the text tower has {depth} layers")
    for module in frozen_modules(model, vision=vision, text=text, text_layers=text_layers):
        module.requires_grad_(False)
    if vision:
        logger.info("The visual encoder is freezed during training.")
    if text:
        logger.info("The text encoder is freezed during training.")
    elif text_layers:
        logger.info("The embeddings and the first %d layers of the text encoder are freezed.", text_layers)
    if vision and text:
        logger.warning("Both encoders are freezed: only text_projection and logit_scale are trained.")


def frozen_modules(model: CLIP, *, vision: bool, text: bool, text_layers: int) -> list[nn.Module]:
    """The parts of the model these settings keep as they are."""
    modules: list[nn.Module] = [model.visual] if vision else []
    if text:
        modules.append(model.bert)
    elif text_layers:
        modules += [model.bert.embeddings, *model.bert.encoder.layer[:text_layers]]
    return modules


def set_training_mode(model: CLIP, options: Options) -> None:
    """`model.train()`, but what is frozen computes as in evaluation: no dropout, running statistics as they are.

    With --freeze-bn, or adapters, this holds for every batch normalisation: its running statistics stay, and batches
    are normalised by them. Its scale and shift are trained unless they are frozen too.
    """
    model.train()
    asked = {"vision": options.freeze_vision, "text": options.freeze_text}
    for module in frozen_modules(model, **asked, text_layers=options.freeze_text_layers):
        module.eval()
    if options.freeze_bn or lora_settings(model):
        for norm in norms(model):
            norm.eval()


def norms(model: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """The batch normalisations of a model; a Vision Transformer has none."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def have_learned(found: Iterable[nn.modules.batchnorm._BatchNorm]) -> bool:
    """Whether running statistics differ from those that every random model begins with, mean 0 and variance 1."""
    return any(norm.running_mean is not None and bool(norm.running_mean.ne(0).any()) for norm in found)


def keeps_statistics(options: Options, model: nn.Module, start: Start | None, saved: Mapping[str, Any]) -> bool:
    """Whether the running statistics of batch normalisation stay as they are; logs what is decided, and why.

    saved: the entry "resume" of the checkpoint that the run begins from, empty for other files. What is given counts;
    else --init keeps them if they have been learned, and a run that goes on does as before. Command lines of
    Chinese-CLIP have no --init: its --resume lets them move, as it does there.
    """
    found = norms(model)
    if not found:
        return options.freeze_bn
    was, learned = saved.get("freeze_bn"), have_learned(found)
    if options.freeze_bn or options.no_freeze_bn:
        keeps = options.freeze_bn
        if was is not None and was != keeps and start is not None and start.with_position:
            before, now = (flag("freeze_bn" if kept else "no_freeze_bn") for kept in (was, keeps))
            in_chinese = f"{now}：这次训练此前用的是 {before}，从这里起不再是同一种训练"
            in_english = f"{now}: this run was trained with {before} so far; from here on it is another one"
            logger.warning("%s", both(in_chinese, in_english))
        if keeps and not learned:
            in_chinese = "--freeze-bn：统计量还是随机权重的（均值 0，方差 1），几乎起不到归一化的作用；从零训练请去掉它"
            in_english = (
                "--freeze-bn: the running statistics are those of random weights (mean 0, variance 1), so batches are "
                "hardly normalised; leave it out to train from scratch"
            )
            logger.warning("%s", both(in_chinese, in_english))
    elif start is not None and start.is_first(options):
        keeps = learned and not options.use_bn_sync
    else:
        keeps = bool(was)
    if options.freeze_vision or lora_settings(model):
        return keeps
    if keeps:
        in_chinese = "批归一化的统计量保持不变（--freeze-bn）。"
        in_english = "The running statistics of batch normalisation are kept as they are (--freeze-bn)."
        logger.info("%s", both(in_chinese, in_english))
    elif start is not None and learned and not options.no_freeze_bn:
        in_chinese = (
            "批归一化的统计量随训练的批变化，与 Chinese-CLIP 相同；批小或图片经过增强时，仅此就会降低召回率。"
            "--freeze-bn 让它保持不变"
        )
        in_english = (
            "The running statistics of batch normalisation follow the training batches, as in Chinese-CLIP; small "
            "batches and augmented pictures can lower recall by that alone. --freeze-bn keeps them"
        )
        logger.warning("%s", both(in_chinese, in_english))
    return keeps


# --- adapters ---------------------------------------------------------------------------------------------------------


def add_lora(model: CLIP, rank: int, alpha: float | None = None) -> None:
    """Puts adapters on the attention and perceptron weights that are not frozen; only they and the scale are trained.

    A ResNet gets them on its convolutions and its attention pool. The first factors are drawn from torch's random
    state, the second ones are 0: the model computes what it did before. alpha: default twice the rank.
    Raises ConfigError when both towers are frozen, MissingExtraError without `peft`.
    """
    peft = extras.require("peft", extra="lora", purpose="--lora-rank")
    # The convolution of a Vision Transformer is the patch embedding: neither attention nor perceptron.
    kinds = (nn.Linear, nn.Conv2d) if isinstance(model.visual, ModifiedResNet) else (nn.Linear,)
    modules = [
        name for name, module in model.named_modules() if isinstance(module, kinds) and module.weight.requires_grad
    ]
    trained = (name for name, parameter in model.named_parameters() if parameter.requires_grad)
    parameters = [name for name in trained if name.endswith(JOINED_WEIGHT)]
    if not modules:
        raise ConfigError("--lora-rank: both towers are frozen, there is nothing to adapt; leave one to be trained")
    chosen = {"target_modules": modules, "target_parameters": parameters or None}
    config = peft.LoraConfig(r=rank, lora_alpha=2 * rank if alpha is None else alpha, **chosen)
    peft.inject_adapter_in_model(config, model)
    for parameter in (model.logit_scale, getattr(model, "logit_bias", None)):
        if parameter is not None:
            parameter.requires_grad_(True)
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    settings = lora_settings(model)
    assert settings is not None
    logger.info("LoRA of rank %d, alpha %g: %d values are trained.", rank, settings.alpha, count)


def lora_settings(model: nn.Module) -> LowRank | None:
    """Rank and alpha of the model's adapters, None when it has none: the entry "lora" of its checkpoints."""
    config = getattr(model, "peft_config", {}).get("default")
    return None if config is None else LowRank(config.r, float(config.lora_alpha))


# --- names in files ---------------------------------------------------------------------------------------------------


def file_name(name: str) -> str:
    """What a checkpoint calls the tensor `name` of a model with adapters; names of other models stay as they are."""
    name = name.replace("base_layer.", "").replace(".default.", ".")
    return re.sub(r"\.attn\.(lora_[AB])\.", r".attn.in_proj.\1.", name)


def file_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a state dict under the names of checkpoints: weights as without adapters, adapters beside them."""
    return {file_name(name): value for name, value in tensors.items()}


def load_plain_state_dict(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copies tensors under the names of checkpoints into the model, position embeddings resized.

    Adapters, and the bias of the sigmoid loss, keep their values when `tensors` has none: a run that starts from
    weights trained without them.
    Raises CheckpointError naming `path` and the first tensor that does not fit.
    """
    own = model.state_dict()
    expected = file_names(own)
    has_adapters = any(map(is_adapter, tensors))
    kept = [name for name in expected if name == SIGMOID_BIAS or (is_adapter(name) and not has_adapters)]
    fitted = fit({**{name: expected[name] for name in kept}, **tensors}, expected, path)
    model.load_state_dict({name: fitted[file_name(name)] for name in own})


def read_for_training(model: nn.Module, path: str | Path) -> Checkpoint:
    """A checkpoint with its adapters apart when the model has adapters too, else merged into the weights.

    Raises CheckpointError when it cannot be read, or its adapters are of another rank or alpha.
    """
    settings = lora_settings(model)
    checkpoint = read_checkpoint(path, merge_lora=settings is None)
    if settings and checkpoint.lora not in (None, settings):
        raise CheckpointError(
            f"trained with {_flags(checkpoint.lora)}, this run has {_flags(settings)}; give it those, or "
            "start from merged weights (cn-clip checkpoint strip)",
            at=path,
        )
    return checkpoint


def base_of_run(
    options: Options, model: nn.Module, start: Start | None, checkpoint: Checkpoint | None, checkpoint_dir: Path
) -> Base:
    """The weights under the adapters of a run, for files that hold only the adapters (--save-adapters).

    Raises ConfigError when they are in no file, in one that the run itself replaces, or not all as they are in it.
    """
    if start and checkpoint and checkpoint.base is not None and not start.is_first(options):
        return checkpoint.base
    if start is None or checkpoint is None or start.origin is None:
        raise ConfigError(
            "--save-adapters: the adapters would be of random weights, which no file holds; name the base with --init, "
            "or leave --save-adapters out"
        )
    if start.path.resolve().parent == checkpoint_dir.resolve() or (checkpoint.lora and not start.is_first(options)):
        raise ConfigError(
            f"--save-adapters: {start.path} holds all weights, and adapters need a base that stays as it is. To go on "
            "with this run, leave --save-adapters out; to begin another one, give a copy of the file as --init, with "
            "another --name"
        )
    own = file_names(model.state_dict())
    if any(name in own and own[name].shape != checkpoint.state_dict[name].shape for name in POSITION_KEYS):
        raise ConfigError(
            f"--save-adapters: {start.path} is for pictures of another size, and its position embedding is changed to "
            "that of --vision-model, so the base is not as in the file; leave --save-adapters out"
        )
    return base_of(start.path, start.origin)


def _flags(settings: LowRank) -> str:
    return f"--lora-rank {settings.rank} --lora-alpha {settings.alpha:g}"

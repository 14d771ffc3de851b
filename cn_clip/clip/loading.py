"""From a name or a file to a ready model: what `load_from_name` and every command use."""

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from cn_clip import ranks, terminal, zoo
from cn_clip.clip.model import CLIP, PICTURE_SIDE, TEXT_SIDE, convert_weights, initialise
from cn_clip.clip.transforms import ImageTransform, image_transform
from cn_clip.clip.weights.checkpoint import Checkpoint, fit, infer_config, normalise_keys, read_checkpoint
from cn_clip.clip.weights.file_formats import owned
from cn_clip.clip.weights.hub import weight_file
from cn_clip.errors import ConfigError
from cn_clip.language import both
from cn_clip.progress import working

logger = logging.getLogger(__name__)


def open_model(
    name: str | Path,
    *,
    vision: str | None = None,
    text: str | None = None,
    resolution: int | None = None,
    download_root: str | Path | None = None,
    use_modelscope: bool = False,
) -> tuple[CLIP, Checkpoint]:
    """The float32 model of a name or of a weight file on the CPU, in eval mode, and its checkpoint.

    The checkpoint has the model's tensors, and no optimizer. Neither of them depends on the file any more: it may be
    written, cut off or removed.

    vision, text: architecture names; when not given they come from the name's entry or from the tensors.
    resolution: pixels a side; position embeddings are resized when it is not the checkpoint's.
    Raises CheckpointError for an unknown name, an unreadable file, or tensors that do not fit.
    """
    entry = zoo.named(str(name))
    if entry is not None:
        vision, text = vision or entry.vision, text or entry.text
    path = weight_file(name, download_root=download_root, use_modelscope=use_modelscope)
    with working(both("读取权重", "loading weights")):
        # Mapped: the weights go to the model one by one, in its type; the state of an optimizer is not read at all.
        checkpoint = read_checkpoint(path, mapped=True)
        config = choose_config(checkpoint, vision=vision, text=text, resolution=resolution)
        model = build(config, checkpoint)
        tensors = model.state_dict()
        others = owned({key: value for key, value in checkpoint.state_dict.items() if key not in tensors})
    extra = {key: value for key, value in checkpoint.extra.items() if isinstance(value, str | int | float)}
    return model, replace(checkpoint, state_dict=tensors | others, optimizer=None, extra=extra, is_mapped=False)


def choose_config(
    checkpoint: Checkpoint, *, vision: str | None, text: str | None, resolution: int | None = None
) -> zoo.ModelConfig:
    """The named towers where names are given, the inferred ones elsewhere, at `resolution` when given."""
    if vision and text:
        config = zoo.model_config(vision, text)
    else:
        inferred = infer_config(checkpoint)
        config = zoo.ModelConfig(
            zoo.vision_config(vision) if vision else inferred.vision, zoo.text_config(text) if text else inferred.text
        )
    return config if resolution is None else zoo.at_resolution(config, resolution)


def build(config: zoo.ModelConfig, checkpoint: Checkpoint) -> CLIP:
    """A float32 model in eval mode holding the checkpoint's tensors.

    Tensors that are float32 already are shared with `checkpoint` when they have memory of their own; all others, those
    of a mapped file too, are copied.
    """
    with torch.device("meta"), _NoRandomNumbers():
        model = CLIP.from_config(config)
    fitted = fit(checkpoint.state_dict, model.state_dict(), checkpoint.path)
    full = owned(fitted, floating=torch.float32, give_back=checkpoint.is_mapped)
    model.load_state_dict(full, assign=True)
    model.context_length, model.matryoshka = checkpoint.context_length, checkpoint.matryoshka
    return model.eval()


class _NoRandomNumbers(TorchFunctionMode):
    """Leaves out drawing and scaling random numbers, which on the meta device imports PyTorch's compiler: a second."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (nn.init.normal_, nn.init.xavier_uniform_, nn.init.kaiming_uniform_):
            return kwargs["tensor"]
        if func in (Tensor.normal_, Tensor.mul, Tensor.__mul__, Tensor.__rmul__, Tensor.div, Tensor.__truediv__):
            return args[0]
        return (torch.empty if func is torch.randn else func)(*args, **(kwargs or {}))


def load_from_name(
    name: str,
    device: str | torch.device | None = None,
    download_root: str | None = None,
    vision_model_name: str | None = None,
    text_model_name: str | None = None,
    input_resolution: int | None = None,
    use_modelscope: bool = False,
) -> tuple[CLIP, ImageTransform]:
    """A model in eval mode and its picture preprocessing, by name or by path.

    name: one of `available_models()` (Emoji-Tiny comes with the package), or a checkpoint file or transformers folder,
    whose architecture is inferred from its tensors where `vision_model_name` and `text_model_name` do not say it.
    device: default CUDA if there is a GPU, else the CPU. Weights are float16 on CUDA; elsewhere float32 with full
    precision.
    Raises CheckpointError (a RuntimeError) or DownloadError.
    """
    device = ranks.choose_device(device or None)
    model, _ = open_model(
        name,
        vision=vision_model_name,
        text=text_model_name,
        resolution=input_resolution,
        download_root=download_root,
        use_modelscope=use_modelscope,
    )
    entry = zoo.named(name)
    if entry is not None:
        vision_model_name, text_model_name = entry.vision, entry.text
    _print_config(vision_model_name, text_model_name, model.config)
    if device.type == "cuda":
        convert_weights(model)
    return model.to(device), image_transform(model.resolution)


def create_model(model_name: str, checkpoint: Mapping[str, Any] | None = None) -> CLIP:
    """A float32 model for "VISION@TEXT" holding copies of `checkpoint["state_dict"]`, or random weights; in eval mode.

    Raises ConfigError for an unknown name, CheckpointError for tensors that do not fit.
    """
    vision, _, text = model_name.partition("@")
    if not text:
        raise ConfigError(f"model_name: expected 'VISION@TEXT', got {model_name!r}")
    config = zoo.model_config(vision, text)
    _print_config(vision, text, config)
    if checkpoint is None:
        return CLIP.from_config(config).eval()
    tensors: dict[str, Tensor] = {key: value.clone() for key, value in normalise_keys(checkpoint["state_dict"]).items()}
    return build(config, Checkpoint(Path("checkpoint"), tensors))


def load(
    model: CLIP,
    device: str | torch.device | None = None,
    clip_path: str | os.PathLike[str] | None = None,
    bert_path: str | os.PathLike[str] | None = None,
    use_flash_attention: bool = False,
) -> CLIP:
    """Initialises the picture tower and logit scale from `clip_path`, the text tower from `bert_path`; eval mode.

    Takes OpenAI CLIP archives or state dicts, and Chinese RoBERTa weights. What the files do not hold keeps its values.
    Raises CheckpointError when a file holds nothing for its tower or the shapes differ.
    """
    del use_flash_attention
    if clip_path:
        initialise(model, read_checkpoint(Path(clip_path), mapped=True).state_dict, PICTURE_SIDE, Path(clip_path))
    if bert_path:
        initialise(model, read_checkpoint(Path(bert_path), mapped=True).state_dict, TEXT_SIDE, Path(bert_path))
    return model.to(ranks.choose_device(device or None)).eval()


def _print_config(vision: str | None, text: str | None, config: zoo.ModelConfig) -> None:
    """The lines Chinese-CLIP prints when it loads a model; guides show them."""
    if vision and text:
        terminal.say(f"Loading vision model config from {zoo.config_path(vision)}")
        terminal.say(f"Loading text model config from {zoo.config_path(text)}")
    info = {name: list(v) if isinstance(v, tuple) else v for name, v in config.info().items()}
    terminal.say(f"Model info {info}")

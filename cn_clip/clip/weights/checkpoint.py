"""One reader for every weight file a user has, and the only module that knows how each format spells its keys."""

# S tokens of a position embedding (class token + grid), D width

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cn_clip import zoo
from cn_clip.clip.families.names import refuse
from cn_clip.clip.weights import hf, low_rank
from cn_clip.clip.weights.base import Base, in_float32, of_weights
from cn_clip.clip.weights.file_formats import is_torchscript, metadata_of, only_tensors, read_content, read_torchscript
from cn_clip.errors import CheckpointError, CnClipError, first_sentence
from cn_clip.zoo import TEXT_MODELS, VISION_MODELS, ModelConfig, VisionConfig, text_config, vision_config

POSITION_KEYS = ("visual.positional_embedding", "visual.attnpool.positional_embedding")
SIGMOID_BIAS = "logit_bias"  # only for the sigmoid loss: similarity does not use it, Chinese-CLIP does not know it
DROPPED_KEYS = ("bert.pooler.", "bert.embeddings.position_ids")
_GAMMA, _BETA = (re.compile(rf"(?<=\.LayerNorm\.){name}$") for name in ("gamma", "beta"))  # as TensorFlow says it
# What DataParallel, torch.compile, FSDP and checkpointing put into names, wherever they wrap a part of a model.
_OF_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# The towers, here and in transformers; what comes before them is the name that a larger model gave to this one.
_BEFORE_TOWERS = re.compile(r"^((?:[^.]+\.)*?)(?:visual|bert|vision_model|text_model)\.")
_SAVE_ONE = "save the one you want by itself: torch.save(model.state_dict(), path)"
# One of the files of a model in several.
_SHARD = re.compile(r".*-\d{5}-of-(?!00001)\d{5}\.\w+")


@dataclass(frozen=True)
class Checkpoint:
    """What a weight file holds: tensors under this package's names, and the rest of a training checkpoint.

    config: what a transformers folder says of its architecture; None for files that say nothing. lora: the adapters
    trained, as separate tensors of `state_dict` or merged into it. base: where the other tensors come from, if the file
    holds only adapters, and base_path the file or folder that they were read from. is_mapped: the tensors may lie in
    the file.
    """

    path: Path
    state_dict: dict[str, Tensor]
    epoch: int = 0
    step: int = 0
    optimizer: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    config: ModelConfig | None = None
    lora: low_rank.LowRank | None = None
    base: Base | None = None
    base_path: Path | None = None
    is_mapped: bool = False

    @property
    def context_length(self) -> int | None:
        """The longest text in tokens it was trained with; None when the file does not say."""
        length: int | None = self.extra.get("context_length")
        return length

    @property
    def matryoshka(self) -> tuple[int, ...]:
        """The dimensions at which its vectors may be cut, besides whole ones; rising."""
        return tuple(self.extra.get("matryoshka", ()))


def read_checkpoint(path: str | Path, *, merge_lora: bool = True, mapped: bool = False) -> Checkpoint:
    """Reads any supported file; no code in it is ever run.

    Takes `.pt` of Chinese-CLIP (plain, DataParallel, with pooler, position ids, optimizer or fused Wqkv), bare state
    dicts, dictionaries that hold one under any name, `.safetensors`, OpenAI's CLIP archives, and transformers folders
    or their weight files; names as in `normalise_keys`. Adapters (LoRA) are added to their weights; without
    `merge_lora` they stay separate, as training resumes from them. A file that holds only adapters gets the other
    tensors from the base that it names, which may be a file anywhere on this machine.
    mapped: tensors are read from the file when they are used, where its format allows: for a caller that is done with
    them before anybody may write the file, and that does not want all of them, or all at a time.
    Raises CheckpointError naming the file when it is none of these, or its base is not there or another one.
    """
    return _read(Path(path), merge_lora=merge_lora, mapped=mapped)


def _read(path: Path, *, merge_lora: bool, mapped: bool, adapters: tuple[Path, ...] = ()) -> Checkpoint:
    """As `read_checkpoint`; adapters: the files whose base this one is."""
    if os.path.isdir(path):
        tensors: dict[str, Tensor] = {}
        for file in hf.weight_files(path):
            tensors |= only_tensors(read_content(file, mapped=mapped), file)
        config = _neighbouring_config(tensors, path)
        return Checkpoint(path, _named(tensors, path), config=config, is_mapped=mapped)
    if not os.path.exists(path):
        refuse(str(path))
    content = read_content(path, mapped=mapped)
    if not isinstance(content, Mapping):
        raise CheckpointError(f"holds a {type(content).__name__}, expected a dictionary of tensors", at=path)
    if isinstance(content.get("state_dict"), Mapping):
        read = _read_training(content, path)
        if read.base is not None:
            read = _completed(read, read.base, mapped=mapped, adapters=(*adapters, path.resolve()))
        return replace(_merged(read) if merge_lora else read, is_mapped=mapped)
    if _SHARD.fullmatch(path.name):
        raise CheckpointError(f"is one of several files of a model; give their folder, {path.parent}", at=path)
    model: Mapping[str, Any] = content
    if not _holds_towers(content):
        # One entry of it, or of an entry, may be the model.
        entries = {str(key): value for key, value in content.items() if isinstance(value, Mapping)}
        entries |= {
            f"{key}.{inner}": value
            for key, outer in list(entries.items())
            for inner, value in outer.items()
            if isinstance(value, Mapping)
        }
        models = [key for key, value in entries.items() if _holds_towers(value)]
        if len(models) > 1:
            raise CheckpointError(f"holds the models {' and '.join(models)}; {_SAVE_ONE}", at=path)
        model = entries[models[0]] if models else content
    tensors = only_tensors(model, path)
    config = _neighbouring_config(tensors, path.parent)
    about = metadata_of(path)
    extra = {"matryoshka": _cut_at(about["matryoshka"], path)} if "matryoshka" in about else {}
    return Checkpoint(path, _named(tensors, path), config=config, extra=extra, is_mapped=mapped)


def _cut_at(text: str, path: Path) -> list[int]:
    """The dimensions in the metadata of a file."""
    with contextlib.suppress(ValueError, RecursionError):
        found = json.loads(text)
        if _are_dimensions(found):
            return list(found)
    raise CheckpointError(f"matryoshka is {text[:60]!r}, expected a list of whole numbers", at=path)


def _are_dimensions(found: object) -> bool:
    return isinstance(found, list) and all(type(one) is int and one > 0 for one in found)


def _holds_towers(content: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, Tensor) and _wrapper(str(key)) is not None for key, value in content.items())


def _neighbouring_config(tensors: Mapping[str, Tensor], folder: Path) -> ModelConfig | None:
    if not hf.is_transformers(tensors) or not (folder / hf.CONFIG_FILE).is_file():
        return None
    config = hf.config_from_folder(folder)
    hf.check_weights(config, tensors, folder)
    hf.check_inputs(folder, config.vision.image_resolution)
    return config


def _read_training(content: Mapping[str, Any], path: Path) -> Checkpoint:
    rest = {key: value for key, value in content.items() if key != "state_dict"}
    tensors = _named(only_tensors(content["state_dict"], path), path)
    counts = {name: rest.pop(name, 0) for name in ("epoch", "step")}
    optimizer = rest.pop("optimizer", None)
    for name, value in counts.items():
        if not isinstance(value, int):
            raise CheckpointError(f"{name} is a {type(value).__name__}, expected an integer", at=path)
    length = rest.get("context_length")
    if length is not None and not (type(length) is int and 3 <= length <= 512):
        raise CheckpointError(f"context_length is {length!r}, expected an integer from 3 to 512", at=path)
    if not _are_dimensions(rest.get("matryoshka", [])):
        raise CheckpointError(f"matryoshka is {rest['matryoshka']!r}, expected a list of whole numbers", at=path)
    if not isinstance(optimizer, dict | None):
        raise CheckpointError(f"optimizer is a {type(optimizer).__name__}, expected a dictionary", at=path)
    lora = base = None
    if any(map(low_rank.is_adapter, tensors)):
        try:
            lora = low_rank.LowRank.from_entry(rest.get("lora"))
        except ValueError as error:
            raise CheckpointError(f"{error}; without it the adapters in the file cannot be used", at=path) from error
        try:
            base = Base.from_entry(rest["base"]) if "base" in rest else None
        except ValueError as error:
            raise CheckpointError(f"{error}; the adapters in the file are of no known weights", at=path) from error
    return Checkpoint(path, tensors, optimizer=optimizer, extra=rest, lora=lora, base=base, **counts)


def _merged(checkpoint: Checkpoint) -> Checkpoint:
    if checkpoint.lora is None:
        return checkpoint
    try:
        return replace(checkpoint, state_dict=low_rank.merge(checkpoint.state_dict, checkpoint.lora))
    except ValueError as error:
        raise CheckpointError(error, at=checkpoint.path) from error


def _completed(read: Checkpoint, base: Base, *, mapped: bool, adapters: tuple[Path, ...]) -> Checkpoint:
    """Adapters with the weights of their base, in float32 as training had them; its name becomes where it was found.

    A file from a stranger can name any path: what is wrong there is said without a word of what it holds.
    """
    what = f"holds only LoRA adapters of the base {base.name} (fingerprint {base.fingerprint})"
    back = f"put the base back, or a copy of it beside this file as {base.file_name}"
    reason: CnClipError | None = None
    try:
        found = base.find(read.path.parent)
    except CnClipError as error:
        found, reason = None, error
    if found is None:
        why = "which is not there" if reason is None else f"which cannot be fetched ({reason})"
        raise CheckpointError(f"{what}, {why}; {back}", at=read.path) from reason
    if found.resolve() in adapters:
        raise CheckpointError(f"{what}, which is itself; {back}", at=read.path)
    try:
        weights = _read(found, merge_lora=False, mapped=mapped, adapters=adapters)
        actual, tensors = of_weights(weights.state_dict), _merged(weights).state_dict
    except (CnClipError, OSError, RuntimeError, TypeError) as error:  # also of types that NumPy does not have
        raise CheckpointError(
            f"{what}; {found} cannot be read as one, cn-clip checkpoint info {found} says why; {back}", at=read.path
        ) from error
    if actual != base.fingerprint:
        raise CheckpointError(f"{what}; {found} has the fingerprint {actual}: other weights; {back}", at=read.path)
    full = {name: in_float32(value) for name, value in tensors.items() if name != SIGMOID_BIAS}
    known = Base(base.name if zoo.named(base.name) else str(found), base.fingerprint)
    return replace(read, state_dict=full | read.state_dict, base=known, base_path=found)


def base_of(path: Path, name: str) -> Base:
    """What a file of adapters says of the base in the file or folder `path`; raises as `read_checkpoint`."""
    return Base(name, of_weights(read_checkpoint(path, merge_lora=False, mapped=True).state_dict))


def _named(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    try:
        return normalise_keys(tensors)
    except KeyError as error:
        raise CheckpointError(f"the tensor {error.args[0]} is missing", at=path) from error
    except CheckpointError as error:
        raise CheckpointError(error, at=path) from error
    except (ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"the attention weights are not of one model ({first_sentence(error)})", at=path
        ) from error


def read_openai_archive(path: str | Path) -> dict[str, Tensor]:
    """The flat state dict of an OpenAI CLIP archive (TorchScript), read without running its code."""
    path = Path(path)
    if not is_torchscript(path):
        raise CheckpointError("not a TorchScript archive; expected a file as OpenAI publishes it", at=path)
    return read_torchscript(path)


# --- key spellings ----------------------------------------------------------------------------------------------------


def normalise_keys(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under this package's names: no wrappers, pooler, position ids, fused Wqkv or names of transformers.

    Wrappers are `module.`, `_orig_mod.` and their like anywhere, and anything before the towers: `model.` of
    Lightning, `clip_model.` of a larger model. BERT files made from TensorFlow's call the weight and bias of a
    normalisation gamma and beta.
    Raises CheckpointError when two tensors have one name then: those of a student and a teacher, for example.
    """
    wrappers = {wrapper for key in state_dict if (wrapper := _wrapper(key)) is not None}
    names = {key: _OF_WRAPPERS.sub("", key) for key in state_dict}
    for key, name in names.items():
        longest = max((one for one in wrappers if name.startswith(one)), key=len, default="")
        names[key] = name.removeprefix(longest)
    tensors = {names[key]: value for key, value in state_dict.items()}
    if len(tensors) < len(names):
        raise CheckpointError(f"holds several models, under {' and '.join(map(repr, sorted(wrappers)))}; {_SAVE_ONE}")
    tensors = {_GAMMA.sub("weight", _BETA.sub("bias", key)): value for key, value in tensors.items()}
    if hf.is_transformers(tensors):
        tensors = hf.to_reference(tensors)
    tensors = {key: value for key, value in tensors.items() if not key.startswith(DROPPED_KEYS)}
    return split_wqkv(tensors)


def _wrapper(key: str) -> str | None:
    """The part of a key before the tower that the tensor belongs to; None if it belongs to no tower."""
    found = _BEFORE_TOWERS.match(_OF_WRAPPERS.sub("", key))
    return None if found is None else found[1]


def convert_state_dict(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Switches between the plain and the fused (FlashAttention) spelling of attention weights, each tower by itself.

    Changes `state_dict` and returns it; a `module.` prefix stays. None and {} are returned as they are.
    Source: the two spellings found in Chinese-CLIP checkpoints.
    """
    if not state_dict:
        return state_dict
    prefix = "module." if any(key.startswith("module.") for key in state_dict) else ""
    tensors = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    parts: dict[str, Tensor] = {}
    for is_bert in (False, True):
        tower = {key: value for key, value in tensors.items() if key.startswith("bert.") == is_bert}
        parts |= split_wqkv(tower) if any(".Wqkv." in key for key in tower) else fuse_wqkv(tower)
    state_dict.clear()
    state_dict.update({f"{prefix}{key}": value for key, value in parts.items()})
    return state_dict


def split_wqkv(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fused attention names to plain ones; other tensors pass."""
    plain: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if ".attn.Wqkv." in key:
            plain[key.replace(".attn.Wqkv.", ".attn.in_proj_")] = value
        elif ".attention.self.Wqkv." in key:
            for name, part in zip(("query", "key", "value"), value.chunk(3), strict=True):
                plain[key.replace("Wqkv", name)] = part
        else:
            plain[key.replace(".attention.self.out_proj.", ".attention.output.dense.")] = value
    return plain


def fuse_wqkv(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Plain attention names to fused ones; other tensors pass."""
    fused: dict[str, Tensor] = {}
    for key, value in state_dict.items():
        if ".attn.in_proj_" in key:
            fused[key.replace(".attn.in_proj_", ".attn.Wqkv.")] = value
        elif ".attention.self.query." in key:
            names = [key.replace(".query.", f".{name}.") for name in ("query", "key", "value")]
            fused[key.replace(".query.", ".Wqkv.")] = torch.cat([state_dict[name] for name in names])
        elif ".attention.self.key." not in key and ".attention.self.value." not in key:
            fused[key.replace(".attention.output.dense.", ".attention.self.out_proj.")] = value
    return fused


# --- architecture -----------------------------------------------------------------------------------------------------


def infer_config(checkpoint: Checkpoint) -> ModelConfig:
    """The architecture, from the tensors' names and shapes.

    Head counts leave no trace in the shapes: taken from the known model of the same shape, else 64 wide. The
    configuration of a transformers folder is taken as it is.
    Raises CheckpointError when a tower is missing, or no head count is known for its width.
    """
    if checkpoint.config is not None:
        return checkpoint.config
    tensors = checkpoint.state_dict
    if "visual.conv1.weight" not in tensors:
        raise CheckpointError("no picture tower (visual.conv1.weight); is it a CLIP checkpoint?", at=checkpoint.path)
    if "bert.embeddings.word_embeddings.weight" not in tensors:
        raise CheckpointError(
            "no Chinese text tower (bert.*); an OpenAI CLIP file can only initialise the picture "
            "tower, as `cn-clip train --clip-weight-path` does",
            at=checkpoint.path,
        )
    try:
        vision = _infer_vision(tensors)
        vocab_size, width = tensors["bert.embeddings.word_embeddings.weight"].shape
        layers = _count(tensors, r"bert\.encoder\.layer\.(\d+)\.")
        known = [text_config(name) for name in TEXT_MODELS]
        heads = [k.text_num_attention_heads for k in known if k.text_hidden_size == width]
        text = replace(
            known[0],
            vocab_size=vocab_size,
            text_hidden_size=width,
            text_intermediate_size=tensors["bert.encoder.layer.0.intermediate.dense.weight"].shape[0],
            text_max_position_embeddings=tensors["bert.embeddings.position_embeddings.weight"].shape[0],
            text_num_attention_heads=heads[0] if heads else _default_heads(width),
            text_num_hidden_layers=layers,
            text_type_vocab_size=tensors["bert.embeddings.token_type_embeddings.weight"].shape[0],
        )
        return ModelConfig(vision, text)
    except KeyError as error:
        raise CheckpointError(f"the tensor {error.args[0]} is missing", at=checkpoint.path) from error
    except (ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"of no known architecture ({error})", at=checkpoint.path) from error


def _infer_vision(tensors: Mapping[str, Tensor]) -> VisionConfig:
    if "visual.layer1.0.conv1.weight" in tensors:
        side = _grid_side(tensors["visual.attnpool.positional_embedding"])
        config = VisionConfig(
            embed_dim=tensors["visual.attnpool.c_proj.weight"].shape[0],
            image_resolution=side * 32,
            vision_layers=tuple(_count(tensors, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)),
            vision_width=tensors["visual.layer1.0.conv1.weight"].shape[0],
            vision_patch_size=None,
        )
    else:
        width, _, patch, _ = tensors["visual.conv1.weight"].shape
        side = _grid_side(tensors["visual.positional_embedding"])
        config = VisionConfig(
            embed_dim=tensors["visual.proj"].shape[1],
            image_resolution=side * patch,
            vision_layers=_count(tensors, r"visual\.transformer\.resblocks\.(\d+)\."),
            vision_width=width,
            vision_patch_size=patch,
        )
    known = [vision_config(name) for name in VISION_MODELS]
    shape = (config.vision_layers, config.vision_width)
    head_widths = [k.vision_head_width for k in known if (k.vision_layers, k.vision_width) == shape]
    if head_widths:
        return replace(config, vision_head_width=head_widths[0])
    _default_heads(config.vision_width * (32 if config.vision_patch_size is None else 1))
    return config


def _default_heads(width: int) -> int:
    heads, rest = divmod(width, 64)
    if rest or not heads:
        raise ValueError(f"a tower {width} wide, whose number of attention heads is unknown; name the two towers")
    return heads


def _count(names: Iterable[str], pattern: str) -> int:
    """How many numbers match the group; a gap shows as a missing tensor later."""
    return len({found[1] for name in names if (found := re.match(pattern, name))})


def _grid_side(position_SD: Tensor) -> int:
    return math.isqrt(position_SD.shape[0] - 1)


# --- fitting ----------------------------------------------------------------------------------------------------------


def resize_position_embedding(position_SD: Tensor, side: int, mode: str = "bicubic") -> Tensor:
    """The embedding for a grid of `side` x `side` patches: interpolated with aligned corners, class token kept.

    Source: the interpolation Chinese-CLIP uses when a checkpoint meets another resolution.
    Raises ValueError when the rows of `position_SD` are not a class token and a square grid.
    """
    old = _grid_side(position_SD)
    if old**2 + 1 != position_SD.shape[0]:
        raise ValueError(f"{position_SD.shape[0]} rows are not a class token and a square grid")
    if old == side:
        return position_SD
    grid = position_SD[1:].float().reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(side, side), mode=mode, align_corners=True)
    rows = grid.permute(0, 2, 3, 1).reshape(side * side, -1)
    return torch.cat([position_SD[:1], rows.to(position_SD.dtype)])


def fit(state_dict: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors of `state_dict` a model with the state dict `expected` needs, position embeddings resized.

    Tensors nobody asked for are refused too, but for the bias of the sigmoid loss, which is left out.
    Raises CheckpointError naming the file and the first difference.
    """
    fitted = {key: value for key, value in state_dict.items() if key != SIGMOID_BIAS or key in expected}
    for key in POSITION_KEYS:
        if key in fitted and key in expected and fitted[key].shape[1:] == expected[key].shape[1:]:
            try:
                fitted[key] = resize_position_embedding(fitted[key], _grid_side(expected[key]))
            except ValueError as error:
                raise CheckpointError(f"{key}: {error}", at=path) from error
    for key, wanted in expected.items():
        if key not in fitted:
            raise CheckpointError(f"the tensor {key} is missing; is it another architecture?", at=path)
        if fitted[key].shape != wanted.shape:
            shapes = f"{tuple(fitted[key].shape)}, expected {tuple(wanted.shape)}"
            raise CheckpointError(f"{key} has shape {shapes}; is it another architecture?", at=path)
    unknown = next((key for key in fitted if key not in expected), None)
    if unknown is not None:
        raise CheckpointError(f"unexpected tensor {unknown}; is it another architecture?", at=path)
    return fitted

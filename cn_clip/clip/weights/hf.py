"""Folders of transformers' ChineseCLIPModel, to this package's terms and back: tensors' names, config.json, inputs.

A folder that prepares pictures or texts in another way than this package is refused.
"""

import json
import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cn_clip.clip.tokenizer import VOCAB_FILE
from cn_clip.clip.transforms import MEAN, STD
from cn_clip.errors import CheckpointError, ConfigError, reading
from cn_clip.zoo import ModelConfig, TextConfig, VisionConfig

logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
PICTURE_FILE = "preprocessor_config.json"
BICUBIC = 3  # as PIL numbers it
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

# What a config.json means by the fields it leaves out. Source: ChineseCLIPConfig of transformers.
_TEXT_DEFAULTS: dict[str, Any] = {
    "vocab_size": 30522,
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 768,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "type_vocab_size": 2,
}
_VISION_DEFAULTS: dict[str, Any] = {
    "hidden_size": 768,
    "image_size": 224,
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "patch_size": 32,
}
# What the towers here are built with; a folder that says otherwise would give other features.
_FIXED: dict[str, dict[str, Any]] = {
    "text_config": {"layer_norm_eps": 1e-12, "position_embedding_type": "absolute"},
    "vision_config": {"layer_norm_eps": 1e-5, "hidden_act": "quick_gelu", "num_channels": 3},
}

# No model has more of anything. What is far beyond would be built before its weights could be found not to fit.
_MOST = 1 << 20
_LAYERS = {
    "text_config": r"text_model\.encoder\.layer\.(\d+)\.",
    "vision_config": r"vision_model\.encoder\.layers\.(\d+)\.",
}
_EMBEDDINGS = "vision_model.embeddings."

# Longest spellings first; each pair is (transformers, here). Projections are stored transposed there.
_PREFIXES = (
    ("text_model.", "bert."),
    ("vision_model.embeddings.class_embedding", "visual.class_embedding"),
    ("vision_model.embeddings.patch_embedding.", "visual.conv1."),
    ("vision_model.embeddings.position_embedding.weight", "visual.positional_embedding"),
    ("vision_model.pre_layrnorm.", "visual.ln_pre."),
    ("vision_model.post_layernorm.", "visual.ln_post."),
    ("vision_model.encoder.layers.", "visual.transformer.resblocks."),
)
_BLOCK_NAMES = (
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
)
_TRANSPOSED = {"visual_projection.weight": "visual.proj", "text_projection.weight": "text_projection"}
_IGNORED = re.compile(r"position_ids$|^text_model\.pooler\.")


def weight_files(folder: Path) -> list[Path]:
    """The weight file of a transformers folder, or its shards; raises CheckpointError when there is none."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            shards = read_json(index).get("weight_map")
            are_names = isinstance(shards, dict) and all(isinstance(shard, str) for shard in shards.values())
            if not shards or not are_names:
                raise CheckpointError("weight_map: expected an object from tensors to names of files", at=index)
            return [folder / shard for shard in sorted({Path(shard).name for shard in shards.values()})]
    others = sorted(path.name for path in folder.iterdir() if path.suffix in (".pt", ".pth", ".ckpt", ".safetensors"))
    such = f", such as {others[0]} in it" if others else ""
    raise CheckpointError(
        f"a folder without {' or '.join(WEIGHT_FILES)}; expected a transformers folder or a file{such}", at=folder
    )


def config_from_folder(folder: Path) -> ModelConfig:
    """The architecture that the config.json of a ChineseCLIPModel describes.

    Raises CheckpointError when it is not one, or asks for something this package's towers do not do.
    """
    path = folder / CONFIG_FILE
    config = read_json(path)
    for part, fixed in _FIXED.items():
        for name, value in fixed.items():
            if (actual := _section(config, part).get(name, value)) != value:
                raise CheckpointError(f"{part}.{name} is {actual!r}, expected {value!r}", at=path)
    text = _TEXT_DEFAULTS | _section(config, "text_config")
    vision = _VISION_DEFAULTS | _section(config, "vision_config")
    try:
        embed_dim = _value({"projection_dim": 512} | config, "projection_dim")
        width, heads = _width_and_heads(vision)
        resolution, patch = _value(vision, "image_size"), _value(vision, "patch_size")
        if resolution < patch:
            raise ValueError(f"image_size {resolution} is less than patch_size {patch}")
        picture_tower = VisionConfig(
            embed_dim=embed_dim,
            image_resolution=resolution,
            vision_layers=_value(vision, "num_hidden_layers"),
            vision_width=width,
            vision_patch_size=patch,
            vision_head_width=width // heads,
        )
        _width_and_heads(text)
        values = {name: _value(text, name, type(default)) for name, default in _TEXT_DEFAULTS.items()}
        vocab_size = values.pop("vocab_size")
        return ModelConfig(
            picture_tower, TextConfig(vocab_size=vocab_size, **{f"text_{name}": v for name, v in values.items()})
        )
    except ValueError as error:
        raise CheckpointError(f"not the configuration of a ChineseCLIPModel ({error})", at=path) from error


def _width_and_heads(fields: Mapping[str, Any]) -> tuple[int, int]:
    width, heads = _value(fields, "hidden_size"), _value(fields, "num_attention_heads")
    if width % heads:
        raise ValueError(f"hidden_size {width} is not a multiple of num_attention_heads {heads}")
    return width, heads


def _value(fields: Mapping[str, Any], name: str, kind: type = int) -> Any:
    """An integer of at least 1 unless `kind` is float, for a number from 0 to 1, or str; raises ValueError."""
    value = fields[name]
    if kind is int:
        expected, is_right = f"an integer from 1 to {_MOST}", type(value) is int and 1 <= value <= _MOST
    elif kind is float:
        expected, is_right = "a number from 0 to 1", type(value) in (int, float) and 0 <= value <= 1
    else:
        expected, is_right = "a word", isinstance(value, str)
    if not is_right:
        shown = repr(value)
        shown = shown if len(shown) <= 40 else f"{shown[:40]}…"  # a file from elsewhere may hold megabytes there
        raise ValueError(f"{name}: expected {expected}, got {shown}")
    return kind(value)


def check_weights(config: ModelConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Raises CheckpointError where the numbers of layers, or the grid of patches, are not those of the weights.

    tensors: under the names of transformers. What else differs shows when the model is built; these would before that
    cost memory without bound, and another grid would be taken for a wish to resize the position embedding.
    """
    vision, patch = config.vision, config.vision.vision_patch_size or 1
    layers = {"text_config": config.text.text_num_hidden_layers, "vision_config": vision.vision_layers}
    for section, told in layers.items():
        found = len({match[1] for name in tensors if (match := re.match(_LAYERS[section], name))})
        if told != found:
            raise CheckpointError(f"{section}.num_hidden_layers is {told}, but the weights have {found}", at=folder)
    shapes = {
        "patch_embedding.weight": (vision.vision_width, 3, patch, patch),
        "position_embedding.weight": ((vision.image_resolution // patch) ** 2 + 1, vision.vision_width),
    }
    for name, expected in shapes.items():
        shape = tuple(tensors[f"{_EMBEDDINGS}{name}"].shape) if f"{_EMBEDDINGS}{name}" in tensors else expected
        if shape != expected:
            raise CheckpointError(f"{_EMBEDDINGS}{name} is {shape}, but {CONFIG_FILE} makes it {expected}", at=folder)


def fields_of_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a ChineseCLIPModel of this architecture; it computes in float32 unless asked for less.

    Raises ConfigError for a picture tower that is no Vision Transformer.
    """
    vision, text = config.vision, config.text
    if vision.vision_patch_size is None:
        raise ConfigError("the picture tower is a ResNet, but ChineseCLIPModel of transformers knows no other than ViT")
    names = [name for name in _TEXT_DEFAULTS if name != "vocab_size"]
    return {
        "architectures": ["ChineseCLIPModel"],
        "model_type": "chinese_clip",
        "dtype": "float32",
        "projection_dim": vision.embed_dim,
        "text_config": {
            "model_type": "chinese_clip_text_model",
            "vocab_size": text.vocab_size,
            **{name: getattr(text, f"text_{name}") for name in names},
            **_FIXED["text_config"],
        },
        "vision_config": {
            "model_type": "chinese_clip_vision_model",
            "projection_dim": vision.embed_dim,
            "hidden_size": vision.vision_width,
            "intermediate_size": 4 * vision.vision_width,
            "image_size": vision.image_resolution,
            "num_attention_heads": vision.vision_width // vision.vision_head_width,
            "num_hidden_layers": vision.vision_layers,
            "patch_size": vision.vision_patch_size,
            **_FIXED["vision_config"],
        },
    }


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    # Files of old versions say it twice, and the second name wins there.
    for spelling in (f"{name}_dict", name):
        if isinstance(section := config.get(spelling), dict):
            return section
    return {}


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; raises CheckpointError when there is none."""
    step = "expected a transformers folder, with this file as it was published"
    with reading(path, CheckpointError, what="not a JSON file that can be read", step=step):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise CheckpointError(f"holds a {type(content).__name__}, expected an object", at=path)
    return content


def is_transformers(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of a ChineseCLIPModel."""
    return "vision_model.embeddings.patch_embedding.weight" in tensors


def to_reference(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Translates every tensor; query, key and value of the picture tower are joined into in_proj."""
    translated: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if _IGNORED.search(key):
            continue
        if key in _TRANSPOSED:
            translated[_TRANSPOSED[key]] = value.t().contiguous()
        elif ".self_attn.q_proj." in key:
            names = [key.replace(".q_proj.", f".{name}_proj.") for name in "qkv"]
            joined = _rename(key).replace(".self_attn.q_proj.", ".attn.in_proj_")
            translated[joined] = torch.cat([tensors[name] for name in names])
        elif not re.search(r"\.self_attn\.[kv]_proj\.", key):
            translated[_rename(key)] = value
    return translated


def from_reference(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `to_reference`, bit for bit; the parts of in_proj share its memory.

    tensors: those of a whole model with a Vision Transformer, under this package's names, and no others.
    """
    theirs = {ours: name for name, ours in _TRANSPOSED.items()}
    translated: dict[str, Tensor] = {}
    for key, value in tensors.items():
        if key in theirs:
            translated[theirs[key]] = value.t().contiguous()
        elif ".attn.in_proj_" in key:
            for name, part in zip("qkv", value.chunk(3), strict=True):
                translated[_rename(key.replace(".attn.in_proj_", f".self_attn.{name}_proj."), back=True)] = part
        else:
            translated[_rename(key, back=True)] = value
    return translated


def _rename(key: str, *, back: bool = False) -> str:
    """The name here of one there, or the reverse; a name belongs to one part, so at most one prefix fits."""
    old, new = (1, 0) if back else (0, 1)
    for names in _PREFIXES:
        if key.startswith(names[old]):
            key = names[new] + key.removeprefix(names[old])
            break
    for names in _BLOCK_NAMES:
        key = key.replace(names[old], names[new])
    return key


# --- how a folder prepares pictures and texts


def picture_fields(resolution: int) -> dict[str, Any]:
    """What `clip.transforms` does to pictures, in transformers' terms: squeezed, not cropped."""
    size = {"height": resolution, "width": resolution}
    return {
        "do_resize": True,
        "size": size,
        "resample": BICUBIC,
        "do_center_crop": False,
        "crop_size": size,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": MEAN,
        "image_std": STD,
    }


def check_inputs(folder: Path, resolution: int) -> None:
    """Raises CheckpointError where files of the folder ask for other pixels or other words than this package makes.

    A folder without such files says nothing. One that keeps the proportions of pictures, as transformers does where
    nobody told it how Chinese-CLIP was trained, is warned about.
    """
    for name in (PICTURE_FILE, "processor_config.json"):  # transformers 5 writes pictures into its processor's own
        if os.path.isfile(path := folder / name):
            content = read_json(path)
            fields = content if name == PICTURE_FILE else content.get("image_processor")
            if not isinstance(fields, dict):
                continue
            is_squeezed = fields.get("size") not in (resolution, {"shortest_edge": resolution})
            ignored = ["do_center_crop", *([] if fields.get("do_center_crop") else ["crop_size"])]
            ignored += [] if is_squeezed else ["size"]
            for field, wanted in picture_fields(resolution).items():
                if field in fields and field not in ignored and not _is_same(fields[field], wanted):
                    shown = repr(fields[field])[:60]
                    raise CheckpointError(f"{field} is {shown}, expected {wanted}; {_instead(folder)}", at=path)
            if not is_squeezed:
                logger.warning(
                    "%s: keeps the proportions of pictures; here they are squeezed, as Chinese-CLIP was trained; for "
                    "the other, use hf:%s",
                    path,
                    folder,
                )
    if os.path.isfile(path := folder / "vocab.txt"):
        with reading(path, CheckpointError, what="not a vocabulary that can be read", step=_instead(folder)):
            words = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        _check_words(path, words)
    if os.path.isfile(path := folder / "tokenizer.json"):
        model = read_json(path).get("model")
        vocab = model.get("vocab") if isinstance(model, dict) else None
        if not isinstance(vocab, dict) or not all(type(number) is int for number in vocab.values()):
            raise CheckpointError(f"holds no vocabulary of words; {_instead(folder)}", at=path)
        _check_words(path, sorted(vocab, key=vocab.__getitem__))


def _check_words(path: Path, words: list[str]) -> None:
    ours = VOCAB_FILE.read_text(encoding="utf-8").rstrip("\n").split("\n")
    if [word.strip() for word in words] != [word.strip() for word in ours]:
        raise CheckpointError(f"is another vocabulary than that of Chinese-CLIP; {_instead(path.parent)}", at=path)


def _instead(folder: Path) -> str:
    return f"to have pictures and texts prepared as the folder says, use hf:{folder} (cn-clip features, serve, …)"


def _is_same(given: object, expected: object) -> bool:
    if isinstance(expected, dict) and isinstance(given, int):  # one number means a square
        return {given} == set(expected.values())
    if isinstance(expected, (list, tuple)):
        return isinstance(given, list) and len(given) == len(expected) and all(map(_is_same, given, expected))
    if isinstance(expected, float):
        return isinstance(given, (int, float)) and math.isclose(given, expected, abs_tol=1e-5)
    return given == expected

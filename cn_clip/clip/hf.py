"""Names of transformers' ChineseCLIPModel folders, translated into this package's names."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from cn_clip.errors import CheckpointError

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")

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


def weight_file(folder: Path) -> Path:
    """The weight file of a transformers folder; raises CheckpointError when there is none."""
    for name in WEIGHT_FILES:
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"{folder}: a folder without {' or '.join(WEIGHT_FILES)}; expected a transformers folder or a file"
    )


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


def _rename(key: str) -> str:
    for theirs, ours in _PREFIXES:
        if key.startswith(theirs):
            key = ours + key.removeprefix(theirs)
            break
    for theirs, ours in _BLOCK_NAMES:
        key = key.replace(theirs, ours)
    return key

"""Records how the reference treats weights; run it with the interpreter of an environment that has cn_clip 1.6.0:

REFERENCE/bin/python tools/golden/record_weights.py
"""

import gzip
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))
sys.path.insert(0, str(ROOT / "tests"))

import numpy as np  # noqa: E402
import reference_shim  # noqa: E402, F401  (before anything that imports torchvision)
import torch  # noqa: E402
from deterministic import weight  # noqa: E402

from cn_clip.clip.model import CLIP, convert_state_dict, resize_pos_embed  # noqa: E402
from cn_clip.clip.utils import create_model  # noqa: E402

GOLDEN = ROOT / "tests" / "golden"
MODELS = {"ViT-B-16": "RoBERTa-wwm-ext-base-chinese", "RN50": "RBT3-chinese"}
SIDES = ((4, 2), (4, 7), (3, 8))


def record_names() -> None:
    """Which tensors the reference keeps in float32, and what it calls them in its FlashAttention spelling."""
    facts = {}
    for vision, text in MODELS.items():
        state = create_model(f"{vision}@{text}").state_dict()
        facts[vision] = {
            "float32": [name for name, value in state.items() if value.dtype == torch.float32],
            "float16": [name for name, value in state.items() if value.dtype == torch.float16],
            "fused": sorted(convert_state_dict(dict(state))),
        }
    content = gzip.compress(json.dumps(facts).encode(), mtime=0)
    (GOLDEN / "weights.json.gz").write_bytes(content)


def record_position_embeddings() -> None:
    """What the reference's resizing makes of an 8 wide embedding, for grids of `old` to `new` patches a side."""
    arrays = {}
    text = {"vocab_size": 5, "text_hidden_size": 8, "text_num_hidden_layers": 1, "text_num_attention_heads": 1}
    text |= {"text_intermediate_size": 8, "text_max_position_embeddings": 4, "text_type_vocab_size": 1}
    text |= {"text_attention_probs_dropout_prob": 0.0, "text_hidden_dropout_prob": 0.0}
    text |= {"text_hidden_act": "gelu", "text_initializer_range": 0.02}
    vision = {"embed_dim": 4, "vision_layers": 1, "vision_width": 8, "vision_patch_size": 8, "vision_head_width": 8}
    for old, new in SIDES:
        position = torch.from_numpy(weight(f"visual.positional_embedding.{old}", (old**2 + 1, 8)))
        state = {"visual.positional_embedding": position}
        resize_pos_embed(state, CLIP(image_resolution=new * 8, **vision, **text))
        arrays[f"{old}-{new}"] = state["visual.positional_embedding"].numpy()
    np.savez_compressed(GOLDEN / "position_embedding.npz", **arrays)


if __name__ == "__main__":
    record_names()
    record_position_embeddings()

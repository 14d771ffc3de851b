"""Weights, pictures and texts that anyone can make again: numpy only, so that the reference's interpreter runs it too.

Weights are exactly representable in float16, because the reference rounds them to it while loading.
"""

import zlib
from collections.abc import Iterable

import numpy as np

TEXTS = [
    "杰尼龟",
    "妙蛙种子",
    "小火龙",
    "皮卡丘",
    "一只黑白相间的狗在雪地里奔跑，嘴里叼着一个红色的飞盘。",
    "Pikachu 和 iPhone 15",
    "",
]
# The text tower each picture tower is published, or usually paired, with.
TEXT_TOWER = {
    "RN50": "RBT3-chinese",
    "ViT-B-32": "RoBERTa-wwm-ext-base-chinese",
    "ViT-B-16": "RoBERTa-wwm-ext-base-chinese",
    "ViT-L-14": "RoBERTa-wwm-ext-base-chinese",
    "ViT-L-14-336": "RoBERTa-wwm-ext-base-chinese",
    "ViT-H-14": "RoBERTa-wwm-ext-large-chinese",
}
NORM_NAMES = ("ln_", "LayerNorm", "bn", "downsample.1.")


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The tensor called `name`, float32, well conditioned for its place in the network."""
    rng = np.random.Generator(np.random.PCG64(zlib.crc32(name.encode())))
    if name.endswith("num_batches_tracked"):
        return np.zeros(shape, dtype=np.int64)
    uniform = rng.random(shape, dtype=np.float32) * 2 - 1
    if name == "logit_scale":
        values = np.full(shape, 4.0, dtype=np.float32)
    elif name.endswith("running_var") or (any(part in name for part in NORM_NAMES) and name.endswith("weight")):
        values = 1 + uniform * 0.2
    elif name.endswith("bias") or name.endswith("running_mean"):
        values = uniform * 0.1
    elif "embedding" in name:
        values = uniform * (0.1 if "visual" in name else 0.5)
    else:
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else shape[0]
        if name in ("visual.proj", "text_projection"):
            fan_in = shape[0]
        values = uniform * (3 / fan_in) ** 0.5
    return values.astype(np.float16).astype(np.float32)


def state_dict(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """All tensors of a model, given names and shapes."""
    return {name: weight(name, shape) for name, shape in shapes}


def picture_bytes(number: int, height: int = 80, width: int = 100) -> np.ndarray:
    """A smooth colour picture with some noise, uint8 (height, width, 3)."""
    rng = np.random.Generator(np.random.PCG64(number))
    y, x = np.mgrid[0:height, 0:width]
    phases = rng.random((3, 3)) * 6
    waves = [np.sin(x / (5 + 9 * a) + b) * np.cos(y / (4 + 7 * b) + c) for a, b, c in phases]
    noise = rng.random((height, width, 3)) * 40 - 20
    return np.clip(np.stack(waves, axis=-1) * 100 + 128 + noise, 0, 255).astype(np.uint8)


# No dropout, so that every implementation draws the same numbers: none.
SMALL_MODEL = {
    "embed_dim": 32,
    "image_resolution": 32,
    "vision_layers": 2,
    "vision_width": 64,
    "vision_patch_size": 8,
    "vocab_size": 21128,
    "text_attention_probs_dropout_prob": 0.0,
    "text_hidden_act": "gelu",
    "text_hidden_dropout_prob": 0.0,
    "text_hidden_size": 64,
    "text_initializer_range": 0.02,
    "text_intermediate_size": 128,
    "text_max_position_embeddings": 512,
    "text_num_attention_heads": 1,
    "text_num_hidden_layers": 2,
    "text_type_vocab_size": 2,
}


def training_batches(num_batches: int = 5, batch_size: int = 8) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pixels (B, 3, 32, 32) float32 and token ids (B, 12) int64, padded with 0, for SMALL_MODEL."""
    rng = np.random.Generator(np.random.PCG64(7))
    batches = []
    for _ in range(num_batches):
        pixels = rng.standard_normal((batch_size, 3, 32, 32), dtype=np.float32)
        tokens = rng.integers(1, 21128, (batch_size, 12))
        lengths = rng.integers(3, 11, batch_size)
        tokens[np.arange(12) >= lengths[:, None]] = 0
        tokens[:, 0] = 101
        batches.append((pixels, tokens))
    return batches

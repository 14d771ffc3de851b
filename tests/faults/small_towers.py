"""Towers of few numbers under names that training takes: a checkpoint of 2 MB, not of 150, for runs by the hundred."""

from typing import Any

from cn_clip import zoo

VISION, TEXT = "RN-Tiny-64", "RBT3-chinese"
_VISION_VALUES = {"embed_dim": 8, "vision_layers": (1, 1, 1, 1), "vision_width": 2}
_TEXT_VALUES = {
    "text_hidden_size": 8,
    "text_intermediate_size": 16,
    "text_num_attention_heads": 1,
    "text_num_hidden_layers": 1,
}


def shrink() -> dict[str, Any]:
    """Makes the towers small for this process and its children, and returns the options of training that name them."""
    for config, values in ((zoo.vision_config(VISION), _VISION_VALUES), (zoo.text_config(TEXT), _TEXT_VALUES)):
        for name, value in values.items():
            object.__setattr__(config, name, value)  # frozen, and kept by a cache
    return {"vision_model": VISION, "text_model": TEXT}

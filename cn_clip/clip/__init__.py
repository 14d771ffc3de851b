"""The public Python API: load a model, prepare pictures and text, turn them into vectors.

Names are imported when first asked for: `Encoder` over an exported model runs without PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cn_clip.clip.bert_tokenizer import FullTokenizer
    from cn_clip.clip.encoder import Encoder
    from cn_clip.clip.loading import create_model, load, load_from_name
    from cn_clip.clip.tokenizer import tokenize
    from cn_clip.clip.transforms import image_transform
    from cn_clip.clip.weights.checkpoint import convert_state_dict
    from cn_clip.zoo import available_models

    _tokenizer: FullTokenizer

__all__ = [
    "Encoder",
    "FullTokenizer",
    "available_models",
    "convert_state_dict",
    "create_model",
    "image_transform",
    "load",
    "load_from_name",
    "tokenize",
]

_HOMES = {
    "Encoder": "cn_clip.clip.encoder",
    "FullTokenizer": "cn_clip.clip.bert_tokenizer",
    "available_models": "cn_clip.zoo",
    "convert_state_dict": "cn_clip.clip.weights.checkpoint",
    "create_model": "cn_clip.clip.loading",
    "image_transform": "cn_clip.clip.transforms",
    "load": "cn_clip.clip.loading",
    "load_from_name": "cn_clip.clip.loading",
    "tokenize": "cn_clip.clip.tokenizer",
}
# Reading the vocabulary takes longer than most imports; the modules are attributes of the package in Chinese-CLIP too.
_MODULES = ("bert_tokenizer", "configuration_bert", "model", "modeling_bert", "utils")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name == "_tokenizer":
        from cn_clip.clip.bert_tokenizer import FullTokenizer

        value = FullTokenizer()
    elif name in _MODULES:
        value = importlib.import_module(f"cn_clip.clip.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if __name__ == "clip":  # found in cn_clip/, which is on the path
    from cn_clip import drop_in

    drop_in.lead(__name__)

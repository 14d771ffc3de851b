"""The public Python API: load a model, prepare pictures and text, turn them into vectors."""

from typing import TYPE_CHECKING, Any

from cn_clip.clip.checkpoint import convert_state_dict
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.loading import available_models, create_model, load, load_from_name
from cn_clip.clip.tokenizer import tokenize
from cn_clip.clip.transforms import image_transform

if TYPE_CHECKING:
    from cn_clip.clip.bert_tokenizer import FullTokenizer

    _tokenizer: FullTokenizer

__all__ = [
    "Encoder",
    "available_models",
    "convert_state_dict",
    "create_model",
    "image_transform",
    "load",
    "load_from_name",
    "tokenize",
]


def __getattr__(name: str) -> Any:
    """`_tokenizer` is built when first asked for: reading the vocabulary takes longer than most imports."""
    if name == "_tokenizer":
        from cn_clip.clip.bert_tokenizer import FullTokenizer

        globals()["_tokenizer"] = tokenizer = FullTokenizer()
        return tokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

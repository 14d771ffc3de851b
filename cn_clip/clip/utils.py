"""The import path of Chinese-CLIP guides; the code is in `loading`, `tokenizer` and `transforms`."""

from cn_clip.clip.loading import create_model, load, load_from_name
from cn_clip.clip.tokenizer import tokenize
from cn_clip.clip.transforms import image_transform
from cn_clip.zoo import available_models

__all__ = ["available_models", "create_model", "image_transform", "load", "load_from_name", "tokenize"]

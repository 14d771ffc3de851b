"""The import path of Chinese-CLIP guides; the code is in `loading`, `tokenizer`, `transforms`, `hub` and `model`."""

from cn_clip import zoo
from cn_clip.clip import _tokenizer
from cn_clip.clip.hub import download
from cn_clip.clip.loading import create_model, load, load_from_name, restore_model
from cn_clip.clip.model import CLIP, convert_weights
from cn_clip.clip.tokenizer import tokenize
from cn_clip.clip.transforms import Normalize, Resize, ToTensor, _convert_to_rgb, image_transform
from cn_clip.zoo import available_models

__all__ = [
    "CLIP",
    "Normalize",
    "Resize",
    "ToTensor",
    "_convert_to_rgb",
    "_tokenizer",
    "available_models",
    "convert_weights",
    "create_model",
    "image_transform",
    "load",
    "load_from_name",
    "restore_model",
    "tokenize",
]

# Chinese-CLIP's five, in the form that its deployment guide reads.
_MODELS = {name: (published.repo, published.filename) for name, published in zoo.PUBLISHED.items()}
_MODEL_INFO = {
    name: {"struct": f"{published.vision}@{published.text}", "input_resolution": published.resolution}
    for name, published in zoo.PUBLISHED.items()
}
_HUGGINGFACE_ORG, _MODELSCOPE_ORG = "OFA-Sys", "AI-ModelScope"
_convert_image_to_rgb = _convert_to_rgb


def _download(modelname: str, root: str, use_modelscope: bool = False) -> str:
    """The path of a published checkpoint in the folder `root`, downloaded if it is not there; as `hub.download`."""
    return str(download(zoo.PUBLISHED[modelname], root, use_modelscope=use_modelscope))

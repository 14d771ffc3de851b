"""The import path of Chinese-CLIP guides, to `loading`, `tokenizer`, `transforms`, `weights.hub` and `model`."""

from cn_clip import zoo
from cn_clip.clip import _tokenizer as _tokenizer
from cn_clip.clip.loading import create_model as create_model
from cn_clip.clip.loading import load, load_from_name
from cn_clip.clip.model import CLIP as CLIP
from cn_clip.clip.model import convert_weights as convert_weights
from cn_clip.clip.model import restore_model as restore_model
from cn_clip.clip.tokenizer import tokenize
from cn_clip.clip.transforms import Normalize as Normalize
from cn_clip.clip.transforms import Resize as Resize
from cn_clip.clip.transforms import ToTensor as ToTensor
from cn_clip.clip.transforms import _convert_to_rgb as _convert_to_rgb
from cn_clip.clip.transforms import image_transform
from cn_clip.clip.weights.hub import download
from cn_clip.zoo import available_models

# What `import *` takes, as in Chinese-CLIP; the other names are imported by themselves.
__all__ = ["available_models", "image_transform", "load", "load_from_name", "tokenize"]

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

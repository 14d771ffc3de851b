"""Models of the package open_clip, by the name of an architecture and a weight file."""

# B batch, R resolution, L tokens

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cn_clip.clip.backends.base import Parts, Pixels, TokenIds
from cn_clip.clip.backends.pytorch import ForeignTowers
from cn_clip.clip.families.names import ForeignName
from cn_clip.clip.transforms import Decode, draft_side, in_8_bits
from cn_clip.clip.weights.file_kinds import what_it_is
from cn_clip.errors import CheckpointError, ConfigError, first_sentence
from cn_clip.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

_VISUAL_PARTS = ("visual.",)
# How open_clip's entry of a tag treats pictures: its names, and those of the settings that replace its default.
_PIXELS = {
    "mean": "image_mean",
    "std": "image_std",
    "interpolation": "image_interpolation",
    "resize_mode": "image_resize_mode",
}


class ComposedPictures:
    """open_clip's transform for validation as a `PictureTransform`."""

    def __init__(self, compose: Any, resolution: int, decode: Decode) -> None:
        self._compose, self.resolution, self.decode = compose, resolution, decode

    @property
    def draft_size(self) -> int | None:
        """The side that must remain when a JPEG is decoded at a fraction of its size; None: decoded whole."""
        return draft_side(self.decode, self.resolution)

    def array(self, image: "Image", out: Pixels | None = None) -> Pixels:
        """Normalised pixels, float32 (3, R, R), in `out` if it is given."""
        pixels_3RR: Pixels = self(image).numpy()
        if out is None:
            return pixels_3RR
        out[...] = pixels_3RR
        return out

    def __call__(self, image: "Image") -> Tensor:
        pixels_3RR: Tensor = self._compose(in_8_bits(image, self.decode))
        return pixels_3RR


class PaddedTexts:
    """open_clip's tokenizer as a `TextTransform`: it pads every text to one length itself."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.context_length = int(tokenizer.context_length)

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, padded to the model's length by its tokenizer."""
        rows: list[list[int]] = self._tokenizer(list(texts)).tolist() if texts else []
        return rows

    def pad(self, rows: Sequence[Sequence[int]]) -> TokenIds:
        """The rows as one int64 array (B, L)."""
        return np.array(rows, dtype=np.int64).reshape(len(rows), self.context_length)


def open_model(
    name: ForeignName,
    *,
    device: torch.device,
    precision: str = "fp32",
    num_threads: int | None = None,
    download_root: str | Path | None = None,
    decode: Decode = "exact",
) -> Parts:
    """An architecture with the weights of a file, or of a tag that open_clip knows and downloads.

    Pictures are treated as the tag says, also for a file: as the tag behind the architecture, else as all its tags.
    Raises CheckpointError for weights that cannot be read or do not fit, ConfigError for an architecture or a tag that
    there is not, or where the tags of a file's architecture differ; MissingExtraError without open_clip.
    """
    open_clip = require("open_clip", extra="open-clip", purpose=str(name))
    architecture, file = name.architecture.partition(":")[0], Path(name.source).expanduser()
    _check(name, open_clip)
    is_file = os.path.isfile(file)
    pixels = _pixels_of_tags(name, open_clip) if is_file else {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that are still to come
            model, _, compose = open_clip.create_model_and_transforms(
                architecture,
                pretrained=None if is_file else name.source,
                precision="fp32",
                pretrained_hf=False,
                cache_dir=None if download_root is None else str(download_root),
                **pixels,
            )
            if is_file:
                open_clip.load_checkpoint(model, str(file), strict=True, weights_only=True)
            texts = PaddedTexts(open_clip.get_tokenizer(architecture))
    except Exception as error:  # of no common type
        if is_file and (known := what_it_is(file)) is not None:
            raise CheckpointError(known, at=file) from error
        raise CheckpointError(f"open_clip cannot open it ({first_sentence(error)})", at=name) from error
    size = model.visual.image_size
    resolution = int(size[0] if isinstance(size, (tuple, list)) else size)
    towers = ForeignTowers(
        model,
        encode_image=model.encode_image,
        encode_text=model.encode_text,
        resolution=resolution,
        logit_scale=float(model.logit_scale.detach().exp()),
        visual_parts=_VISUAL_PARTS,
        device=device,
        precision=precision,
        num_threads=num_threads,
    )
    return Parts(towers, ComposedPictures(compose, resolution, decode), texts)


def _check(name: ForeignName, open_clip: Any) -> None:
    architecture, is_tagged, tag = name.architecture.partition(":")
    if architecture not in open_clip.list_models():
        raise ConfigError(f"{name}: open_clip has no architecture {architecture!r}; open_clip.list_models() has all")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    is_file = os.path.isfile(Path(name.source).expanduser())
    if not is_file and name.source not in tags:
        raise CheckpointError(
            f"{name.source} is no file, and no weights that open_clip knows of {architecture}", at=name
        )
    if is_tagged and not is_file:
        raise ConfigError(f"{name}: a tag goes before a file alone; give open_clip:{architecture}@{name.source}")
    if is_tagged and tag not in tags:
        raise ConfigError(f"{name}: open_clip knows no weights {tag!r} of {architecture}, but {', '.join(tags)}")


def _pixels_of_tags(name: ForeignName, open_clip: Any) -> dict[str, Any]:
    """How pictures are treated for a file: open_clip keeps that with its tags, and a file has none."""
    architecture, _, tag = name.architecture.partition(":")
    tags = [tag] if tag else open_clip.list_pretrained_tags_by_model(architecture)
    entries = [open_clip.get_pretrained_cfg(architecture, one) for one in tags]
    settings = [
        {ours: entry[theirs] for theirs, ours in _PIXELS.items() if entry.get(theirs) is not None} for entry in entries
    ]
    if any(one != settings[0] for one in settings):
        raise ConfigError(
            f"{name}: weights of {architecture} take pictures in different ways; name those that this file was trained "
            f"like, as in open_clip:{architecture}:{tags[0]}@{name.source} ({', '.join(tags)})"
        )
    return settings[0] if settings else {}

"""Models of the package open_clip, by the name of an architecture and a weight file, or as a folder."""

# B batch, R resolution, L tokens

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cn_clip.clip.backends.base import Inputs, Pixels, TokenIds
from cn_clip.clip.backends.pytorch import ForeignTowers
from cn_clip.clip.families.folders import folder_of
from cn_clip.clip.families.names import ForeignName
from cn_clip.clip.transforms import Decode, draft_side, in_8_bits
from cn_clip.clip.weights.file_kinds import what_it_is
from cn_clip.clip.weights.hf import read_json
from cn_clip.errors import CheckpointError, CnClipError, ConfigError, first_sentence
from cn_clip.extras import require

if TYPE_CHECKING:
    from PIL.Image import Image

CONFIG_FILE = "open_clip_config.json"
_VISUAL_PARTS = ("visual.",)
# In the names of its architectures, and of the tokenizer that their configs name.
_SIGLIP_2 = "siglip2"
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


def open_inputs(name: ForeignName, *, download_root: str | Path | None = None, decode: Decode = "exact") -> Inputs:
    """How pictures and texts of an architecture or a folder are prepared; no weights are read.

    Pictures are treated as the tag says, also for a file: as the tag behind the architecture, else as all its tags.
    Texts of SigLIP 2 are made lower case and no more: open_clip would leave out their punctuation too, which the model
    was trained with (arXiv 2502.14786), and transformers keeps.
    Raises as `open_towers`.
    """
    open_clip, opened = _library(name), _opened(name, download_root)
    with _explained(name), _silently(), torch.device("meta"):
        model, _, compose = open_clip.create_model_and_transforms(
            opened, device="meta", load_weights=False, **_settings(name, open_clip, download_root)
        )
    with _explained(name):
        config = (open_clip.get_model_config(opened) or {}).get("text_cfg") or {}
        # What a folder asks of its tokenizer is code of its own at worst: that is not run.
        of_hub = {"trust_remote_code": False} if config.get("hf_tokenizer_name") else {}
        tokenizer = open_clip.get_tokenizer(opened, **of_hub)
        if any(_SIGLIP_2 in str(one).lower() for one in (name.architecture, config.get("hf_tokenizer_name"))):
            tokenizer.clean_fn = str.lower
    return Inputs(ComposedPictures(compose, _resolution(model), decode), PaddedTexts(tokenizer))


def open_towers(
    name: ForeignName,
    *,
    device: torch.device,
    precision: str = "fp32",
    num_threads: int | None = None,
    download_root: str | Path | None = None,
) -> ForeignTowers:
    """An architecture with the weights of a file, or of a tag that open_clip knows and downloads; or a folder.

    Raises CheckpointError for weights that cannot be read or do not fit, ConfigError for an architecture or a tag that
    there is not, or where the tags of a file's architecture differ; MissingExtraError without open_clip.
    """
    open_clip, opened = _library(name), _opened(name, download_root)
    file = _file(name)
    with _explained(name):
        settings = _settings(name, open_clip, download_root)
        has_weights = None if file is not None or name.folder else name.source
        model, _, _ = open_clip.create_model_and_transforms(
            opened, pretrained=has_weights, load_weights=file is None, precision="fp32", **settings
        )
        if name.folder and not any(weights_of(folder_of(name, download_root=download_root))):
            raise CheckpointError("holds no weights; expected open_clip_model.safetensors", at=name)
        if file is not None:
            open_clip.load_checkpoint(model, str(file), strict=True, weights_only=True)
    resolution = _resolution(model)
    return ForeignTowers(
        model,
        encode_image=lambda pixels_B3RR: model.encode_image(pixels_B3RR.to(model.logit_scale.dtype)),
        encode_text=model.encode_text,
        resolution=resolution,
        shape=(3, resolution, resolution),
        logit_scale=float(model.logit_scale.detach().exp()),
        visual_parts=_VISUAL_PARTS,
        device=device,
        precision=precision,
        num_threads=num_threads,
    )


def _library(name: ForeignName) -> Any:
    open_clip = require("open_clip", extra="open-clip", purpose=str(name))
    if not name.folder:
        _check(name, open_clip)
    return open_clip


def _opened(name: ForeignName, download_root: str | Path | None) -> str:
    """What open_clip calls it: an architecture, or a folder, which is here once it was downloaded."""
    if not name.folder:
        return name.architecture.partition(":")[0]
    folder = folder_of(name, download_root=download_root)
    config = read_json(folder / CONFIG_FILE)
    if not isinstance(config.get("model_cfg"), dict):
        raise CheckpointError(f"{CONFIG_FILE} has no model_cfg; expected a folder of open_clip", at=folder)
    text = config["model_cfg"].get("text_cfg") or {}
    if "hf_model_name" in text and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{CONFIG_FILE}: its text tower is {text['hf_model_name']} of the hub, which is not part of the folder; "
            "give the architecture and the weight file, open_clip:ARCHITECTURE@FILE",
            at=folder,
        )
    return f"local-dir:{folder}"


def _file(name: ForeignName) -> Path | None:
    """The weight file that was named; None for a tag or a folder."""
    file = Path(name.source).expanduser()
    return file if not name.folder and os.path.isfile(file) else None


def _settings(name: ForeignName, open_clip: Any, download_root: str | Path | None) -> dict[str, Any]:
    """What both ways of making a model are told."""
    return {
        "pretrained_hf": False,
        "cache_dir": None if download_root is None else str(download_root),
        **(_pixels_of_tags(name, open_clip) if _file(name) is not None else {}),
    }


def weights_of(folder: Path) -> Iterator[Path]:
    """The weight files of a folder."""
    return (path for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))


def _resolution(model: Any) -> int:
    size = model.visual.image_size
    return int(size[0] if isinstance(size, (tuple, list)) else size)


@contextlib.contextmanager
def _silently() -> Iterator[None]:
    """Without what open_clip logs of a model that has no weights yet."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(previous)


@contextlib.contextmanager
def _explained(name: ForeignName) -> Iterator[None]:
    """Turns whatever open_clip raises, of no common type, into a sentence; without its warnings."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights that are still to come
            yield
    except CnClipError:
        raise
    except Exception as error:
        file = _file(name)
        if file is not None and (known := what_it_is(file)) is not None:
            raise CheckpointError(known, at=file) from error
        raise CheckpointError(f"open_clip cannot open it ({first_sentence(error)})", at=name) from error


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

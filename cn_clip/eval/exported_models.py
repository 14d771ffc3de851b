"""Features from two exported files, ONNX or TensorRT: what the two commands that name such files share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from cn_clip import zoo
from cn_clip.errors import ConfigError
from cn_clip.features import options as feature_options
from cn_clip.zoo import TextName, VisionName

if TYPE_CHECKING:
    from cn_clip.clip.backends.base import ExportedBackend

# Opens the files of the two towers; None where a tower is not wanted.
OpenFiles: TypeAlias = "Callable[[str | None, str | None], ExportedBackend]"


@dataclass(frozen=True)
class Settings(feature_options.Settings):
    """The settings of both commands."""

    img_batch_size: int = 1
    """Pictures in a batch; a file made for one batch size is fed that many at a time"""
    text_batch_size: int = 1
    """Texts in a batch; a file made for one batch size is fed that many at a time"""
    vision_model: VisionName | None = None
    """Picture tower, to be checked against the file; default: what the file holds"""
    text_model: TextName | None = None
    """Text tower; the file alone decides"""


def check_files(options: Settings, *, image: tuple[str, str | None], text: tuple[str, str | None]) -> None:
    """Raises ConfigError when the file of a tower that is wanted is not given. image, text: the flag and its value."""
    for kind, (flag, path) in {"image": image, "text": text}.items():
        if kind in options.kinds and path is None:
            raise ConfigError(f"{flag}: expected the file of the {kind} model, which --extract-{kind}-feats needs")


def run(options: Settings, image: str | None, text: str | None, open_files: OpenFiles) -> None:
    """Extracts with two files; raises CnClipError as `extraction.extract`, and when a file is not the model named."""
    from cn_clip.clip import opening
    from cn_clip.clip.encoder import Encoder
    from cn_clip.features import extraction

    say = extraction.begin(options)
    image, text = image if "image" in options.kinds else None, text if "text" in options.kinds else None
    opened = open_files(image, text)
    check_vision(opened, options.vision_model)
    opening.check_context_length(opened, options.context_length)
    for tower in filter(None, (opened.image, opened.text)):
        say(f"=> opened '{tower.path}' ({tower.provider or 'TensorRT'})")
    encoder = Encoder(opened, context_length=options.context_length, decode=options.decode)
    extraction.extract(options, encoder, opening.tower_identity(opened), say)


def check_vision(backend: "ExportedBackend", name: str | None) -> None:
    """Raises ConfigError when the picture tower cannot be the architecture called `name`."""
    if name is None or backend.image is None:
        return
    config, facts = zoo.vision_config(name), backend.image.facts
    expected, found = (config.image_resolution, config.embed_dim), (facts.resolution, facts.embed_dim)
    if found != expected:
        raise ConfigError(
            f"--vision-model {name}: takes {expected[0]} pixels a side and gives {expected[1]} dimensions, but "
            f"{backend.image.path} takes {found[0]} and gives {found[1]}; name its own model, or leave the flag out"
        )

"""The `--model-arch` of the deployment commands, and the model it and a checkpoint name."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

import tyro

from cn_clip import zoo
from cn_clip.errors import ConfigError
from cn_clip.option_types import ConvertText, ConvertVision, Json

if TYPE_CHECKING:
    from cn_clip.clip.backends.base import Kind
    from cn_clip.clip.model import CLIP

ArchName: TypeAlias = Literal[
    "RN50",
    "ViT-B-16",
    "ViT-L-14",
    "ViT-L-14-336",
    "ViT-H-14",
    "ViT-B-32",
    "Emoji-Tiny",
    "RN-Small-64",
    "RN-Tiny-64",
    "ViT-Tiny-64",
]
RequiredArch: TypeAlias = Annotated[
    ArchName | None,
    tyro.conf.arg(
        help="The model: a published or bundled one, or the picture tower of the checkpoint",
        help_behavior_hint="(required)",
    ),
]


@dataclass(frozen=True)
class ConversionOptions:
    """What the commands that convert a PyTorch model share; each adds where its files go, and in what form."""

    model_arch: RequiredArch = None
    pytorch_ckpt_path: str | None = None
    """The checkpoint; default: the published one of that name"""
    download_root: str | None = None
    """Where published checkpoints are kept; default: ~/.cache/clip"""
    convert_text: ConvertText = False
    convert_vision: ConvertVision = False
    json: Json = False

    @property
    def kinds(self) -> "list[Kind]":
        """The towers to convert, in the order they are told of."""
        wanted: list[tuple[Kind, bool]] = [("text", self.convert_text), ("image", self.convert_vision)]
        return [kind for kind, is_wanted in wanted if is_wanted]

    def check_towers(self) -> None:
        """Raises ConfigError when no tower is asked for."""
        if not self.kinds:
            raise ConfigError("give --convert-text, --convert-vision, or both")


def check_arch(arch: ArchName | None) -> None:
    """Raises ConfigError when no architecture was given."""
    if arch is None:
        raise ConfigError("--model-arch: expected the architecture of the model, such as ViT-B-16")


def vision_name(arch: ArchName) -> str:
    """The picture tower of a model; the text tower follows from the weights."""
    entry = zoo.named(arch)
    return entry.vision if entry else arch


def open_arch(
    arch: ArchName,
    checkpoint: str | None,
    *,
    flag: str,
    download_root: str | None = None,
    vision: str | None = None,
    text: str | None = None,
) -> "CLIP":
    """The float32 model of a checkpoint, or else the published or bundled one of that name; on the CPU, in eval mode.

    flag: the one that gives the checkpoint, for messages. vision, text: towers other than those of the architecture.
    Raises ConfigError when nobody has published such a model,
    CheckpointError when the checkpoint is of another architecture, DownloadError.
    """
    from cn_clip.clip.loading import open_model

    if checkpoint is None and zoo.named(arch) is None:
        raise ConfigError(f"--model-arch {arch}: there are no published weights of it; give {flag}")
    if checkpoint is None:
        return open_model(arch, vision=vision, text=text, download_root=download_root)[0]
    return open_model(checkpoint, vision=vision or vision_name(arch), text=text)[0]

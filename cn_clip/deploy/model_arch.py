"""What the deployment commands share: `--model-arch` and other options, and the prefixes that they write at."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import tyro

from cn_clip import zoo
from cn_clip.clip.backends.names import Kind
from cn_clip.errors import ConfigError
from cn_clip.option_types import ConvertText, ConvertVision, Json

# The prefix of examples in messages.
EXAMPLE = "vit-b-16"
# Of a tower: its name in flags and messages.
TITLES: dict[Kind, str] = {"text": "text", "image": "vision"}
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
    def kinds(self) -> list[Kind]:
        """The towers to convert, in the order of the messages."""
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


def check_targets(flag: str, prefix: str | Path, targets: Iterable[Path], *, are_folders: bool = False) -> None:
    """Raises ConfigError, naming the flag, when files (or folders) with that prefix cannot be written there.

    Makes nothing: a folder that is not there yet is good where it can be made.
    """
    given = os.fspath(prefix)
    if not given:
        raise ConfigError(f"{flag}: expected a prefix such as out/{EXAMPLE}, got ''")
    if given.endswith(("/", os.sep)):
        raise ConfigError(f"{flag} {given}: ends like a folder; give a prefix in it, such as {Path(given, EXAMPLE)}")
    if Path(given).is_dir():
        raise ConfigError(f"{flag} {given}: is a folder; give a prefix in it, such as {Path(given, EXAMPLE)}")
    above = next(folder for folder in Path(given).absolute().parents if os.path.lexists(folder))
    reason = None if above.is_dir() else "Not a directory"
    if reason is None and not os.access(above, os.W_OK | os.X_OK):
        reason = "Permission denied"
    if reason:
        raise ConfigError(f"{flag} {given}: cannot be written ({reason}); choose another folder")
    for target in targets:
        if target.exists() and target.is_dir() != are_folders:
            kind = "a folder" if target.is_dir() else "a file"
            raise ConfigError(f"{flag} {given}: {target} is {kind}; choose another prefix")

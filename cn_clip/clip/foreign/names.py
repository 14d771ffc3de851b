"""Names of models of other families: `hf:FOLDER` and `open_clip:ARCHITECTURE@FILE`; needs no PyTorch."""

import os
import re
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias, get_args

from cn_clip.errors import CheckpointError, ConfigError

Scheme: TypeAlias = Literal["hf", "open_clip"]
SCHEMES: tuple[Scheme, ...] = get_args(Scheme)
FORMS = "hf:FOLDER or open_clip:ARCHITECTURE@FILE"

# An id of the hub, perhaps with a branch, a tag or a commit: google/siglip-base-patch16-224@main.
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@([\w.-]+(?:/[\w.-]+)*))?")
# Weights, configurations and vocabularies: every file of a transformers folder that can change a row.
_DECIDING = re.compile(r".*\.(safetensors|bin|json|txt|model)")


class ForeignName(NamedTuple):
    """place: a folder or a hub id, perhaps with @REVISION (hf), a weight file or a tag (open_clip).

    architecture: of open_clip, with `:TAG` behind it where a file takes its pictures as the weights of that tag do.
    """

    scheme: Scheme
    place: str
    architecture: str = ""

    def __str__(self) -> str:
        return f"{self.scheme}:{self.architecture}{'@' if self.architecture else ''}{self.place}"


def is_foreign(name: object) -> bool:
    """Whether a model's name begins as those of other families do."""
    return isinstance(name, str) and name.partition(":")[0] in SCHEMES and ":" in name


def refuse(name: object) -> None:
    """Raises CheckpointError for the name of a model of another family, where only Chinese-CLIP is taken."""
    if is_foreign(name):
        raise CheckpointError(
            f"{name}: only Chinese-CLIP is taken here; other families are taken by Encoder and cn-clip features, "
            "zeroshot, evaluate, linear-probe, index and serve"
        )


def parse(name: str) -> ForeignName:
    """The parts of a name for which `is_foreign`; raises ConfigError for an incomplete one."""
    scheme, _, rest = name.partition(":")
    if scheme == "hf" and rest:
        return ForeignName("hf", rest)
    architecture, _, place = rest.partition("@")
    if scheme == "open_clip" and architecture and place:
        return ForeignName("open_clip", place, architecture)
    raise ConfigError(f"model {name!r}: expected {FORMS}")


def absolute(name: str) -> str:
    """The name with a local path from the root on, for those who open it from another folder."""
    parsed = parse(name)
    path = Path(parsed.place).expanduser()
    return str(parsed._replace(place=str(path.absolute()))) if os.path.exists(path) else name


def folder_of(name: ForeignName, *, download_root: str | Path | None = None) -> Path:
    """The transformers folder of a name, downloaded if it is a hub id; raises CheckpointError, DownloadError.

    download_root: where downloads are kept; default: the cache of the hub's client.
    """
    path = Path(name.place).expanduser()
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise CheckpointError(f"{name}: {path} is a file; expected a transformers folder, with config.json in it")
    of_hub = _HUB_ID.fullmatch(name.place)
    if of_hub is None:
        raise CheckpointError(
            f"{name}: no such folder; expected a transformers folder, with config.json in it, or an id of the hub, "
            "OWNER/NAME or OWNER/NAME@REVISION"
        )
    from cn_clip.clip.foreign.snapshots import snapshot

    return snapshot(of_hub[1], of_hub[2], download_root=download_root)


def files_of(name: str, *, download_root: str | Path | None = None) -> list[Path]:
    """The local files that decide on the rows of a model; of open_clip's tags none. Raises as `folder_of`."""
    parsed = parse(name)
    if parsed.scheme == "open_clip":
        file = Path(parsed.place).expanduser()
        return [file] if os.path.isfile(file) else []
    folder = folder_of(parsed, download_root=download_root)
    return [one for one in sorted(folder.iterdir()) if one.is_file() and _DECIDING.fullmatch(one.name)]

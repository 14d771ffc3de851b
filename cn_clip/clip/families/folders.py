"""The files of a model of another family: a folder here, or one of the Hugging Face hub in its client's own cache."""

import os
import re
from pathlib import Path

from cn_clip.clip.families.names import ForeignName, parse
from cn_clip.clip.weights import hub
from cn_clip.errors import CheckpointError

# Weights, configurations and vocabularies: every file of a folder that can change a row.
_DECIDING = re.compile(r".*\.(safetensors|bin|pt|json|txt|model|jinja)")


def folder_of(name: ForeignName, *, download_root: str | Path | None = None) -> Path:
    """The folder of a name, downloaded if it is a hub id; raises CheckpointError, DownloadError.

    download_root: where downloads are kept; default: the cache of the hub's client.
    """
    path = Path(name.source).expanduser()
    expected = (
        "a folder of open_clip, with open_clip_config.json in it"
        if name.folder
        else ("a transformers folder, with config.json in it")
    )
    if name.folder != "hf-hub":
        if os.path.isdir(path):
            return path
        if os.path.exists(path):
            raise CheckpointError(f"{path} is a file; expected {expected}", at=name)
    of_hub = None if name.folder == "local-dir" else hub.HUB_ID.fullmatch(name.source)
    if of_hub is None:
        more = "" if name.folder == "local-dir" else ", or an id of the hub, OWNER/NAME or OWNER/NAME@REVISION"
        raise CheckpointError(f"no such folder; expected {expected}{more}", at=name)
    return hub.snapshot(of_hub[1], of_hub[2], name=str(name), download_root=download_root)


def files_of(name: str, *, download_root: str | Path | None = None) -> list[Path]:
    """The local files that decide on the rows of a model; of open_clip's tags none. Raises as `folder_of`."""
    parsed = parse(name)
    if parsed.architecture:
        file = Path(parsed.source).expanduser()
        return [file] if os.path.isfile(file) else []
    folder = folder_of(parsed, download_root=download_root)
    # Parts of a model of sentence-transformers lie in folders of their own.
    found = sorted(folder.rglob("*") if parsed.scheme == "st" else folder.iterdir())
    return [one for one in found if one.is_file() and _DECIDING.fullmatch(one.name)]

"""From `hf:…` or `open_clip:…` to files, and to the parts of an `Encoder`: what `Encoder` and the commands call.

The files are a folder here, or one of the Hugging Face hub in its client's own cache.
"""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from cn_clip import ranks, zoo
from cn_clip.clip.backends.names import BackendName, check_precision
from cn_clip.clip.families import names
from cn_clip.clip.families.names import ForeignName, is_foreign, parse
from cn_clip.clip.transforms import Decode
from cn_clip.clip.weights import hub
from cn_clip.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from cn_clip.clip.backends.base import Parts

# Weights, configurations and vocabularies: every file of a transformers folder that can change a row.
_DECIDING = re.compile(r".*\.(safetensors|bin|json|txt|model)")


def open_parts(
    name: str,
    *,
    backend: BackendName = "torch",
    precision: str = "fp32",
    device: "str | torch.device | None" = None,
    num_threads: int | None = None,
    download_root: "str | Path | None" = None,
    decode: Decode = "exact",
) -> "Parts":
    """The towers, the picture transform and the tokenizer of a model of another family.

    name: `hf:FOLDER`, a transformers folder or an id of the Hugging Face hub; `open_clip:ARCHITECTURE@FILE`, or a tag
    instead of the file. device: default CUDA where there is one. download_root: where downloads are kept.
    Raises CnClipError: no such model, a family that is not known, or a package that is not installed.
    """
    names.check(name, backend)
    check_precision("torch", precision)
    parsed = parse(name)
    chosen = ranks.choose_device(device)
    if parsed.scheme == "hf":
        from cn_clip.clip.families.hf_models import open_folder

        folder = folder_of(parsed, download_root=download_root)
        return open_folder(folder, device=chosen, precision=precision, num_threads=num_threads, decode=decode)
    from cn_clip.clip.families.open_clip_models import open_model

    return open_model(
        parsed,
        device=chosen,
        precision=precision,
        num_threads=num_threads,
        download_root=download_root,
        decode=decode,
    )


def resolved(model: str | Path, *, download_root: str | Path | None = None) -> str | Path:
    """What opens a model that is named by an id of the hub alone, or is a folder of another family; others as they are.

    A folder of transformers whose config.json names another family becomes `hf:FOLDER`. An id of the hub,
    "OFA-Sys/chinese-clip-vit-base-patch16", becomes the folder that was downloaded.
    Raises DownloadError.
    """
    if is_foreign(model):
        return model
    folder = Path(model)
    if hub.is_hub_name(model):
        folder = hub.weight_file(model, download_root=download_root)
    elif not os.path.isdir(model):
        return model
    return f"hf:{folder}" if _family_of(folder) not in ("chinese_clip", "") else folder


def _family_of(folder: Path) -> str:
    """The `model_type` of a folder's config.json; "" where there is none, or nobody can tell."""
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # nested thousands deep
        return ""
    found = content.get("model_type") if isinstance(content, dict) else None
    return found if isinstance(found, str) else ""


def folder_of(name: ForeignName, *, download_root: str | Path | None = None) -> Path:
    """The transformers folder of a name, downloaded if it is a hub id; raises CheckpointError, DownloadError.

    download_root: where downloads are kept; default: the cache of the hub's client.
    """
    path = Path(name.source).expanduser()
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise CheckpointError(f"{path} is a file; expected a transformers folder, with config.json in it", at=name)
    of_hub = hub.HUB_ID.fullmatch(name.source)
    if of_hub is None:
        raise CheckpointError(
            "no such folder; expected a transformers folder, with config.json in it, or an id of the hub, "
            "OWNER/NAME or OWNER/NAME@REVISION",
            at=name,
        )
    return hub.snapshot(of_hub[1], of_hub[2], name=str(name), download_root=download_root)


def files_of(name: str, *, download_root: str | Path | None = None) -> list[Path]:
    """The local files that decide on the rows of a model; of open_clip's tags none. Raises as `folder_of`."""
    parsed = parse(name)
    if parsed.scheme == "open_clip":
        file = Path(parsed.source).expanduser()
        return [file] if os.path.isfile(file) else []
    folder = folder_of(parsed, download_root=download_root)
    return [one for one in sorted(folder.iterdir()) if one.is_file() and _DECIDING.fullmatch(one.name)]


def full_name(model: str) -> str:
    """A published name or an id of the hub as it is, a path from the root on: for those who open it elsewhere."""
    if is_foreign(model):
        return names.absolute(model)
    return model if zoo.named(model) or hub.is_hub_name(model) else str(Path(model).absolute())

"""From `hf:…` or `open_clip:…` to files, and to the parts of an `Encoder`: what `Encoder` and the commands call.

The files are a folder here, or one of the Hugging Face hub in its client's own cache.
"""

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from cn_clip import ranks
from cn_clip.clip.backends.names import BackendName, check_precision
from cn_clip.clip.families import names
from cn_clip.clip.families.names import ForeignName, parse
from cn_clip.clip.transforms import Decode
from cn_clip.clip.weights import hub
from cn_clip.errors import CheckpointError, DownloadError

if TYPE_CHECKING:
    import torch

    from cn_clip.clip.backends.base import Parts

# An id of the hub, perhaps with a branch, a tag or a commit: google/siglip-base-patch16-224@main.
_HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@([\w.-]+(?:/[\w.-]+)*))?")
# Weights, configurations and vocabularies: every file of a transformers folder that can change a row.
_DECIDING = re.compile(r".*\.(safetensors|bin|json|txt|model)")
_BESIDES = ["*.json", "*.txt", "*.model"]
# The first of which a repository has any. Folders in it hold the same weights for other frameworks.
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


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


def folder_of(name: ForeignName, *, download_root: str | Path | None = None) -> Path:
    """The transformers folder of a name, downloaded if it is a hub id; raises CheckpointError, DownloadError.

    download_root: where downloads are kept; default: the cache of the hub's client.
    """
    path = Path(name.source).expanduser()
    if os.path.isdir(path):
        return path
    if os.path.exists(path):
        raise CheckpointError(f"{path} is a file; expected a transformers folder, with config.json in it", at=name)
    of_hub = _HUB_ID.fullmatch(name.source)
    if of_hub is None:
        raise CheckpointError(
            "no such folder; expected a transformers folder, with config.json in it, or an id of the hub, "
            "OWNER/NAME or OWNER/NAME@REVISION",
            at=name,
        )
    return snapshot(of_hub[1], of_hub[2], download_root=download_root)


def files_of(name: str, *, download_root: str | Path | None = None) -> list[Path]:
    """The local files that decide on the rows of a model; of open_clip's tags none. Raises as `folder_of`."""
    parsed = parse(name)
    if parsed.scheme == "open_clip":
        file = Path(parsed.source).expanduser()
        return [file] if os.path.isfile(file) else []
    folder = folder_of(parsed, download_root=download_root)
    return [one for one in sorted(folder.iterdir()) if one.is_file() and _DECIDING.fullmatch(one.name)]


def snapshot(repo: str, revision: str | None = None, *, download_root: str | Path | None = None) -> Path:
    """The transformers folder of an id such as `google/siglip-base-patch16-224`, downloaded if need be.

    revision: a branch, a tag or a commit; default: the branch `main`, as it is then. download_root: default, the cache
    of the hub's client. Reads HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME.
    Raises DownloadError.
    """
    import huggingface_hub.errors

    name = f"hf:{repo}" if revision is None else f"hf:{repo}@{revision}"
    endpoint = hub.endpoint()
    try:
        for weights in _WEIGHTS:
            patterns = [weights, *_BESIDES]
            found = huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=patterns,
                ignore_patterns="*/*",
                endpoint=endpoint,
                cache_dir=download_root,
            )
            folder = Path(found)
            if any(folder.glob(weights)):
                return folder
    except Exception as error:  # the hub client raises errors of many unrelated types, which differ by version
        if isinstance(error, huggingface_hub.errors.RevisionNotFoundError):
            raise DownloadError(
                f"{name}: {endpoint} has no revision {revision!r} of it; give a branch, a tag or a whole commit of "
                f"{endpoint}/{repo}"
            ) from error
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DownloadError(
            f"{name}: no such folder here, and it could not be downloaded from {endpoint}: {reason.rstrip('.')}; "
            "give a local folder, or set HF_ENDPOINT to a mirror"
        ) from error
    raise DownloadError(f"{name}: holds no weights that can be read, neither safetensors nor pytorch_model.bin")

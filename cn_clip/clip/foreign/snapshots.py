"""Folders of the Hugging Face hub, in the cache of its own client; `names.folder_of` calls it."""

import os
from pathlib import Path

from cn_clip.clip import hub
from cn_clip.errors import DownloadError

_BESIDES = ["*.json", "*.txt", "*.model"]
# The first of which a repository has any. Folders in it hold the same weights for other frameworks.
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


def snapshot(repo: str, revision: str | None = None, *, download_root: str | Path | None = None) -> Path:
    """The transformers folder of an id such as `google/siglip-base-patch16-224`, downloaded if need be.

    revision: a branch, a tag or a commit; default: the branch `main`, as it is then. download_root: default, the cache
    of the hub's client. Reads HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME.
    Raises DownloadError.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RevisionNotFoundError

    name = f"hf:{repo}" if revision is None else f"hf:{repo}@{revision}"
    endpoint = (os.environ.get("HF_ENDPOINT") or hub.DEFAULT_ENDPOINT).rstrip("/")
    try:
        for weights in _WEIGHTS:
            patterns = [weights, *_BESIDES]
            found = snapshot_download(
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
        if isinstance(error, RevisionNotFoundError):
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

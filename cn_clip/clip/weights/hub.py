"""Fetches a published checkpoint by name, from the Hugging Face hub or ModelScope.

`load_from_name` and `cn-clip download` call it.
"""

import errno
import hashlib
import logging
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import quote

from cn_clip import spelling, zoo
from cn_clip.clip.families.names import refuse
from cn_clip.digests import add_file
from cn_clip.errors import CheckpointError, CnClipError, DownloadError
from cn_clip.extras import require
from cn_clip.files import alone, lock_file
from cn_clip.language import both
from cn_clip.progress import Step, is_shown, progress, working
from cn_clip.zoo import Published

logger = logging.getLogger(__name__)

DEFAULT_ENDPOINT = "https://huggingface.co"
DEFAULT_MODELSCOPE_DOMAIN = "www.modelscope.cn"
_SHA256 = re.compile(r"[0-9a-f]{64}")
# Weights, their index and the configuration in a transformers folder.
_OF_A_FOLDER = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?|config\.json")
# An id of the hub, perhaps with a branch, a tag or a commit: google/siglip-base-patch16-224@main.
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*(?:/[A-Za-z0-9][\w.-]*)?)(?:@([\w.-]+(?:/[\w.-]+)*))?")
# Of files: a name that ends so is no id.
_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".safetensors", ".onnx", ".trt", ".zip")
# What belongs to the weights in a transformers folder, and the weights, of which the first that a repository has are
# taken. Folders in it hold the same weights for other frameworks.
_BESIDES = ["*.json", "*.txt", "*.model"]
_WEIGHTS = ("*.safetensors", "*pytorch_model*.bin")
_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


def weight_file(name: str | Path, *, download_root: str | Path | None = None, use_modelscope: bool = False) -> Path:
    """The file of a name, downloaded if it is a published one that is not here yet; a path as it is.

    Of an id of the hub, "OWNER/NAME" or "OWNER/NAME@REVISION", the folder of transformers that is downloaded.
    Raises CheckpointError when there is neither such a name nor such a file, or it is of another family; DownloadError.
    """
    entry = zoo.named(str(name))
    if isinstance(entry, zoo.Published):
        root = Path(download_root or zoo.DOWNLOAD_ROOT).expanduser()
        return download(entry, root, use_modelscope=use_modelscope)
    refuse(name)
    path = entry.path if entry else Path(name)
    if not os.path.exists(path):  # unlike Path.exists, also for a name that is too long
        if is_hub_name(name):
            repo, revision = HUB_ID.fullmatch(str(name)).groups()  # type: ignore[union-attr]
            return snapshot(repo, revision, name=str(name), download_root=download_root)
        known = zoo.available_models()
        hint = spelling.meant(str(name), known)
        raise CheckpointError(f"Model {name} not found; available models = {known}, or give a file{hint}")
    return path


def is_hub_name(name: str | Path) -> bool:
    """Whether a name can only be an id of the hub with its owner: no model, file or folder here is meant by it.

    A path begins with a folder that is here, or ends as names of files do; "ViT-B/16" is a name with another sign.
    """
    if not isinstance(name, str) or "/" not in name.partition("@")[0] or HUB_ID.fullmatch(name) is None:
        return False
    is_model = spelling.folded(name) in map(spelling.folded, zoo.available_models())
    return not (is_model or name.endswith(_SUFFIXES) or os.path.exists(name) or os.path.isdir(name.partition("/")[0]))


def snapshot(
    repo: str, revision: str | None = None, *, name: str | None = None, download_root: str | Path | None = None
) -> Path:
    """The transformers folder of an id such as `google/siglip-base-patch16-224`, downloaded if need be.

    revision: a branch, a tag or a commit; default: the branch `main`, as it is then. name: what the user wrote, for
    messages. download_root: default, the cache of the hub's client. Reads HF_ENDPOINT, HF_HUB_OFFLINE and HF_HOME.
    Raises DownloadError.
    """
    import huggingface_hub

    name = name or (repo if revision is None else f"{repo}@{revision}")
    address = endpoint()
    try:
        for weights in _WEIGHTS:
            # Its own bars tell how much is still to come; where none are drawn, they are off.
            with nullcontext() if is_shown() else _without_bars(), working(both(f"下载 {repo}", f"downloading {repo}")):
                found = huggingface_hub.snapshot_download(
                    repo,
                    revision=revision,
                    allow_patterns=[weights, *_BESIDES],
                    ignore_patterns="*/*",
                    endpoint=address,
                    cache_dir=download_root,
                )
            folder = Path(found)
            if any(folder.glob(weights)):
                return folder
    except Exception as error:  # the hub client raises errors of many unrelated types, which differ by version
        raise DownloadError(_not_there(error, name, repo, revision, address)) from error
    raise DownloadError(f"{name}: holds no weights that can be read, neither safetensors nor pytorch_model.bin")


def _not_there(error: Exception, name: str, repo: str, revision: str | None, address: str) -> str:
    """One sentence on why a repository did not come, and what to do."""
    import huggingface_hub.errors as errors

    if isinstance(error, errors.RevisionNotFoundError):
        return (
            f"{name}: {address} has no revision {revision!r} of it; give a branch, a tag or a whole commit of "
            f"{address}/{repo}"
        )
    if isinstance(error, errors.GatedRepoError):
        return f"{name}: {address} gives it to those who asked; ask at {address}/{repo}, then `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        hint = spelling.meant(repo, [one.huggingface for one in zoo.downloadable().values()])
        return (
            f"{name}: no such folder here, and no such model at {address}; check the spelling, or, if it is private, "
            f"log in with `hf auth login`{hint}"
        )
    reason = " ".join(str(error).split())[:300] or type(error).__name__
    return (
        f"{name}: no such folder here, and it could not be downloaded from {address}: {reason.rstrip('.')}; "
        "give a local folder, or set HF_ENDPOINT to a mirror"
    )


def download(
    published: Published, root: str | os.PathLike[str], *, use_modelscope: bool = False, offline: bool = False
) -> Path:
    """The path of the checkpoint in the folder `root`, which is made if need be; a file already there is used as is.

    The file appears whole and checked (against `published.sha256`, or else what the hub says), or not at all.
    An interrupted download goes on where it stopped, also in a later run; of several processes one downloads and the
    others wait for it. Reads HF_ENDPOINT and HF_HUB_OFFLINE; nothing is asked of the network when `offline`.
    Raises DownloadError, with the next step, for anything that goes wrong; MissingExtraError without `modelscope`.
    """
    target = Path(root).expanduser() / published.filename
    # In this order: between the two looks another process may put the file there. os.path, unlike Path, also where the
    # folder may not be entered.
    if os.path.exists(target):
        if os.path.isfile(target):
            return target
        raise DownloadError(f"{target} exists and is not a regular file; move it away or choose another download_root")
    url = url_of(published, use_modelscope=use_modelscope)
    told_offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE") and not use_modelscope
    if offline or told_offline:
        reason = "HF_HUB_OFFLINE is set" if told_offline else "--offline"
        size = f"{published.num_bytes:,} bytes" if published.num_bytes else "of unknown size"
        check = f", SHA-256 {published.sha256}" if published.sha256 else ""
        raise DownloadError(
            f"offline ({reason}): on a machine with a network download {url} ({size}{check}), and put the file at "
            f"{target}"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DownloadError(
            f"cannot be made a folder ({error.strerror}); choose another download_root", at=target.parent
        ) from error
    return _fetch(published, target, use_modelscope=use_modelscope)


def url_of(published: Published, *, use_modelscope: bool = False) -> str:
    """Where the file is fetched from, under HF_ENDPOINT or MODELSCOPE_DOMAIN if set.

    Raises DownloadError for a file that ModelScope is not known to have.
    """
    if not use_modelscope:
        return f"{endpoint()}/{published.huggingface}/resolve/main/{quote(published.filename)}"
    if published.modelscope is None:
        raise DownloadError(
            f"{published.filename} is not known to be on ModelScope; fetch it from Hugging Face, and set HF_ENDPOINT "
            "to a mirror if need be"
        )
    domain = os.environ.get("MODELSCOPE_DOMAIN") or DEFAULT_MODELSCOPE_DOMAIN
    query = f"Revision=master&FilePath={quote(published.filename)}"
    return f"https://{domain}/api/v1/models/{published.modelscope}/repo?{query}"


def endpoint() -> str:
    """The hub that files are fetched from: HF_ENDPOINT if set."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def is_published_file(published: Published, path: Path) -> bool | None:
    """Whether the file has the published SHA-256; None where that is unknown."""
    return None if published.sha256 is None else _sha256(path) == published.sha256


def _fetch(published: Published, target: Path, *, use_modelscope: bool) -> Path:
    """Fetches into a folder beside the target, under a lock, and moves the finished file; raises as `download`."""
    partial = target.parent / f".{target.name}.download"
    try:
        with alone(lock_file(target), f"{target}: another process is downloading it", waiting=logger.warning):
            if os.path.isfile(target):  # the process that held the lock before has finished
                return target
            partial.mkdir(exist_ok=True)
            try:
                fetch = _from_modelscope if use_modelscope else _from_huggingface
                os.replace(fetch(published, partial), target)
                shutil.rmtree(partial, ignore_errors=True)
            finally:
                with suppress(OSError):  # what a failed download left behind is kept, to go on from there
                    partial.rmdir()
        return target
    except CnClipError:
        raise
    except Exception as error:  # the hub clients raise errors of many unrelated types, which differ by version
        if isinstance(error, OSError) and error.errno in _OF_THE_DISK:
            raise DownloadError(
                f"{published.filename} cannot be written there ({error.strerror}); free space, or "
                "choose another download_root",
                at=target.parent,
            ) from error
        if use_modelscope:
            where, others = f"{published.modelscope} on ModelScope", ["fetch it from Hugging Face"]
        else:
            where, others = f"{published.huggingface} at {endpoint()}", ["set HF_ENDPOINT to a mirror"]
            if published.modelscope:
                names = {one.filename: name for name, one in zoo.downloadable().items()}
                name = names.get(published.filename, "MODEL")
                others.append(f"run `cn-clip download {name} --hub modelscope`")
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DownloadError(
            f"could not download {published.filename} from {where}: {reason.rstrip('.')}; try again to go on from "
            f"there, {', '.join(others)}, or download the file yourself and pass its path"
        ) from error


def _from_huggingface(published: Published, folder: Path) -> Path:
    """Downloads over HTTP into `folder`, going on from what a former run left there, and checks the file.

    `hf_hub_download` is not used because its recent versions begin again at byte 0 after an interruption, which hurts
    with files of gigabytes.
    """
    from huggingface_hub import get_hf_file_metadata
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # public, exported lazily

    url = url_of(published)
    metadata = get_hf_file_metadata(url)
    sha256 = _expected_sha256(published, metadata.etag)
    # The name is that of this version of the file; what cannot be its beginning goes.
    part = folder / f"{hashlib.sha256((metadata.etag or '').encode()).hexdigest()[:16]}.part"
    for found in folder.glob("*.part"):
        too_long = metadata.size is not None and found.stat().st_size > metadata.size
        if found != part or metadata.etag is None or too_long:
            found.unlink()
    with open(part, "ab") as stream:
        missing, free = (metadata.size or 0) - stream.tell(), shutil.disk_usage(folder).free
        if missing > free:
            raise DownloadError(
                f"{published.filename} takes {missing:,} more bytes and the disk has {free:,} left; free space, or "
                "choose another download_root",
                at=folder.parent,
            )
        logger.info("downloading %s (%s bytes, %d of them here already)", url, metadata.size, stream.tell())
        what = both(f"下载 {published.filename}", f"downloading {published.filename}")
        with _without_bars(), progress(metadata.size, "B", what, done=stream.tell(), in_bytes=True) as bar:
            http_get(
                url,
                cast("BinaryIO", _Counted(stream, bar)),
                resume_size=stream.tell(),
                headers=build_hf_headers(),
                expected_size=metadata.size,
                displayed_filename=published.filename,
            )
    actual_size, wrong = part.stat().st_size, None
    if metadata.size is not None and actual_size != metadata.size:
        wrong = f"expected {metadata.size} bytes, got {actual_size}"
    elif sha256 and (actual := _sha256(part)) != sha256:
        wrong = f"expected the SHA-256 {sha256}, got {actual}"
    if wrong:
        part.unlink()
        raise OSError(f"{wrong}; the file was removed")
    return part


class _Counted:
    """A file whose position is what a bar shows."""

    def __init__(self, stream: BinaryIO, bar: Step) -> None:
        self._stream, self._bar = stream, bar

    def write(self, data: bytes) -> int:
        """Writes to the file."""
        count = self._stream.write(data)
        self._bar.num_done = self._stream.tell()
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Without those of the hub's client."""
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # public, exported lazily
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    were_off = are_progress_bars_disabled()
    if not were_off:
        disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            enable_progress_bars()


def _expected_sha256(published: Published, etag: str | None) -> str | None:
    """The published SHA-256, or else the hub's, which is its ETag of large files.

    Raises DownloadError where the two are known and differ: before gigabytes come that would be refused.
    """
    of_hub = etag if etag and _SHA256.fullmatch(etag) else None
    if of_hub and published.sha256 and of_hub != published.sha256:
        raise DownloadError(
            f"{published.filename} at {endpoint()} is not the file published as {published.huggingface}: expected the "
            f"SHA-256 {published.sha256}, the hub says {of_hub}; try another HF_ENDPOINT, or, if you trust that file, "
            "download it yourself and pass its path"
        )
    return published.sha256 or of_hub


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with working(both(f"校验 {path.name}", f"checking {path.name}")):
        add_file(digest, path)
    return digest.hexdigest()


def _from_modelscope(published: Published, folder: Path) -> Path:
    """Downloads with the `modelscope` package, which resumes and checks by itself."""
    require("modelscope", extra="modelscope", purpose="use_modelscope=True")
    from modelscope.hub.file_download import model_file_download

    return Path(model_file_download(model_id=published.modelscope, file_path=published.filename, local_dir=str(folder)))


def files_of(path: Path) -> list[Path]:
    """The files that decide on a model: the weight file, or weights and configuration of a transformers folder."""
    return (
        [one for one in sorted(path.iterdir()) if _OF_A_FOLDER.fullmatch(one.name)] if os.path.isdir(path) else [path]
    )

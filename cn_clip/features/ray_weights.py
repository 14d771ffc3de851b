"""The weights of a model on machines that do not share a disk with the one where a Ray run was started.

The driver describes the files; an actor on its machine reads them chunk by chunk, and Ray's object store carries each
chunk. A machine keeps one copy, named by its digest, which is compared before the copy gets its name. `ray_extraction`
uses it.
"""

import os
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cn_clip import zoo
from cn_clip.clip.choice import Choice
from cn_clip.clip.families import names
from cn_clip.clip.opening import digest_of_files, weight_files, weights_digest
from cn_clip.clip.weights.hub import is_hub_name
from cn_clip.data.storage import StorageError, open_storage
from cn_clip.digests import is_file, is_folder
from cn_clip.errors import CnClipError, ConfigError, DataError
from cn_clip.extras import require
from cn_clip.files import alone, lock_file, staged_folder

CHUNK_BYTES = 16 << 20
# Chunks asked for before the first is written: what a machine holds of them in memory.
_AHEAD = 2
# Of all copies on a machine; older ones go first.
MOST_BYTES = 64 << 30
_FOLDER = "ray-weights"


@dataclass(frozen=True)
class Weights:
    """The files of a model, and how a machine without them gets them.

    digest: as `weights_digest`. name: the model when its files lie in a folder, which stands for {}. files: names and
    sizes. source: "auto": from where the file is named, else as "store"; "shared": only from there; "store": from the
    driver's machine; else the address of a folder that holds them. server: an actor, see `ChunkReader`, or None.
    """

    digest: str
    name: str = ""
    files: tuple[tuple[str, int], ...] = ()
    source: str = "shared"
    server: Any = None


def described(chosen: Choice, source: str) -> Weights:
    """The weights of a model that is here, without a server; raises as `weights_digest`, ConfigError for too many."""
    paths = weight_files(chosen)
    files = tuple((path.name, path.stat().st_size) for path in paths)
    num_bytes = sum(size for _, size in files)
    if source != "shared" and num_bytes > MOST_BYTES:
        raise ConfigError(
            f"--weights-from {source}: the files of {chosen.model} have {num_bytes >> 30} GiB, and a machine keeps at "
            f"most {MOST_BYTES >> 30}; put them on a shared disk, with --weights-from shared"
        )
    return Weights(weights_digest(chosen), _named_in_a_folder(chosen), files, source)


def served(ray: Any, chosen: Choice, weights: Weights) -> Weights:
    """The same with an actor on this machine that reads the files, if any machine may ask for them."""
    if weights.source not in ("auto", "store") or not weights.files:
        return weights
    strategies = require("ray.util.scheduling_strategies", extra="ray", purpose="--engine ray")
    here = strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    actor = ray.remote(ChunkReader).options(num_cpus=0, scheduling_strategy=here, max_restarts=-1)
    return replace(weights, server=actor.remote([str(path.resolve()) for path in weight_files(chosen)]))


class ChunkReader:
    """An actor: gives the bytes of files, a chunk a call."""

    def __init__(self, paths: list[str]) -> None:
        self._paths = paths

    def chunk(self, number: int, offset: int) -> bytes:
        """At most CHUNK_BYTES of a file, empty behind its end; raises OSError."""
        with open(self._paths[number], "rb") as stream:
            stream.seek(offset)
            return stream.read(CHUNK_BYTES)


def placed(chosen: Choice, weights: Weights) -> Choice:
    """On any machine: the model with its files there, fetched if need be.

    Raises ConfigError for other weights with "shared", StorageError for what cannot be fetched or written.
    """
    is_named_here = weights.source in ("auto", "shared")
    if is_named_here and (weights.source == "shared" or _needs_no_download(chosen)):
        try:
            if weights_digest(chosen) == weights.digest:
                return chosen
        except CnClipError:
            if weights.source == "shared":
                raise
    if weights.source == "shared" or not weights.files:
        raise ConfigError(
            f"{chosen.model} is another file there than where the run was started; copy the same weights to every "
            "machine"
        )
    return replace(chosen, model=weights.name.format(_copy(weights)))


def _needs_no_download(chosen: Choice) -> bool:
    """Whether looking at the files of a model asks no server for them."""
    entry = zoo.named(chosen.model)
    if isinstance(entry, zoo.Published):
        return (Path(chosen.download_root or zoo.DOWNLOAD_ROOT).expanduser() / entry.filename).is_file()
    name = names.parse(chosen.model).source if chosen.is_foreign else chosen.model
    return entry is not None or os.path.exists(os.path.expanduser(name)) or not is_hub_name(name)


def _named_in_a_folder(chosen: Choice) -> str:
    """How the model is called when its files lie in the folder {}."""
    model = chosen.model.replace("{", "{{").replace("}", "}}")
    if chosen.is_foreign:
        parsed = names.parse(model)
        source = "{}" if parsed.scheme == "hf" else f"{{}}/{Path(parsed.source).name}"
        return str(parsed._replace(source=source))
    if is_folder(chosen.model) or is_hub_name(chosen.model):
        return "{}"
    files = weight_files(chosen)
    is_prefix = zoo.named(chosen.model) is None and not os.path.exists(chosen.model)
    return f"{{}}/{Path(model).name if is_prefix else files[0].name}"


# --- the copy of a machine


def _copy(weights: Weights) -> Path:
    """The folder of this machine with the files, written by the first process that needs it."""
    root = _root()
    folder = root / weights.digest
    try:
        # `staged_folder` has the lock of the folder itself.
        lock = lock_file(root / f"{weights.digest}-fetch")
        with alone(lock, f"{folder}: another process is fetching it", waiting=lambda _: None):
            paths = [folder / name for name, _ in weights.files]
            if is_folder(folder) and all(map(is_file, paths)) and digest_of_files(paths) == weights.digest:
                return folder
            _make_room(root, sum(size for _, size in weights.files))
            with staged_folder(folder) as staged:
                for number, (name, size) in enumerate(weights.files):
                    with open(staged / name, "wb") as stream:
                        for data in _pieces(weights, number, size):
                            stream.write(data)
                if digest_of_files([staged / name for name, _ in weights.files]) != weights.digest:
                    raise StorageError(f"what came of {', '.join(name for name, _ in weights.files)} is another file")
    except OSError as error:
        raise StorageError(f"the weights cannot be written ({error.strerror or error})", at=root) from error
    return folder


def _root() -> Path:
    """Where this machine keeps copies: in the user's cache, or in the folder for temporary files."""
    for root in (zoo.DOWNLOAD_ROOT.expanduser() / _FOLDER, Path(tempfile.gettempdir(), f"cn_clip-{_FOLDER}")):
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError:
            continue
        if os.access(root, os.W_OK):
            return root
    raise StorageError("no folder for weights can be written; set TMPDIR", at=tempfile.gettempdir())


def _make_room(root: Path, num_bytes: int) -> None:
    """Removes the copies that were made first until the new one fits under MOST_BYTES."""
    copies = sorted((one for one in root.iterdir() if one.is_dir()), key=lambda one: one.stat().st_mtime)
    sizes = {one: sum(file.stat().st_size for file in one.rglob("*") if file.is_file()) for one in copies}
    for one in copies:
        if sum(sizes.values()) + num_bytes <= MOST_BYTES:
            return
        shutil.rmtree(one, ignore_errors=True)
        del sizes[one]


def _pieces(weights: Weights, number: int, size: int) -> Iterator[bytes]:
    """The bytes of a file, piece by piece; raises StorageError."""
    name = weights.files[number][0]
    if weights.server is None:
        try:
            with open_storage(weights.source).child(name).open() as stream:
                yield from iter(lambda: stream.read(CHUNK_BYTES), b"")
        except DataError as error:
            raise StorageError(str(error)) from error
        return
    ray = require("ray", extra="ray", purpose="--engine ray")
    ask: Callable[[int], Any] = lambda offset: weights.server.chunk.remote(number, offset)  # noqa: E731
    coming: deque[Any] = deque()
    for offset in range(0, size, CHUNK_BYTES):
        coming.append(ask(offset))
        if len(coming) > _AHEAD:
            yield ray.get(coming.popleft())
    while coming:
        yield ray.get(coming.popleft())

"""The cache of exported models: the ONNX files of a name or a weight file, made at first use, under a lock."""

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from cn_clip import digests, zoo
from cn_clip.clip.backends import derived, parity
from cn_clip.clip.backends.base import Backend
from cn_clip.clip.backends.names import KINDS, BackendName, Kind
from cn_clip.clip.backends.onnx_files import extra_path, move, onnx_path
from cn_clip.clip.backends.parity import Report, Samples
from cn_clip.clip.tokenizer import CONTEXT_LENGTH
from cn_clip.clip.weights import hub
from cn_clip.digests import FileFacts
from cn_clip.errors import ConfigError
from cn_clip.files import atomic_write, take
from cn_clip.language import both

FOLDER = "exported"
STEM = "model"
BUILDING = ".building"
MANIFEST = "manifest.json"
LOSSES = "losses.json"
# A cosine with the roundings of float32.
LARGEST_COSINE = 1.001
# Raised when files of older versions of this package must not be used any more.
FORMAT = 1

# How long the wait for the lock goes without a word.
PATIENCE_S = 1.0
# In Chinese and in English.
WAITING = ("另一个进程正在导出，等它完成", "waiting for another process that is exporting")
FIRST_USE = ("首次使用，正在导出", "first use, exporting")
DAMAGED = ("缓存的文件已损坏，重新导出", "the cached file is damaged, exporting again")

Announce = Callable[[str], None]
# The length and digest of each file of an export, by its name; none where the files turned out unusable.
Facts = dict[str, FileFacts]


def announce(line: str) -> None:
    """Says on stderr what takes long or went wrong: the default of everything here that makes files."""
    print(line, file=sys.stderr, flush=True)


def check_model(model: str | Path, backend: BackendName) -> None:
    """Raises ConfigError for a name that cannot be a model of this backend."""
    if not str(model):
        raise ConfigError("model: expected a name or a path, got ''")
    others = 'use backend="onnx" or backend="openvino"'
    path = Path(model)
    if path.suffix == ".onnx" and os.path.isfile(path):
        named = re.fullmatch(r"(.+)\.(?:img|txt)\.[a-z0-9.]+\.onnx", path.name)
        prefix = path.with_name(named[1]) if named else "of files named PREFIX.img.fp32.onnx and PREFIX.txt.fp32.onnx"
        more = f", and {others}" if backend == "torch" else ""
        raise ConfigError(f"{model}: is one exported tower; give the prefix {prefix}{more}")
    if backend == "torch" and files_of_prefix(model, "onnx"):
        raise ConfigError(f"{model}: is the prefix of exported files; {others}")


def files_of_prefix(model: str | Path, *suffixes: str) -> list[str]:
    """The exported files whose names begin so; none for the name or the path of a model."""
    if zoo.named(str(model)) is not None or os.path.exists(model):
        return []
    parent, name = Path(model).parent, glob.escape(Path(model).name)
    return sorted(path.name for suffix in suffixes for path in parent.glob(f"{name}.*.{suffix}"))


@dataclass(frozen=True)
class Source:
    """Weights to export: a published or bundled name or a file, and its towers where the user named them.

    merge_tokens: patches that the picture tower merges in each layer.
    What differs in a model of another family is in the methods below `folder`; `families.opening` has its own.
    """

    model: str | Path
    vision: str | None = None
    text: str | None = None
    download_root: str | Path | None = None
    merge_tokens: int = 0

    @property
    def family(self) -> str | None:
        """What the facts of its files say of their family; None of Chinese-CLIP."""
        return None

    @property
    def unmeasured(self) -> str:
        """Why the speeds that were measured do not hold for it; "" if they do."""
        return ""

    @property
    def root(self) -> Path:
        """The folder of all exports."""
        return Path(self.download_root or zoo.DOWNLOAD_ROOT).expanduser() / FOLDER

    def folder(self) -> Path:
        """The folder of this model's exports; another one once the weight file has changed.

        Raises CheckpointError or DownloadError when there are no weights.
        """
        stem, paths = self.files()
        files = [(file.resolve(), file.stat()) for file in paths]
        seen = [(str(file), status.st_size, status.st_mtime_ns) for file, status in files]
        facts = (FORMAT, self.vision, self.text, seen, *self.more())
        key = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
        return self.root / f"{stem}-{key}"

    def files(self) -> tuple[str, list[Path]]:
        """What the folder's name begins with, and the files whose change makes the exports stale."""
        path = hub.weight_file(self.model, download_root=self.download_root)
        return path.resolve().stem, hub.files_of(path)

    def more(self) -> tuple[object, ...]:
        """What else the exports depend on."""
        return (self.merge_tokens,) if self.merge_tokens else ()

    def export(self, kinds: Sequence[Kind], prefix: Path) -> Iterator[Report]:
        """Writes float32 files of towers; brings PyTorch, which files that are there do without."""
        from cn_clip.clip.backends import export

        towers: dict[str, Any] = {"vision": self.vision, "text": self.text}
        settings: dict[str, Any] = {"download_root": self.download_root, "merge_tokens": self.merge_tokens}
        return export.export_model(self.model, kinds, prefix, **towers, **settings)

    def samples(self, context_length: int = CONTEXT_LENGTH) -> Samples:
        """What the loss of a file is measured on. context_length: longest caption in tokens."""
        return parity.embedded_samples(context_length)

    def check_model(self, backend: BackendName) -> None:
        """Raises ConfigError for a name that cannot be a model of this backend."""
        check_model(self.model, backend)

    def open_torch(self, **settings: Any) -> Backend:
        """The towers in PyTorch; settings: of `open_torch` besides the model and its towers."""
        from cn_clip.clip.backends.pytorch import open_torch

        towers: dict[str, Any] = {"vision": self.vision, "text": self.text, "merge_tokens": self.merge_tokens}
        return open_torch(self.model, download_root=self.download_root, **towers, **settings)


def tower_files(source: Source, kinds: Sequence[Kind], form: str, *, say: Announce = announce) -> dict[Kind, Path]:
    """The ONNX files of towers, made where they are not in the cache yet or are not what was written there.

    form: "fp32", "fp16", "int8" or "int8.openvino". Of several processes one makes them and the others wait.
    Raises CnClipError when the weights cannot be read or exported, or the folder not be written.
    """
    folder = source.folder()
    paths = {kind: onnx_path(folder / STEM, kind, form) for kind in kinds}
    if not all(map(_is_whole, paths.values())):
        with _alone(folder, say):  # the process that held the lock before may have made them
            _make(source, [kind for kind in kinds if not _is_whole(paths[kind])], form, folder, say)
    return paths


def tower_file(source: Source, kind: Kind, form: str, *, say: Announce = announce) -> Path:
    """As `tower_files`, of one tower."""
    return tower_files(source, [kind], form, say=say)[kind]


def kept_file(path: Path, make: Callable[[], object]) -> Path:
    """A further file in the folder of a model's exports, made if it is not whole; what `make` makes others wait for."""
    if _is_whole(path):
        return path
    with _alone(path.parent):
        if not _is_whole(path):
            _record(path.parent, path.name, None)
            make()
            _record(path.parent, path.name, _facts(path))
    return path


def forget(path: Path) -> None:
    """Marks a file of the cache that turned out unusable: it is made again when it is next asked for."""
    with _alone(path.parent):
        _record(path.parent, path.name, {})


def kept_losses(source: Source) -> dict[str, dict[Kind, float]]:
    """What was measured of a model: the smallest cosine to float32 of each tower, by a name that the measurer gives."""
    try:
        found = json.loads((source.folder() / LOSSES).read_text(encoding="utf-8"))
        kept: dict[str, dict[Kind, float]] = {
            str(name): {kind: float(cosines[kind]) for kind in KINDS if kind in cosines}
            for name, cosines in found.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError, OverflowError):
        return {}
    # NaN, which compares with nothing, would pass every bound.
    return {
        name: {kind: cosine for kind, cosine in cosines.items() if abs(cosine) <= LARGEST_COSINE}
        for name, cosines in kept.items()
    }


def keep_losses(source: Source, name: str, cosines: Mapping[Kind, float]) -> None:
    """Adds what was measured; raises ConfigError where nothing can be kept."""
    folder = source.folder()
    with _alone(folder):
        found = kept_losses(source)
        found[name] = {**found.get(name, {}), **cosines}
        with _keeping(folder), atomic_write(folder / LOSSES) as stream:
            json.dump(found, stream, indent=1)


def _make(source: Source, kinds: Sequence[Kind], form: str, folder: Path, say: Announce) -> None:
    """Writes towers in a form, float32 ones translated from PyTorch, others from float32; the caller holds the lock."""
    if not kinds:
        return
    derived.check_packages([form])
    is_first = all(onnx_path(folder / STEM, kind, form).name not in _read_manifest(folder) for kind in kinds)
    what = both(*(FIRST_USE if is_first else DAMAGED))
    say(f"{what} {source.model} ({', '.join(kinds)}, {form}) -> {folder}")
    bases = {kind: onnx_path(folder / STEM, kind, "fp32") for kind in kinds}
    if form != "fp32":
        _make(source, [kind for kind in kinds if not _is_whole(bases[kind])], "fp32", folder, say)
    scratch = folder / BUILDING  # on the same disk
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed process left there
    with _keeping(folder):
        scratch.mkdir()
    try:
        reports: Iterable[Report]
        if form == "fp32":
            reports = source.export(list(bases), scratch / STEM)
        else:
            expected = parity.file_reference(bases, source.samples())
            reports = (
                derived.derive(base, kind, form, onnx_path(scratch / STEM, kind, form), expected)
                for kind, base in bases.items()
            )
        for report in reports:
            # Between the two moves of a file and its weights, a killed process must leave nothing that looks whole.
            _record(folder, report.path.name, None)
            move(report.path, folder)
            _record(folder, report.path.name, _facts(folder / report.path.name))
            say(str(report))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _is_whole(path: Path) -> bool:
    """Whether a file, and that of its outside weights, hold what was written there: native code parses them."""
    files = _files(path)
    recorded = _read_manifest(path.parent).get(path.name)
    try:
        return (
            bool(files)
            and recorded is not None
            and recorded.keys() == {file.name for file in files}
            and all(digests.is_whole(file, recorded[file.name]) for file in files)
        )
    except OSError:  # cannot be read, so it is made again, or that says why not
        return False


def _files(path: Path) -> list[Path]:
    return [file for file in (path, extra_path(path)) if file.is_file()]


def _facts(path: Path) -> Facts:
    return {file.name: digests.facts_of(file) for file in _files(path)}


def _read_manifest(folder: Path) -> dict[str, Facts]:
    """What was written, by the name of the export; entries without digests, of older versions, do not count."""
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return {
            export: {name: FileFacts(**facts) for name, facts in files.items()}
            for export, files in entries.items()
            if all(isinstance(facts, dict) for facts in files.values())
        }
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _record(folder: Path, name: str, facts: Facts | None) -> None:
    entries = _read_manifest(folder)
    if facts is None:
        entries.pop(name, None)
    else:
        entries[name] = facts
    values = {export: {file: asdict(one) for file, one in files.items()} for export, files in entries.items()}
    with _keeping(folder), atomic_write(folder / MANIFEST) as stream:
        json.dump(values, stream, indent=1)


@contextlib.contextmanager
def _alone(folder: Path, say: Announce = announce) -> Iterator[None]:
    """Holds the lock of a folder; says so when another process makes this one wait."""
    with _keeping(folder):
        folder.mkdir(parents=True, exist_ok=True)
        lock = take(folder / ".lock", f"{folder}: {both(*WAITING)}", waiting=say, patience_s=PATIENCE_S)
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _keeping(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f"exported models cannot be kept there ({error.strerror or error}); choose another download_root", at=folder
        ) from error

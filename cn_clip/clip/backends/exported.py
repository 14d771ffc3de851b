"""The cache of exported models: the ONNX files of a name or a weight file, made at first use, under a lock."""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cn_clip import zoo
from cn_clip.clip import hub
from cn_clip.clip.backends.base import Kind
from cn_clip.clip.backends.onnx_files import extra_path, onnx_path
from cn_clip.errors import ConfigError
from cn_clip.jsonl import atomic_write

FOLDER = "exported"
MANIFEST = "manifest.json"
# Raised when files of older versions of this package must not be used any more.
FORMAT = 1

Announce = Callable[[str], None]


def announce(line: str) -> None:
    """Says on stderr what takes long or went wrong: the default of everything here that makes files."""
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Source:
    """Weights to export: a published or bundled name or a file, and its towers where the user named them."""

    model: str | Path
    vision: str | None = None
    text: str | None = None
    download_root: str | Path | None = None

    @property
    def root(self) -> Path:
        """The folder of all exports."""
        return Path(self.download_root or zoo.DOWNLOAD_ROOT).expanduser() / FOLDER

    def folder(self) -> Path:
        """The folder of this model's exports; another one once the weight file has changed.

        Raises CheckpointError or DownloadError when there are no weights.
        """
        path = hub.weight_file(self.model, download_root=self.download_root)
        files = sorted(path.iterdir()) if path.is_dir() else [path]
        seen = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        key = hashlib.sha256(repr((FORMAT, self.vision, self.text, seen)).encode()).hexdigest()[:12]
        return self.root / f"{path.stem}-{key}"


def tower_file(source: Source, kind: Kind, form: str, *, say: Announce = announce) -> Path:
    """The ONNX file of a tower, made if it is not in the cache yet or is not what was written there.

    form: "fp32", "fp16", "int8" or "int8.openvino". Of several processes one makes it and the others wait.
    Raises CnClipError when the weights cannot be read or exported.
    """
    folder = source.folder()
    path = onnx_path(folder / "model", kind, form)
    with _alone(folder):
        recorded = _read_manifest(folder).get(path.name)
        if recorded is not None and recorded == _sizes(path):
            return path
        if recorded is not None:
            say(f"{path}: 缓存的文件不完整，重新导出 / the cached file is not whole; exporting it again")
        _make(source, kind, form, path, say)
    return path


def forget(path: Path) -> None:
    """Takes a file that turned out unusable out of the cache: the next `tower_file` makes it again."""
    with _alone(path.parent):
        _record(path.parent, path.name, None)


def _make(source: Source, kind: Kind, form: str, path: Path, say: Announce) -> None:
    from cn_clip.clip.backends import export

    say(f"首次使用，正在导出 / first use, exporting {source.model} ({kind}, {form}) -> {path}")
    # Nothing of an earlier attempt may be mixed in, and a killed attempt must not be taken for a finished file.
    _record(path.parent, path.name, None)
    if form == "fp32":
        export.export_source(source, kind, path)
    else:
        base = onnx_path(path.parent / "model", kind, "fp32")
        if _read_manifest(path.parent).get(base.name) != _sizes(base):
            _make(source, kind, "fp32", base, say)
        report = export.derive(base, kind, form, path)
        say(str(report))
    _record(path.parent, path.name, _sizes(path))


def _sizes(path: Path) -> dict[str, int]:
    files = (path, extra_path(path))
    return {file.name: file.stat().st_size for file in files if file.is_file()}


def _read_manifest(folder: Path) -> dict[str, dict[str, int]]:
    try:
        entries = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) else {}


def _record(folder: Path, name: str, sizes: dict[str, int] | None) -> None:
    entries = _read_manifest(folder)
    if sizes is None:
        entries.pop(name, None)
    else:
        entries[name] = sizes
    with atomic_write(folder / MANIFEST) as stream:
        json.dump(entries, stream, indent=1)


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    from filelock import FileLock

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(os.fspath(folder / ".lock"))
        lock.acquire()
    except OSError as error:
        raise ConfigError(
            f"{folder}: exported models cannot be kept there ({error.strerror}); choose another download_root"
        ) from error
    try:
        yield
    finally:
        lock.release()

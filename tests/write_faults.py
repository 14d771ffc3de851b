"""Commands that write, on a disk or with an input at fault: what they say, their status, and what they leave.

`tests/test_faulty_paths.py` asserts on it, `tools/fault_table.py` prints it.
"""

import contextlib
import ctypes
import errno
import gc
import io
import json
import os
import re
import resource
import shutil
import signal
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from command_lines import LINES, line_of
from dataset_files import picture

from cn_clip import cli

# What lets a command write over an earlier output.
MORE = {"dataset shards": ["--overwrite"], "convert": ["--overwrite"]}
NOT_TRIED = {
    **dict.fromkeys((("download", "disk full (ENOSPC)"), ("download", "damaged disk (EIO)")), "would use the network"),
    ("bench", "damaged disk (EIO)"): "the checkpoint is read, and numbers are written, in other processes",
}
# What may be there afterwards: a log says why the run ended, and computed rows are gone on with.
_MAY_REMAIN = re.compile(r".*/out_[-0-9]+\.log|.*/demo\.log|.*\.partial")
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1 << 1, 1 << 2
_CAPABILITIES_3 = 0x20080522


class Outcome(NamedTuple):
    """How a command ended. changed: the files that are not as they were, but for `_MAY_REMAIN`."""

    code: object
    sentence: str
    printed: str
    changed: list[str]

    @property
    def is_refusal(self) -> bool:
        """Whether it ended as it should: a sentence, a status, no traceback, and all as it was."""
        has_sentence = bool(self.sentence) and "Traceback" not in self.printed
        return self.code in (1, 2) and has_sentence and not self.changed


def input_cases(command: str) -> list[tuple[str, str]]:
    """(slot, fault) of each input that a command needs; pictures of an index that cannot be read are passed over."""
    passed_over = {("index build", "pictures"), ("index add", "pictures")}
    slots = [slot for slot, kind in LINES[command].slots.items() if kind.startswith("read")]
    cases = [(slot, fault) for slot in slots if (command, slot) not in passed_over for fault in INPUT_FAULTS]
    # The processes that `bench` starts are root again, and may read everything.
    return [one for one in cases if (command, one[1]) != ("bench", "unreadable input (EACCES)")]


def run(words: list[str], folder: Path, fault: contextlib.AbstractContextManager[None]) -> Outcome:
    """Runs a command in this process. folder: what it must leave as it is."""
    before = contents(folder)
    out, err = io.StringIO(), io.StringIO()
    with fault, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(words)
            code: object = 0
        except SystemExit as stopped:
            code = stopped.code
    printed = out.getvalue() + err.getvalue()
    after = contents(folder)
    changed = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    changed = [name for name in changed if not _MAY_REMAIN.fullmatch(name)]
    lines = [line for line in err.getvalue().splitlines() if line.startswith("error: ")]
    if words[0] == "recall" and changed == ["out.out"]:  # the result says it, as that of Chinese-CLIP does
        lines, changed = [f"error: {json.loads((folder / 'out.out').read_text('utf-8'))['errorMsg']}"], []
    return Outcome(code, lines[-1].removeprefix("error: ") if lines else "", printed, changed)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Permissions and bytes of every file below a folder."""
    files = (path for path in folder.rglob("*") if stat.S_ISREG(path.lstat().st_mode))
    return {path.relative_to(folder).as_posix(): (path.stat().st_mode, path.read_bytes()) for path in files}


def lay_old_outputs(command: str, paths: dict[str, Path], folder: Path) -> list[str]:
    """Puts what an earlier run has written where the command writes; returns the words of the command."""
    if command in ("index build", "index add"):
        paths = {**paths, "pictures": _one_more_picture(paths["pictures"], folder)}
    words = [*line_of(command, paths, folder), *MORE.get(command, ())]
    for name, kind in LINES[command].slots.items():
        place = folder / f"out.{name}"
        if kind == "write file":
            for path in (place, Path(f"{place}.txt.fp32.onnx")) if command == "export onnx" else (place,):
                if command not in ("export coreml", "export onnx") or path != place:
                    path.write_bytes(b"old")
                    path.chmod(0o600)
        elif kind == "write folder":
            _lay_old_folder(command, paths, place)
    return words


def _one_more_picture(pictures: Path, folder: Path) -> Path:
    """Pictures of which the index lacks one."""
    more = shutil.copytree(pictures, folder / "pictures")
    (more / "e.png").write_bytes(picture((9, 9, 9), size=(64, 64)))
    return more


def _lay_old_folder(command: str, paths: dict[str, Path], place: Path) -> None:
    if command == "dataset build":
        shutil.copytree(paths["lmdb"], place / "train")
    elif command == "index build":
        shutil.copytree(paths["index"], place)
    else:
        place.mkdir()
    if command == "dataset from-folder":
        for split in ("train", "valid"):
            for name in (f"{split}_imgs.tsv", f"{split}_texts.jsonl"):
                shutil.copy(paths["data"] / name, place)
    elif command == "dataset shards":
        (place / "000000.tar").write_bytes(b"old")


# --- disks


class SmallDisk:
    """A disk of 8 megabytes in memory if this process may mount one, else limits of this process.

    Without it a write beyond the end of an empty file fails (EFBIG), and a folder that may not be written is the
    read-only disk (EACCES).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "cn_clip_test", str(folder)]
        with contextlib.suppress(OSError):
            self.is_mounted = subprocess.run(mount, capture_output=True).returncode == 0

    is_mounted = False

    def close(self) -> None:
        if self.is_mounted:
            subprocess.run(["umount", "--lazy", str(self.folder)], check=True)

    @contextlib.contextmanager
    def full(self) -> Iterator[None]:
        """Nothing more can be written."""
        if self.is_mounted:
            filler = self.folder / "filler"
            with open(filler, "wb", buffering=0) as stream, contextlib.suppress(OSError):
                while True:
                    stream.write(bytes(1 << 16))
            with open(filler, "ab", buffering=0) as stream, contextlib.suppress(OSError):
                while True:
                    stream.write(bytes(1))
            try:
                yield
            finally:
                filler.unlink()
            return
        previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, previous)

    @contextlib.contextmanager
    def read_only(self) -> Iterator[None]:
        """Nothing can be written, made, renamed or removed."""
        if self.is_mounted:
            self._remount("ro")
            try:
                yield
            finally:
                self._remount("rw")
            return
        folders = [self.folder, *(path for path in self.folder.rglob("*") if path.is_dir())]
        modes = [path.stat().st_mode for path in folders]
        for path in folders:
            path.chmod(0o555)
        try:
            with as_an_ordinary_user():
                yield
        finally:
            for path, mode in zip(folders, modes, strict=True):
                path.chmod(mode)

    def _remount(self, how: str) -> None:
        gc.collect()  # a disk with removed files that something has open cannot become read-only
        subprocess.run(["mount", "-o", f"remount,{how}", str(self.folder)], check=True)


@contextlib.contextmanager
def failing_sync() -> Iterator[None]:
    """The disk says at the end, when what was written is forced onto it, that it is damaged."""

    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        yield


# --- inputs


@contextlib.contextmanager
def as_an_ordinary_user() -> Iterator[None]:
    """Takes from root, in this thread and those it starts, the right to open what permissions forbid."""
    library = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITIES_3, 0)
    before, fewer = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()
    library.capget(header, before)
    library.capget(header, fewer)
    fewer[0] &= ~(_CAP_DAC_OVERRIDE | _CAP_DAC_READ_SEARCH)
    library.capset(header, fewer)
    try:
        yield
    finally:
        library.capset(header, before)


@contextlib.contextmanager
def forbidden(path: Path) -> Iterator[None]:
    """A file, or a file of a folder, that this user may not read."""
    target = _member(path)
    mode = target.stat().st_mode
    target.chmod(0)
    try:
        with as_an_ordinary_user():
            yield
    finally:
        target.chmod(mode)


@contextlib.contextmanager
def damaged(path: Path) -> Iterator[None]:
    """A file, or a file of a folder, that is there and fails with EIO when it is read."""
    target = _member(path)
    aside = target.with_name(f"{target.name}.aside")
    target.rename(aside)
    target.symlink_to("/proc/self/mem")
    try:
        yield
    finally:
        target.unlink()
        aside.rename(target)


def _member(path: Path) -> Path:
    if not path.is_dir():
        return path
    if (path / "lmdb").is_dir():
        return path / "train_imgs.tsv"
    return sorted(one for one in path.rglob("*") if one.is_file() and not one.name.startswith("."))[0]


INPUT_FAULTS: dict[str, Callable[[Path], contextlib.AbstractContextManager[None]]] = {
    "unreadable input (EACCES)": forbidden,
    "damaged input (EIO)": damaged,
}
OUTPUT_FAULTS = ("disk full (ENOSPC)", "read-only (EROFS)", "damaged disk (EIO)")


def with_output_fault(fault: str, command: str, paths: dict[str, Path], disk: SmallDisk) -> Outcome:
    """Runs a command that writes to a disk at fault, over what an earlier run has written there."""
    folder = disk.folder / "case"
    folder.mkdir()
    try:
        words = lay_old_outputs(command, paths, folder)
        faults = {OUTPUT_FAULTS[0]: disk.full, OUTPUT_FAULTS[1]: disk.read_only, OUTPUT_FAULTS[2]: failing_sync}
        return run(words, folder, faults[fault]())
    finally:
        shutil.rmtree(folder)


def with_input_fault(fault: str, slot: str, command: str, paths: dict[str, Path], folder: Path) -> Outcome:
    """Runs a command of which one input is at fault, over what an earlier run has written."""
    words = lay_old_outputs(command, paths, folder)
    changed = folder / "copy.index" if command.startswith("index ") and slot == "index" else paths[slot]
    if command == "evaluate" and slot == "data":
        changed = changed / "test_texts.jsonl"
    return run(words, folder, INPUT_FAULTS[fault](changed))

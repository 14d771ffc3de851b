"""Folders that appear whole or not at all: built beside their place, then moved there; leftovers of dead runs go."""

import contextlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from cn_clip.errors import DataError
from cn_clip.processes import host_name, is_alive


@contextlib.contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target`, on the same disk, and removes it in the end.

    What a killed run leaves is removed by the next one for the same target. Raises DataError when it cannot be made.
    """
    target = target.absolute()  # "." has no name to put a folder beside
    folder = _hidden(target, "building")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        clear_leftovers(target)
        folder.mkdir()
    except OSError as error:
        raise DataError(f"{target}: cannot be written ({error.strerror}); choose another folder") from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target`; on success it takes the place of `target`, on error it is removed.

    A run that is killed leaves `target` as it was; a link stays, and the folder it names is replaced. Raises DataError
    when the folders cannot be written, and for a target that is a file or the folder the command runs in.
    """
    place = _replaceable(target)
    retired = _hidden(place, "replaced")
    with scratch_folder(place) as folder:
        yield folder
        try:
            if place.exists():
                os.replace(place, retired)
            os.replace(folder, place)
        except BaseException:
            if retired.exists() and not place.exists():
                os.replace(retired, place)
            raise
        shutil.rmtree(retired, ignore_errors=True)


def _replaceable(target: Path) -> Path:
    """The absolute path of `target`, links followed."""
    place = Path(os.path.realpath(target))
    if place.exists() and not place.is_dir():
        raise DataError(f"{target}: exists and is no folder; choose another name for the folder")
    if place in (Path.cwd(), Path(place.anchor)):  # a shell would go on in the folder that was taken away
        raise DataError(f"{target}: is the folder this command runs in, or the root; choose a folder inside it")
    return place


def _hidden(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.{role}-{host_name()}-{os.getpid()}")


def clear_leftovers(target: Path) -> None:
    """Removes the temporary folders of runs that died; first puts `target` back if one died between two moves."""
    for folder, role in _leftovers(target):
        if role == "replaced" and not target.exists():
            os.replace(folder, target)
        else:
            shutil.rmtree(folder, ignore_errors=True)


def _leftovers(target: Path) -> list[tuple[Path, str]]:
    pattern = re.compile(rf"\.{re.escape(target.name)}\.(building|replaced)-{re.escape(host_name())}-(\d+)")
    found = [(path, pattern.fullmatch(path.name)) for path in sorted(target.parent.iterdir())]
    return [(path, match[1]) for path, match in found if match and not _is_running(int(match[2]))]


def _is_running(pid: int) -> bool:
    # Containers hand out the same few numbers: our own number on an old folder is a dead run's.
    return pid != os.getpid() and is_alive(pid)

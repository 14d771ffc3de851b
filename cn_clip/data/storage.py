"""Folders and files on a disk or in an object store (s3://, gs://, file://), by pyarrow; for jobs of many machines."""

import contextlib
import io
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from cn_clip.data.paths import spelled, walked
from cn_clip.errors import ConfigError, DataError, is_absent
from cn_clip.extras import require
from cn_clip.files import alone, atomic_write, clear_leftovers

EXTRA = "ray"
# What is put into these appears whole when the upload ends; a disk needs a rename.
_OBJECT_STORES = ("s3", "gcs", "abfs")
_READ_AHEAD = 2**20


class StorageError(DataError):
    """A place does not answer, or refuses; the files in it may be sound."""


@dataclass(frozen=True)
class FoundFile:
    """A file of a listing; path: as its `Storage` names it."""

    path: str
    size: int
    mtime_ns: int | None


@dataclass(frozen=True)
class Storage:
    """A place: a file system of pyarrow, and a path in it. May be pickled.

    name: as the user wrote it, without keys and settings; it begins every error.
    """

    files: Any
    path: str
    name: str

    def child(self, name: str) -> "Storage":
        """The place `name` below this one."""
        return Storage(self.files, f"{self.path.rstrip('/')}/{name}", f"{self.name.rstrip('/')}/{spelled(name)}")

    def at(self, path: str) -> "Storage":
        """The place of a path that `list_files` gave."""
        return self.child(self.below(path))

    def below(self, path: str) -> str:
        """What follows this folder in the path of a file below it."""
        return path.removeprefix(self.path).lstrip("/")

    def find(self) -> FoundFile | None:
        """The file that is here; raises DataError when the store does not answer."""
        try:
            if self._is_local:
                return _found(self.path)
            info = self.files.get_file_info(self.path)
        except OSError as error:
            raise self._failed("cannot be looked at", error) from error
        return FoundFile(info.path, info.size, info.mtime_ns) if info.is_file else None

    def list_files(self, *, recursive: bool = True) -> list[FoundFile]:
        """All files below, in the order of their paths; hidden names are passed over. None where there is no folder.

        On a disk, links are followed, and each folder is looked at once.
        """
        try:
            files = self._walked(recursive) if self._is_local else self._listed(recursive)
        except OSError as error:
            raise self._failed("cannot be listed", error) from error
        return sorted((one for one in files if not self._is_hidden(one.path)), key=lambda one: one.path)

    @property
    def _is_local(self) -> bool:
        return bool(self.files.type_name == "local")

    def _listed(self, recursive: bool) -> list[FoundFile]:
        selector = require("pyarrow.fs", extra=EXTRA, purpose=self.name).FileSelector
        found = self.files.get_file_info(selector(self.path, recursive=recursive, allow_not_found=True))
        return [FoundFile(info.path, info.size, info.mtime_ns) for info in found if info.is_file]

    def _walked(self, recursive: bool) -> list[FoundFile]:
        """pyarrow cannot list a folder with a name that is not UTF-8."""
        files = list[FoundFile]()
        for folder, folders, names in walked(self.path, _refuse):
            below = folder.removeprefix(self.path).replace(os.sep, "/").strip("/")
            paths = [self.child(f"{below}/{name}" if below else name).path for name in names]
            files += [found for path in paths if (found := _found(path)) is not None]
            if not recursive:
                folders.clear()
        return files

    def _is_hidden(self, path: str) -> bool:
        return any(part.startswith(".") for part in PurePosixPath(self.below(path)).parts)

    def read(self) -> bytes:
        """The bytes of a file; raises DataError."""
        try:
            with self.input_file() as stream:
                data: bytes = stream.read()
        except OSError as error:
            raise self._failed("cannot be read", error) from error
        return data

    def open(self) -> BinaryIO:
        """A file for reading and seeking, a megabyte at a time; raises DataError."""
        try:
            return io.BufferedReader(self.input_file(), _READ_AHEAD)
        except OSError as error:
            raise self._failed("cannot be read", error) from error

    def input_file(self) -> Any:
        """pyarrow's own file for reading; raises OSError."""
        return self.files.open_input_file(os.fsencode(self.path) if self._is_local else self.path)

    def write(self, data: bytes) -> None:
        """Writes a file, with its folders, that appears whole or not at all; raises DataError."""
        try:
            if self.files.type_name in _OBJECT_STORES:
                with self.files.open_output_stream(self.path) as stream:
                    stream.write(data)
            else:
                Path(self.path).parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(self.path, "wb") as stream:
                    stream.write(data)
        except OSError as error:
            raise self._failed("cannot be written", error) from error

    def delete(self) -> None:
        """Removes a file; raises DataError."""
        try:
            self.files.delete_file(self.path)
        except OSError as error:
            raise self._failed("cannot be removed", error) from error

    def delete_leftovers(self, prefix: str) -> None:
        """Removes what writers that were killed left of files of such names in this folder."""
        if self.files.type_name not in _OBJECT_STORES:
            try:
                clear_leftovers(Path(self.path), f".{prefix}")
            except OSError as error:
                raise self._failed("cannot be listed", error) from error

    @contextlib.contextmanager
    def alone(self, busy: str) -> Iterator[None]:
        """Holds the lock of a folder on a disk while the block runs; an object store has none.

        busy: what to say when another process has it. Raises ConfigError then, DataError when it cannot be taken.
        """
        with contextlib.ExitStack() as stack:
            if self.files.type_name not in _OBJECT_STORES:
                try:
                    Path(self.path).mkdir(parents=True, exist_ok=True)
                    stack.enter_context(alone(Path(self.path, ".lock"), f"{self.name}: {busy}"))
                except OSError as error:
                    raise self._failed("cannot be written", error) from error
            yield

    def _failed(self, what: str, error: OSError) -> DataError:
        kind = DataError if isinstance(error, FileNotFoundError) else StorageError
        return kind(f"{self.name}: {what} ({error.strerror or str(error).splitlines()[0][:200]})")


def _found(path: str) -> FoundFile | None:
    try:
        facts = os.stat(path)
    except OSError as error:
        if is_absent(error):
            return None
        raise
    return FoundFile(path, facts.st_size, facts.st_mtime_ns) if stat.S_ISREG(facts.st_mode) else None


def _refuse(error: OSError) -> None:
    if not is_absent(error):
        raise error


def open_storage(location: str) -> Storage:
    """A local path, or a URI such as s3://bucket/folder; nothing is looked at yet.

    Raises ConfigError for a URI that pyarrow does not know, MissingExtraError without pyarrow.
    """
    file_systems = require("pyarrow.fs", extra=EXTRA, purpose=location)
    name = shown(location)
    if not is_uri(location):
        path = os.path.abspath(os.path.expanduser(location))
        return Storage(file_systems.LocalFileSystem(), path, name)
    try:
        files, path = file_systems.FileSystem.from_uri(location)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{name}: {str(error).splitlines()[0]}; expected a path, s3://, gs:// or file://") from error
    if files.type_name not in (*_OBJECT_STORES, "local"):
        raise ConfigError(f"{name}: expected a path, s3://, gs:// or file://")
    return Storage(files, path, name)


def is_uri(location: str) -> bool:
    """Whether a location names its store."""
    return "://" in location


def shown(location: str) -> str:
    """A location as it may be printed: of a URI, what comes before `?`, without a key before `@`."""
    if not is_uri(location):
        return location
    scheme, _, rest = location.partition("?")[0].partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}://{host.rpartition('@')[2]}{slash}{path}"

"""Files that were read and are not in the index: as long as they stay as they are, the next run does not read them.

The index keeps them as its notes, see `retrieval.writer.IndexWriter.notes`, a line a file.
"""

import importlib.metadata
import json
import os
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cn_clip.index.skips import SMALL, Skipped

# A newer one of these may decode what an older one did not, and so may one that was not there.
_DECODERS = ("cn_clip", "Pillow", "pillow-heif", "rawpy", "av")


@dataclass(frozen=True)
class Failure:
    """A file as it was, and why it is not in the index. side: the shorter one in pixels, of a picture too small."""

    size: int
    mtime_ns: int
    kind: str
    reason: str
    side: int | None = None


class Failures:
    """Of all sources of an index, by the paths of the files."""

    def __init__(self, notes: bytes = b"") -> None:
        self._of_path: dict[str, Failure] = {}
        self._others: list[Any] = []  # what another part of the package noted, see `vectors`
        # Whether there is more or less to keep than `notes`.
        self.has_changed = False
        try:
            head, *lines = map(json.loads, notes.splitlines()) if notes else [{}]
            self._others = [line for line in lines if "shards" in line]
            lines = [line for line in lines if "shards" not in line]
            self._of_path = {line.pop("path"): Failure(**line) for line in lines}
        except (ValueError, TypeError, KeyError, AttributeError):  # of another version
            self.has_changed = True
        else:
            if self._of_path and head != {"decoders": _decoders()}:
                self._keep({path for path, one in self._of_path.items() if one.kind == SMALL})

    def __len__(self) -> int:
        return len(self._of_path)

    def find(self, metadata: Mapping[str, Any], *, min_size: int) -> Failure | None:
        """Why the file that has this path, size and time is not in the index; None if that has to be found out."""
        found = self._of_path.get(metadata.get("path", ""))
        if found is None or (found.size, found.mtime_ns) != (metadata.get("size"), metadata.get("mtime_ns")):
            return None
        return None if found.side is not None and found.side >= min_size else found

    def note(self, metadata: Mapping[str, Any], skipped: Skipped) -> None:
        """Remembers a file that was read whole; one without path, as a picture of an LMDB, is not remembered."""
        if skipped.is_gone and {"path", "size", "mtime_ns"} <= metadata.keys():
            size, mtime_ns = metadata["size"], metadata["mtime_ns"]
            self._of_path[metadata["path"]] = Failure(size, mtime_ns, skipped.kind, skipped.reason, skipped.side)
            self.has_changed = True

    def drop(self, metadata: Mapping[str, Any]) -> None:
        """Forgets a file that is in the index now."""
        self.has_changed |= self._of_path.pop(metadata.get("path", ""), None) is not None

    def forget(self, folder: str, *, but: Collection[str] = ()) -> None:
        """Drops the files below a folder whose paths are not in `but`."""
        within = os.path.join(folder, "")
        self._keep({path for path in self._of_path if path in but or not path.startswith(within)})

    def dumped(self) -> bytes:
        """The notes to keep."""
        if not self._of_path and not self._others:
            return b""
        rows = [{"path": path, **asdict(self._of_path[path])} for path in sorted(self._of_path)] + self._others
        return b"".join(json.dumps(one).encode() + b"\n" for one in [{"decoders": _decoders()}, *rows])

    def _keep(self, paths: set[str]) -> None:
        self.has_changed |= len(paths) < len(self._of_path)
        self._of_path = {path: one for path, one in self._of_path.items() if path in paths}


def _decoders() -> dict[str, str]:
    versions = {}
    for name in _DECODERS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = ""
    return versions

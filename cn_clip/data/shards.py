"""WebDataset shards: pairs of picture and text in tar files, found by their headers once, then read by offset and size.

A sample is the members with the same name up to the first dot: a picture, and a text in `.txt` or under "text" or
"caption" in `.json`, which may also give `image_id` and `text_id`.
"""

import logging
import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from cn_clip.clip.picture_names import PICTURE_SUFFIXES
from cn_clip.data.paths import spelled
from cn_clip.data.records import SourcePair, canonical_id
from cn_clip.data.tars import Member, read_at, shard_paths, tar_members
from cn_clip.errors import DataError, Where
from cn_clip.jsonl import parse_object
from cn_clip.language import both, translated
from cn_clip.progress import counted

logger = logging.getLogger(__name__)

TEXT_FIELDS = ("text", "caption")

_ROLES = {**dict.fromkeys(PICTURE_SUFFIXES, "picture"), ".txt": "text", ".json": "record"}
_SCAN_THREADS = 4
_MAX_OPEN_FILES = 8
_MAX_FAULTS_SHOWN = 20

_PARTS = ("picture", "text", "record")
_ABSENT = Member("", -1, 0)


class _Scan(NamedTuple):
    """The samples of a shard in the order of their pictures, and what is wrong with others.

    spans: offset and size of picture, text and record (N, 6), -1 and 0 for none. keys: their names.
    """

    spans: "np.ndarray[tuple[int, int], np.dtype[np.int64]]"
    keys: list[str]
    faults: list[str]


def _scan(path: str) -> _Scan:
    samples: dict[str, dict[str, Member]] = {}
    faults: list[str] = []
    try:
        with open(path, "rb", buffering=4096) as stream:
            for member in tar_members(stream, path):
                key, suffix = member.sample
                role = _ROLES.get(suffix)
                if role is None or not key or key.rpartition("/")[2].startswith("__"):
                    continue  # of other tools, or WebDataset's notes to itself
                parts = samples.setdefault(key, {})
                if parts.setdefault(role, member) is not member:
                    faults.append(f"{path}: member {member.name!r}: the sample has {parts[role].name!r} already")
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", at=path) from error
    except DataError as error:
        faults.append(str(error))
    whole = {}
    for key, parts in samples.items():
        if "picture" not in parts:
            faults.append(f"{path}: sample {key!r} has no picture ({', '.join(PICTURE_SUFFIXES)})")
        elif "text" not in parts and "record" not in parts:
            faults.append(f"{path}: sample {key!r} has no text (.txt, or .json with text or caption)")
        else:
            whole[key] = parts
    if not samples and not faults:
        faults.append(f"{path}: holds no sample; expected members such as 0001.jpg and 0001.txt")
    keys = sorted(whole, key=lambda key: whole[key]["picture"].offset)
    rows = [[number for role in _PARTS for number in whole[key].get(role, _ABSENT)[1:]] for key in keys]
    return _Scan(np.array(rows, dtype=np.int64).reshape(-1, 2 * len(_PARTS)), keys, faults)


class ShardPairs:
    """The pairs of tar files, a PairSource: those of the first file in order, then those of the next.

    It keeps about 70 bytes a pair in memory. May be pickled, or inherited by forked workers.
    """

    def __init__(self, value: str, *, split: str = "train", on_error: Literal["stop", "skip"] = "stop") -> None:
        """Reads all headers. At a damaged file or an incomplete sample: raises DataError ("stop"), or leaves it out
        and counts it in the log ("skip")."""
        self.paths = shard_paths(value)
        scans: list[_Scan] = []
        with ThreadPoolExecutor(_SCAN_THREADS) as pool:  # threads: the waiting is for the disk
            found = pool.map(_scan, self.paths)
            what = both("读取分片", "reading shards")
            for scan in counted(found, both("个", "shards"), what, total=len(self.paths)):
                if scan.faults and on_error == "stop":
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise DataError(f"{scan.faults[0]} (--on-error skip leaves such samples out)")
                scans.append(scan)
        faults = [fault for scan in scans for fault in scan.faults]
        for fault in faults[:_MAX_FAULTS_SHOWN]:
            logger.warning("%s%s", both("跳过：", "skipped: "), translated(str(fault)))
        if faults:
            count = len(faults)
            logger.warning("%s", both(f"分片里共跳过 {count} 处问题", f"skipped {count} faults of the shards in all"))
        self.shard_sizes = [len(scan.keys) for scan in scans]
        self._starts = np.cumsum([0, *self.shard_sizes])
        self._spans = np.concatenate([scan.spans for scan in scans])
        names = [key.encode() for scan in scans for key in scan.keys]
        self._names, self._name_ends = b"".join(names), np.cumsum([0, *map(len, names)])
        self._files = _OpenFiles()
        logger.info("%s: %d shards contain %d pairs.", split, len(self.paths), len(self))
        if not len(self):
            raise DataError(f"{value}: holds no pair of picture and text")

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, number: int) -> SourcePair:
        shard = self._shard(number)
        key = self._names[self._name_ends[number] : self._name_ends[number + 1]].decode()
        where = Where(self.paths[shard], part=f"sample {key!r}", id=key)
        picture, text, record = (
            self._files.read(self.paths[shard], int(offset), int(size), where) if offset >= 0 else None
            for offset, size in self._spans[number].reshape(-1, 2)
        )
        values = {} if record is None else parse_object(record, where)
        default = f"{spelled(self.paths[shard])}/{key}"  # names repeat from shard to shard, with the file's they do not
        ids = []
        for name in ("image_id", "text_id"):
            try:
                ids.append(default if values.get(name) is None else canonical_id(values[name]))
            except DataError as error:
                raise DataError(f"{name} in its .json: {error}", at=where) from error
        if text is None:
            found = next((values[name] for name in TEXT_FIELDS if name in values), None)
            if isinstance(found, bool) or not isinstance(found, (str, int, float)):
                raise DataError(f"expected a string under text or caption in its .json, got {found!r:.60}", at=where)
            caption = str(found)
        else:
            try:
                caption = text.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"its .txt is not UTF-8 (byte {error.start})", at=where) from error
        return SourcePair(picture or b"", caption.strip(), ids[0], ids[1], where)

    def substitute(self, number: int) -> int:
        """The next pair of the same shard, so that a worker stays in its shards."""
        shard = self._shard(number)
        return number + 1 if number + 1 < self._starts[shard + 1] else int(self._starts[shard])

    def _shard(self, number: int) -> int:
        return int(np.searchsorted(self._starts, number, side="right")) - 1


class _OpenFiles:
    """The files that this process reads, the last few kept open."""

    def __init__(self) -> None:
        self._files: dict[str, BinaryIO] = {}
        self._pid = os.getpid()

    def read(self, path: str, offset: int, size: int, where: Where) -> bytes:
        """Raises DataError that starts with `where` when the bytes are not there any more."""
        try:
            data = read_at(self._open(path), offset, size)
        except OSError as error:
            raise DataError(f"cannot be read ({error.strerror})", at=where) from error
        if len(data) < size:
            raise DataError("the file became shorter while it was in use", at=where)
        return data

    def _open(self, path: str) -> BinaryIO:
        if self._pid != os.getpid():  # a forked worker: parent and child would move the same file position
            self.close()
        stream = self._files.pop(path, None) or open(path, "rb", buffering=0)  # noqa: SIM115 - kept open, see close
        self._files[path] = stream  # the last in use is the last in the dictionary
        if len(self._files) > _MAX_OPEN_FILES:
            self._files.pop(next(iter(self._files))).close()
        return stream

    def close(self) -> None:
        """Closes all; they open again when they are read."""
        for stream in self._files.values():
            stream.close()
        self._files, self._pid = {}, os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {"_files": {}, "_pid": os.getpid()}

    def __del__(self) -> None:
        self.close()

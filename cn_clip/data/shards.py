"""WebDataset shards: pairs of picture and text in tar files, found by their headers once, then read by their places.

A sample is the members with the same name up to the first dot: a picture, and a text in `.txt` or under "text" or
"caption" in `.json`, which may also give `image_id` and `text_id`.
"""

import glob
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from cn_clip import ranks
from cn_clip.clip.picture_names import PICTURE_SUFFIXES
from cn_clip.data.datasets import SourcePair, logger
from cn_clip.data.names import spelled
from cn_clip.data.records import RecordId, canonical_id
from cn_clip.data.tars import Member, compressed, read_at, tar_members
from cn_clip.errors import ConfigError, DataError, Where
from cn_clip.jsonl import parse_object

TEXT_FIELDS = ("text", "caption")
MAX_SHARDS = 1_000_000

_ROLES = {**dict.fromkeys(PICTURE_SUFFIXES, "picture"), ".txt": "text", ".json": "record"}
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_SCAN_THREADS = 4
_MAX_OPEN_FILES = 8
_MAX_FAULTS_SHOWN = 20


def is_shards(value: str) -> bool:
    """Whether a value of --train-data names tar files rather than the folder of an LMDB."""
    pattern = any(mark in value for mark in ("{", "*", "::"))
    return (pattern and not Path(value).is_dir()) or value.lower().endswith((".tar", *_COMPRESSED))


def shard_paths(value: str) -> list[str]:
    """The files of `a/{000..099}.tar`, `{a,b}.tar`, `a/*.tar`, `a.tar` or several of these joined by `::`, in order.

    Raises DataError for a file that does not exist or is compressed, ConfigError for one named twice by any names.
    """
    if "://" in value or value.startswith("pipe:"):
        raise ConfigError(f"{value}: expected local tar files; copy them to a disk, or mount their store")
    patterns = (os.path.expanduser(pattern) for part in value.split("::") for pattern in expand_braces(part))
    paths = [path for pattern in patterns for path in _existing(pattern)]
    for path in paths:
        if path.lower().endswith(_COMPRESSED):
            raise compressed(path)
    files = Counter(map(os.path.realpath, paths))
    twice = next((file for file, count in files.items() if count > 1), None)
    if twice is not None:
        raise ConfigError(f"{value}: names {twice} twice; expected each shard once")
    return paths


def _existing(pattern: str) -> list[str]:
    if os.path.isfile(pattern):
        return [pattern]
    found = sorted(path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path))
    if not found:
        raise DataError("no such shard; expected tar files such as 'shards/{000..099}.tar'", at=pattern)
    return found


def expand_braces(text: str) -> list[str]:
    """`x{08..10}` -> x08, x09, x10 and `x{a,b{1,2}}` -> xa, xb1, xb2, as shells do; other braces stay as they are."""
    opening = text.find("{")
    closing = _closing(text, opening) if opening >= 0 else -1
    if closing < 0:
        return [text]
    inside = text[opening + 1 : closing]
    choices = _choices(inside) or ["{" + middle + "}" for middle in expand_braces(inside)]
    rests = expand_braces(text[closing + 1 :])
    if len(choices) * len(rests) > MAX_SHARDS:
        raise ConfigError(f"{text}: names more than {MAX_SHARDS:,} shards; check the range in braces")
    return [text[:opening] + choice + rest for choice in choices for rest in rests]


def _closing(text: str, opening: int) -> int:
    depth = 0
    for place in range(opening, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return place
    return -1


def _choices(inside: str) -> list[str]:
    """What a pair of braces stands for; empty when it is neither a range nor a list."""
    found = _RANGE.fullmatch(inside)
    if found:
        first, last = int(found[1]), int(found[2])
        if abs(last - first) >= MAX_SHARDS:
            raise ConfigError(f"{{{inside}}}: names more than {MAX_SHARDS:,} shards; check the range in braces")
        padded = any(re.match(r"-?0\d", end) for end in found.groups())
        width = max(map(len, found.groups())) if padded else 0
        step = 1 if last >= first else -1
        return [f"{number:0{width}d}" for number in range(first, last + step, step)]
    parts = _split_outside_braces(inside)
    return [choice for part in parts for choice in expand_braces(part)] if len(parts) > 1 else []


def _split_outside_braces(text: str) -> list[str]:
    depth, parts = 0, [""]
    for character in text:
        depth += {"{": 1, "}": -1}.get(character, 0)
        if character == "," and not depth:
            parts.append("")
        else:
            parts[-1] += character
    return parts


_PARTS = ("picture", "text", "record")
_ABSENT = Member("", -1, 0)


class _Scan(NamedTuple):
    """The samples of a shard in the order of their pictures: places (N, 6), names, and what is wrong with others."""

    places: "np.ndarray[tuple[int, int], np.dtype[np.int64]]"
    keys: list[str]
    faults: list[str]


def _scan(path: str) -> _Scan:
    samples: dict[str, dict[str, Member]] = {}
    faults: list[str] = []
    try:
        with open(path, "rb", buffering=4096) as stream:
            for member in tar_members(stream, path):
                _add(samples, member, path, faults)
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", at=path) from error
    except DataError as error:
        faults.append(str(error))
    whole = {}
    for key, parts in samples.items():
        lacking = _lacking(parts)
        if lacking:
            faults.append(f"{path}: sample {key!r} has no {lacking}")
        else:
            whole[key] = parts
    if not samples and not faults:
        faults.append(f"{path}: holds no sample; expected members such as 0001.jpg and 0001.txt")
    keys = sorted(whole, key=lambda key: whole[key]["picture"].offset)
    rows = [[number for role in _PARTS for number in whole[key].get(role, _ABSENT)[1:]] for key in keys]
    return _Scan(np.array(rows, dtype=np.int64).reshape(-1, 2 * len(_PARTS)), keys, faults)


def _add(samples: dict[str, dict[str, Member]], member: Member, path: str, faults: list[str]) -> None:
    folder, slash, name = member.name.removeprefix("./").rpartition("/")
    stem, _, suffix = name.partition(".")
    role = _ROLES.get(f".{suffix.lower()}")
    if role is None or not stem or stem.startswith("__"):  # files of other tools, and WebDataset's notes to itself
        return
    parts = samples.setdefault(f"{folder}{slash}{stem}", {})
    if parts.setdefault(role, member) is not member:
        faults.append(f"{path}: member {member.name!r}: the sample has {parts[role].name!r} already")


def _lacking(parts: dict[str, Member]) -> str:
    if "picture" not in parts:
        return f"picture ({', '.join(PICTURE_SUFFIXES)})"
    return "" if "text" in parts or "record" in parts else "text (.txt, or .json with text or caption)"


class ShardPairs:
    """The pairs of tar files, a PairSource: those of the first file in order, then those of the next.

    It keeps about 70 bytes a pair in memory. May be pickled, or inherited by forked workers.
    """

    def __init__(self, value: str, *, split: str = "train", on_error: Literal["stop", "skip"] = "stop") -> None:
        """Reads all headers. At a damaged file or an incomplete sample: raises DataError ("stop"), or leaves it out
        and counts it in the log ("skip")."""
        self.paths = shard_paths(value)
        scans = self._scans(on_error)
        self.shard_sizes = [len(scan.keys) for scan in scans]
        self._starts = np.cumsum([0, *self.shard_sizes])
        self._places = np.concatenate([scan.places for scan in scans])
        names = [key.encode() for scan in scans for key in scan.keys]
        self._names, self._name_ends = b"".join(names), np.cumsum([0, *map(len, names)])
        self._files = _OpenFiles()
        logger.info("%s: %d shards contain %d pairs.", split, len(self.paths), len(self))
        if not len(self):
            raise DataError(f"{value}: holds no pair of picture and text")

    def _scans(self, on_error: Literal["stop", "skip"]) -> list[_Scan]:
        from tqdm import tqdm

        quiet = None if ranks.rank() == 0 else True
        scans, faults = [], []
        with ThreadPoolExecutor(_SCAN_THREADS) as pool:  # threads: the waiting is for the disk
            found = pool.map(_scan, self.paths)
            for scan in tqdm(found, "reading shards", len(self.paths), unit=" shards", delay=1, disable=quiet):
                if scan.faults and on_error == "stop":
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise DataError(f"{scan.faults[0]} (--on-error skip leaves such samples out)")
                scans.append(scan)
                faults += scan.faults
        for fault in faults[:_MAX_FAULTS_SHOWN]:
            logger.warning("skipped: %s", fault)
        if faults:
            logger.warning("skipped %d faults of the shards in all", len(faults))
        return scans

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> SourcePair:
        shard = self._shard(number)
        key = self._names[self._name_ends[number] : self._name_ends[number + 1]].decode()
        where = Where(self.paths[shard], part=f"sample {key!r}", id=key)
        picture, text, record = (
            self._files.read(self.paths[shard], int(offset), int(size), where) if offset >= 0 else None
            for offset, size in self._places[number].reshape(-1, 2)
        )
        values = {} if record is None else parse_object(record, where)
        default = f"{spelled(self.paths[shard])}/{key}"  # names repeat from shard to shard, with the file's they do not
        image_id, text_id = (_record_id(values, name, default, where) for name in ("image_id", "text_id"))
        return SourcePair(picture or b"", _caption(text, values, where), image_id, text_id, where)

    def substitute(self, number: int) -> int:
        """The next pair of the same shard, so that a worker stays in its shards."""
        shard = self._shard(number)
        return number + 1 if number + 1 < self._starts[shard + 1] else int(self._starts[shard])

    def _shard(self, number: int) -> int:
        return int(np.searchsorted(self._starts, number, side="right")) - 1


def _caption(text: bytes | None, values: dict[str, Any], where: Where) -> str:
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
    return caption.strip()


def _record_id(values: dict[str, Any], name: str, default: str, where: Where) -> RecordId:
    value = values.get(name)
    try:
        return default if value is None else canonical_id(value)
    except DataError as error:
        raise DataError(f"{name} in its .json: {error}", at=where) from error


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

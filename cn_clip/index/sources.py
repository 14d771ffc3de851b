"""What an index is built from: folders of pictures, single pictures, LMDB splits, and the tables beside them."""

import os
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from cn_clip.clip.picture_names import LARGEST_PICTURE, PICTURE_SUFFIXES, VIDEO_SUFFIXES, suffix_of
from cn_clip.data import metadata
from cn_clip.data.lmdb_store import IMAGES, PAIRS, ImageStore, PairStore, is_split_folder
from cn_clip.data.metadata import CAPTION_COLUMN, Table, row_of
from cn_clip.data.paths import spelled, walked
from cn_clip.data.storage import is_uri
from cn_clip.digests import is_file, is_folder, is_there
from cn_clip.errors import ConfigError, DataError, UnreadableError, is_absent
from cn_clip.features.embedding_folders import is_embedding_folder
from cn_clip.features.store import is_shard_folder
from cn_clip.index.excludes import Excludes
from cn_clip.index.live_photos import other_halves
from cn_clip.index.skips import EXCLUDED, LIVE, OTHER, SPECIAL, UNREADABLE, Skipped
from cn_clip.retrieval import manifest
from cn_clip.retrieval.segments import ItemId
from cn_clip.secret import AddressText, as_typed

__all__ = ["CAPTION_COLUMN", "Table", "row_of"]

FEATURE_SUFFIXES = (".jsonl", ".npz", ".parquet")
# Names those of `FACTS` that a table gave: these stay when the picture is read again without the table.
TABLE_FIELDS = "table_fields"
# What the commands themselves write into the metadata of an item.
OWN_FIELDS = (
    *("source", "path", "size", "mtime_ns", "digest", "width", "height", TABLE_FIELDS),
    # Of Live Photos, see `live_photos`, and of the frames of videos, see `clips`.
    *("live", "kind", "time", "video", "video_every", "frames"),
    # The words in a picture, see `data.ocr`.
    "text",
)
# What the opened picture says, see `ingest.facts_of`: kept as long as the file is as it was, and read again with it.
PICTURE_FIELDS = ("width", "height", "date", "camera", "latitude", "longitude")
# What a picture and its name say: unlike the index's own fields, a table may give these, and is believed.
FACTS = ("date", "camera", "latitude", "longitude", "folder", "file")


@dataclass(frozen=True)
class Candidate:
    """A picture that may be added. metadata: what is known before it is read; is_dated: changes of it show there."""

    id: ItemId
    metadata: Mapping[str, Any]
    read: Callable[[], bytes]
    is_dated: bool


@dataclass
class Source:
    """The pictures and videos of a source. name: its absolute path; skipped: what was seen to be none of them.

    links: (id, where it leads) of the links that leave the folder, which are followed like others.
    """

    name: str
    id_prefix: str = ""
    candidates: list[Candidate] = field(default_factory=list)
    videos: list[Candidate] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    links: list[tuple[str, str]] = field(default_factory=list)


# A path of this machine, or the URI of a folder of feature shards.
Location: TypeAlias = Path | AddressText


def location_of(text: str) -> Location:
    """A source as it was typed."""
    return AddressText(text) if is_uri(as_typed(text)) else Path(text)


def is_feature_file(source: Location) -> bool:
    """Whether a source holds vectors instead of pictures; raises UnreadableError."""
    if not isinstance(source, Path):
        return True
    is_single = source.suffix.lower() in FEATURE_SUFFIXES and is_file(source)
    return is_single or is_shard_folder(source) or is_embedding_folder(source)


def is_shards(source: Location) -> bool:
    """Whether a source that holds vectors is a folder of shards, not a file."""
    return not isinstance(source, Path) or is_shard_folder(source)


def open_source(
    path: Path, *, id_prefix: str = "", exclude: Sequence[str] = (), seen: Callable[[int], object] = lambda count: None
) -> Source:
    """Raises DataError when there is nothing at `path`, or what cannot be read, ConfigError for faulty patterns.

    exclude: names of a folder that are passed over, see `excludes`. seen: called with the number of files of a folder.
    """
    try:
        return _open(path, id_prefix, exclude, seen)
    except UnreadableError:
        raise
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror or error}); is the disk there?", at=path) from error


def is_single_picture(path: Path) -> bool:
    """Whether a source is one file, and no feature file."""
    return is_file(path) and not is_feature_file(path)


def _open(path: Path, id_prefix: str, exclude: Sequence[str], seen: Callable[[int], object]) -> Source:
    is_lmdb = is_file(path / "data.mdb")
    if is_folder(path) and not is_lmdb and not is_split_folder(path):
        return _folder(path.absolute(), id_prefix, Excludes(exclude), seen)
    refuse_excludes(path, exclude)
    if is_split_folder(path):
        return _lmdb(path / IMAGES, id_prefix)
    if is_lmdb:
        return _lmdb(path, id_prefix)
    if is_there(path):
        source = Source(str(path.absolute().parent), id_prefix)
        _look_at(source, os.fspath(path.absolute()))
        return source
    raise DataError("no such file or folder; expected pictures, an LMDB split or a feature file", at=path)


def refuse_excludes(path: Location, exclude: Sequence[str]) -> None:
    """Raises ConfigError if there are any, for a source that is no folder of pictures."""
    if exclude:
        raise ConfigError(f"--exclude {exclude[0]}: is for folders of pictures; leave it out", at=path)


def _folder(root: Path, id_prefix: str, excludes: Excludes, seen: Callable[[int], object]) -> Source:
    """All below `root` in sorted order, links followed, each folder once.

    Hidden names, indexes and what is excluded are passed over.
    """
    source = Source(os.fspath(root), id_prefix)

    def unreadable(error: OSError) -> None:
        if error.filename == os.fspath(root):
            raise error
        name, reason = _id(source, str(error.filename)), f"cannot be read ({error.strerror})"
        source.skipped.append(Skipped(name, reason, UNREADABLE, is_gone=False))

    for folder, folders, names in walked(root, unreadable):
        if manifest.NAME in names and any(map(manifest.is_own, [*names, *folders])):  # an index
            folders.clear()
            continue
        above = os.path.relpath(folder, root).replace(os.sep, "/") + "/" if folder != os.fspath(root) else ""
        for kept, found in ((folders, list(folders)), (names, list(names))):
            kept[:] = [name for name in found if excludes.admits(above + name, name)]
            for name in sorted(set(found).difference(kept)):
                source.skipped.append(Skipped(source.id_prefix + spelled(above + name), "excluded", EXCLUDED))
        for name in folders:
            _note_link(source, os.path.join(folder, name))
        for name in names:
            _look_at(source, os.path.join(folder, name))
        seen(len(names))
    _pair(source)
    return source


def _pair(source: Source) -> None:
    """Notes with the still of a Live Photo its other half, which is no video of its own then."""
    movies = {str(one.id): one.metadata["size"] for one in source.videos}
    live = other_halves((str(one.id) for one in source.candidates), movies)
    if not live:
        return
    taken = set(live.values())
    for number, one in enumerate(source.candidates):
        if movie := live.get(str(one.id)):
            file = os.path.basename(movie)
            source.candidates[number] = replace(one, metadata={**one.metadata, "live": file})
    source.skipped += [
        Skipped(one.id, "the other half of a Live Photo", LIVE) for one in source.videos if one.id in taken
    ]
    source.videos = [one for one in source.videos if one.id not in taken]


def _note_link(source: Source, path: str) -> None:
    """Notes a link that leaves the folder of the source."""
    if os.path.islink(path):
        target, root = os.path.realpath(path), os.path.realpath(source.name)
        if os.path.commonpath([target, root]) != root:
            source.links.append((_id(source, path), target))


def _look_at(source: Source, path: str) -> None:
    name = _id(source, path)
    suffix = suffix_of(name)
    is_video = suffix in VIDEO_SUFFIXES
    if suffix and suffix not in PICTURE_SUFFIXES and not is_video:
        source.skipped.append(Skipped(name, "not a picture by its name", OTHER))
        return
    try:
        facts = os.lstat(path)
        if stat.S_ISLNK(facts.st_mode):
            _note_link(source, path)
            facts = os.stat(path)
    except OSError as error:
        # A link that leads nowhere may lead to a disk that is not there now.
        is_gone = is_absent(error) and not os.path.islink(path)
        source.skipped.append(Skipped(name, f"cannot be read ({error.strerror})", UNREADABLE, is_gone=is_gone))
        return
    if not stat.S_ISREG(facts.st_mode):
        source.skipped.append(Skipped(name, "not a regular file", SPECIAL))
        return
    known = {"source": source.name, "path": path, "size": facts.st_size, "mtime_ns": facts.st_mtime_ns}
    found = source.videos if is_video else source.candidates
    found.append(Candidate(name, known, partial(read_file, path), is_dated=True))


def file_id(item_id: ItemId, metadata: Mapping[str, Any]) -> ItemId:
    """The id of the file that an item is of: for a frame that of its video, a/clip.mp4 of a/clip.mp4#t=12.5."""
    is_frame = metadata.get("kind") == "video" and isinstance(item_id, str)
    return item_id.rpartition("#t=")[0] if is_frame and isinstance(item_id, str) else item_id


def _id(source: Source, path: str) -> str:
    relative = path.removeprefix(source.name).removeprefix(os.sep)
    return source.id_prefix + spelled(relative.replace(os.sep, "/"))


def read_file(path: str) -> bytes:
    """The bytes of a picture file; raises DataError for one that is too large, OSError."""
    with open(path, "rb") as stream:
        data = stream.read(LARGEST_PICTURE + 1)
    if len(data) > LARGEST_PICTURE:
        raise DataError(f"has more than {LARGEST_PICTURE >> 20} MiB")
    return data


def _lmdb(folder: Path, id_prefix: str) -> Source:
    """The pictures of a split; the caption is the first text of each, if the pairs lie beside the pictures."""
    store, source = ImageStore(folder), Source(str(folder.absolute()), id_prefix)
    captions: dict[ItemId, str] = {}
    if is_file(folder.parent / PAIRS / "data.mdb"):
        pairs = PairStore(folder.parent / PAIRS)
        for number in range(len(pairs)):
            pair = pairs[number]
            captions.setdefault(pair.image_id, pair.text)
    for image_id in store.ids:
        known: dict[str, Any] = {"source": source.name}
        if image_id in captions:
            known["caption"] = captions[image_id]
        item_id = f"{id_prefix}{image_id}" if id_prefix else image_id
        source.candidates.append(Candidate(item_id, known, partial(store.picture, image_id), is_dated=False))
    return source


def read_table(path: Path, image_column: str) -> Table:
    """See `data.metadata.read_table`; raises DataError also for a column that the index itself writes."""
    return metadata.read_table(path, image_column, own=set(OWN_FIELDS) - {CAPTION_COLUMN})

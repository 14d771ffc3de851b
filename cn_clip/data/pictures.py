"""Stored pictures: bytes to PIL and to pixels, with errors in one sentence; pictures by number, and batches of them."""

# B batch, R resolution

import contextlib
import io
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

from PIL import ExifTags, Image, UnidentifiedImageError

from cn_clip.clip.backends.base import AnyPixels
from cn_clip.clip.picture_files import prepare
from cn_clip.clip.picture_names import PICTURE_SUFFIXES, is_picture_file, passed_over
from cn_clip.clip.pictures import Room, decode, decoded_batches, float_room, opened
from cn_clip.clip.thumbnails import thumbnail
from cn_clip.clip.transforms import PictureTransform, in_8_bits, is_deep, shape_of, write_pixels
from cn_clip.data.lmdb_store import ImageStore
from cn_clip.data.paths import walked
from cn_clip.data.records import RecordId
from cn_clip.digests import is_folder
from cn_clip.errors import ConfigError, DataError, UnreadableError, Where

logger = logging.getLogger(__name__)

# Modes of Pillow that a PNG can have.
PNG_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA"})
# Formats of `picture_names` that leave details out; those of WebP are of both kinds.
LOSSY = frozenset({"JPEG", "MPO", "AVIF", "JPEG2000", "HEIF"})
SHRUNK_QUALITY = 95

KeyT = TypeVar("KeyT", covariant=True)
PixelsT = TypeVar("PixelsT")
PictureCheck: TypeAlias = Literal["decode", "header", "none"]


# --- one picture


def open_picture(data: bytes, draft_size: int | None = None, *, upright: bool = False) -> Image.Image:
    """The decoded picture, see `clip.pictures.decode`.

    Raises DataError when the bytes are no picture, are cut short, or hold more pixels than PIL admits.
    """
    try:
        return decode(data, draft_size, upright=upright)
    except Exception as error:
        raise _not_a_picture(data, error) from error


def load_picture(
    data: bytes, where: Where, transform: Callable[[Image.Image], PixelsT], *, draft_size: int | None = None
) -> PixelsT:
    """The transformed picture; raises DataError that starts with `where`."""
    try:
        return transform(open_picture(data, draft_size))
    except (DataError, OSError, ValueError) as error:  # a transform may meet what loading let pass
        raise DataError(error, at=where) from error


def check_picture(data: bytes, check: PictureCheck) -> bool:
    """Whether the picture is grey of more than 8 bits; raises DataError when the bytes are no readable picture.

    "decode" reads all the compressed data (JPEG at one eighth of the size, which costs half), "header" only the
    structure at the front (all of a file that `clip.pictures.opened` gives to another process), "none" nothing.
    """
    if check == "none":
        return False
    try:
        image = opened(data)
        if check == "decode":
            image.draft("L", (1, 1))
            image.load()
            in_8_bits(image)
        return is_deep(image)
    except Exception as error:
        raise _not_a_picture(data, error) from error


def shrunk(data: bytes, shorter_side: int) -> bytes:
    """The file of the same picture with a shorter side of so many pixels; `data` itself where that saves nothing.

    Scaled as `ImageTransform` scales, in the picture's own mode: the pixels of a model differ little, see docs/data.md.
    What was lossy becomes a JPEG of quality 95, the rest a PNG; colour profile and EXIF orientation stay, other
    metadata and the frames after the first go. Grey of more than 8 bits, and colours that a PNG has not, stay.
    Raises DataError when the bytes are no readable picture.
    """
    try:
        with opened(data) as image:
            prepare(image)
            kind, scale = str(image.format), shorter_side / min(image.size)
            if scale >= 1 or is_deep(image):
                return data
            orientation = None
            with contextlib.suppress(Exception):  # EXIF that is damaged in one way or another says nothing
                orientation = image.getexif().get(ExifTags.Base.Orientation)
            width, height = (max(1, round(side * scale)) for side in image.size)
            small = image.resize((width, height), Image.Resampling.BICUBIC)
        kept: dict[str, Any] = {"icc_profile": small.info.get("icc_profile")}
        if orientation is not None:
            kept["exif"] = Image.Exif()
            kept["exif"][ExifTags.Base.Orientation] = orientation
        is_lossy = kind in LOSSY or (kind == "WEBP" and b"VP8L" not in data)
        stream = io.BytesIO()
        if is_lossy and small.mode in ("L", "RGB", "CMYK"):
            small.save(stream, "JPEG", quality=SHRUNK_QUALITY, subsampling=0, **kept)
        elif small.mode not in PNG_MODES:
            return data
        else:
            small.save(stream, "PNG", **kept)
    except Exception as error:
        raise _not_a_picture(data, error) from error
    return min(stream.getvalue(), data, key=len)


def _not_a_picture(data: bytes, error: Exception) -> DataError:
    if not data:
        return DataError("the picture is empty (0 bytes)")
    if isinstance(error, DataError):
        return DataError(f"the picture of {len(data)} bytes is not decoded: {error}")
    reason = "no known picture format" if isinstance(error, UnidentifiedImageError) else f"{error}"
    return DataError(f"the picture of {len(data)} bytes does not decode ({reason})")


# --- pictures by number


@dataclass(frozen=True)
class StoredPicture(Generic[KeyT]):
    """A picture as it is stored: what it is known by, the bytes of its file; `where` begins an error about it.

    beside: what lies beside it in a table or a tar file, as far as it was asked for.
    """

    key: KeyT
    data: bytes
    where: Where
    beside: Mapping[str, Any] = field(default_factory=dict)


def load_pixels(
    stored: StoredPicture[object], transform: PictureTransform, out: AnyPixels, *, thumbnail_size: int = 0
) -> bytes:
    """Puts the pixels (3, R, R) of a stored picture into `out`; raises DataError that starts with its `where`.

    Returns a thumbnail, see `clip.thumbnails`, b"" for a size of 0.
    """

    def write(image: Image.Image) -> bytes:
        write_pixels(transform, image, out)
        return thumbnail(image, thumbnail_size) if thumbnail_size else b""

    return load_picture(stored.data, stored.where, write, draft_size=transform.draft_size)


class PictureSource(Protocol[KeyT]):
    """Where pictures come from, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> StoredPicture[KeyT]:
        """Raises DataError naming a picture that cannot be read."""
        ...


def batches(
    pictures: PictureSource[KeyT],
    transform: PictureTransform,
    batch_size: int,
    num_threads: int | None = 1,
    *,
    first: int = 0,
    room: Room | None = None,
) -> Iterator[tuple[list[KeyT], AnyPixels]]:
    """(keys, pixels (B, 3, R, R)) in order from number `first` on; meanwhile `num_threads` threads decode the next.

    num_threads 0: decodes in this thread. room: see `decoded_batches`; default: for normalised pixels. Raises
    ConfigError for a batch size below 1 or fewer than 0 threads, DataError for an empty source and naming a picture
    that cannot be read.
    """
    if batch_size < 1 or (num_threads is not None and num_threads < 0):
        raise ConfigError(f"expected a batch size of 1 or more and 0 or more workers, got {batch_size}, {num_threads}")
    if not len(pictures):
        raise DataError("the dataset is empty; nothing to load")

    def load(index: int, out: AnyPixels) -> KeyT:
        stored = pictures[index]
        load_pixels(stored, transform, out)
        return stored.key

    room = room or float_room(shape_of(transform))
    return decoded_batches(load, range(first, len(pictures)), room, batch_size, num_threads)


class PictureDataset(Generic[KeyT, PixelsT]):
    """The pictures of a source for torch's loader: (key, picture as `transform` makes it).

    draft_size: as of `load_picture`; None: they are decoded whole.
    """

    def __init__(
        self,
        source: PictureSource[KeyT],
        transform: Callable[[Image.Image], PixelsT],
        *,
        draft_size: int | None = None,
    ) -> None:
        self.source, self.transform, self.draft_size = source, transform, draft_size

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> tuple[KeyT, PixelsT]:
        stored = self.source[index]
        return stored.key, load_picture(stored.data, stored.where, self.transform, draft_size=self.draft_size)


class LmdbPictures:
    """The pictures of an `imgs` folder by index, known by their ids. May be pickled: the folder is opened again."""

    paths = None  # see `bulk_pictures.Part`

    def __init__(self, images_folder: str | os.PathLike[str], ids: Sequence[RecordId] | None = None) -> None:
        """Opens an `imgs` folder; raises DataError if it is none. ids: of the pictures wanted; default all, by key."""
        self.images = ImageStore(images_folder)
        self.ids = self.images.ids if ids is None else ids
        if ids is None:
            logger.info("The specified LMDB directory contains %d images.", len(self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> StoredPicture[RecordId]:
        image_id = self.ids[index]
        return StoredPicture(image_id, self.images.picture(image_id), self.images.where(image_id))


class PictureFiles:
    """Picture files by index, known by their paths as given."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        self.paths = [os.fspath(path) for path in paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> StoredPicture[str]:
        path = self.paths[index]
        return StoredPicture(path, _read_bytes(path), Where(path))


def _read_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"cannot be read ({error.strerror})", at=path) from error


class ClassFolders:
    """Pictures in one folder per class, known by the class index.

    Classes are the sub-folders in sorted order, pictures lie in them at any depth and come in sorted order; hidden
    files and folders, which editors and file managers leave behind, are not looked at. A folder that links name too
    counts once in its class. Other files that are no pictures are counted in the log.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        """Lists the files; raises DataError when there is no class folder, or one without a picture."""
        root = Path(folder)
        if not is_folder(root):
            raise DataError("no such folder; expected one sub-folder of pictures per class", at=root)
        self.classes = sorted(
            entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
        )
        if not self.classes:
            raise DataError("holds no sub-folder; expected one sub-folder of pictures per class", at=root)
        others: list[str] = []
        self.samples = [
            (path, label) for label, name in enumerate(self.classes) for path in _pictures(root / name, others)
        ]
        if others:
            logger.warning("%s", passed_over(root, others))

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> StoredPicture[int]:
        path, label = self.samples[index]
        return StoredPicture(label, _read_bytes(path), Where(path))


def _pictures(folder: Path, others: list[str]) -> list[str]:
    """The pictures below a folder; the names of what is none go into `others`."""
    found: list[str] = []
    for below, _, names in sorted(walked(folder, _refuse)):
        for path in (os.path.join(below, name) for name in names):
            (found if is_picture_file(path) else others).append(path)
    if not found:
        raise DataError(f"holds no picture; expected files ending in {', '.join(PICTURE_SUFFIXES)}", at=folder)
    return found


def _refuse(error: OSError) -> None:
    raise UnreadableError.of(error.filename, error) from error

"""Pictures by number, of an LMDB, of files or of class folders, and batches of them decoded by threads.

An item is (key, picture as `transform` makes it). They serve torch's loader as well as `batches`, which needs no torch.
"""

# B batch, R resolution

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL.Image import Image

from cn_clip.clip.pictures import decoded_batches
from cn_clip.data.lmdb_store import ImageStore
from cn_clip.data.pictures import load_picture
from cn_clip.data.records import RecordId
from cn_clip.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

KeyT = TypeVar("KeyT", covariant=True)
PixelsT = TypeVar("PixelsT")

CLASS_FOLDER_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class PictureSet(Protocol[KeyT]):
    """Pictures by number, as arrays."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[KeyT, NDArray[np.float32]]:
        """(key, pixels (3, R, R)); raises DataError naming a picture that cannot be read."""
        ...


def batches(
    pictures: PictureSet[KeyT], batch_size: int, num_threads: int = 1
) -> Iterator[tuple[list[KeyT], NDArray[np.float32]]]:
    """(keys, pixels (B, 3, R, R)) in order; while one batch is used, `num_threads` threads decode the next.

    num_threads 0: decodes in this thread. Raises ConfigError for a batch size below 1 or fewer than 0 threads,
    DataError for an empty set and naming a picture that cannot be read.
    """
    if batch_size < 1 or num_threads < 0:
        raise ConfigError(f"expected a batch size of 1 or more and 0 or more workers, got {batch_size}, {num_threads}")
    if not len(pictures):
        raise DataError("the dataset is empty; nothing to load")
    return (
        ([key for key, _ in items], np.stack([pixels for _, pixels in items]))
        for items in decoded_batches(pictures.__getitem__, len(pictures), batch_size, num_threads)
    )


class ImageDataset(Generic[PixelsT]):
    """The pictures of an `imgs` folder by index in key order: (image id, picture)."""

    def __init__(self, images_folder: str | os.PathLike[str], transform: Callable[[Image], PixelsT]) -> None:
        """Opens an `imgs` folder; raises DataError when it is none."""
        self.images = ImageStore(images_folder)
        self.ids = self.images.ids
        self.transform = transform
        logger.info("The specified LMDB directory contains %d images.", len(self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[RecordId, PixelsT]:
        image_id = self.ids[index]
        where = f"{self.images.folder}: image id {image_id!r}"
        return image_id, load_picture(self.images.picture(image_id), where, self.transform)


class FileImageDataset(Generic[PixelsT]):
    """Picture files by index: (path as given, picture)."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]], transform: Callable[[Image], PixelsT]) -> None:
        self.paths = [os.fspath(path) for path in paths]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, PixelsT]:
        path = self.paths[index]
        return path, load_picture(_read_bytes(path), path, self.transform)


def _read_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


class ClassFolderDataset(Generic[PixelsT]):
    """Pictures in one folder per class: (class index, picture).

    Classes are the sub-folders in sorted order, pictures lie in them at any depth and come in sorted order; hidden
    files and folders, which editors and file managers leave behind, are not looked at.
    """

    def __init__(self, folder: str | os.PathLike[str], transform: Callable[[Image], PixelsT]) -> None:
        """Lists the files; raises DataError when there is no class folder, or one without a picture."""
        root = Path(folder)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; expected one sub-folder of pictures per class")
        self.classes = sorted(
            entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")
        )
        if not self.classes:
            raise DataError(f"{root}: holds no sub-folder; expected one sub-folder of pictures per class")
        self.samples = [(path, label) for label, name in enumerate(self.classes) for path in _pictures(root / name)]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[int, PixelsT]:
        path, label = self.samples[index]
        return label, load_picture(_read_bytes(path), path, self.transform)


def _pictures(folder: Path) -> list[str]:
    found = []
    for place, _, names in sorted(os.walk(folder, followlinks=True)):
        found += [os.path.join(place, name) for name in sorted(names) if _is_picture_name(name)]
    if not found:
        raise DataError(f"{folder}: holds no picture; expected files ending in {', '.join(CLASS_FOLDER_SUFFIXES)}")
    return found


def _is_picture_name(name: str) -> bool:
    return name.lower().endswith(CLASS_FOLDER_SUFFIXES) and not name.startswith(".")

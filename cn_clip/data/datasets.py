"""Torch datasets over a built split, picture files and class folders, and the loader that batches them.

A batch is a tuple with one entry per field of an item: tensors stacked, everything else (ids, labels, paths) a list.
The batch of training pairs has names, PairBatch.
"""

# Shapes: B batch, R resolution, L context length.

import itertools
import logging
import os
import random
import signal
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from cn_clip.data.lmdb_store import IMAGES, PAIRS, ImageStore, PairStore
from cn_clip.data.pictures import open_picture
from cn_clip.data.records import RecordId, canonical_id
from cn_clip.errors import CnClipError, ConfigError, DataError
from cn_clip.jsonl import json_object, numbered_lines

logger = logging.getLogger(__name__)

Transform: TypeAlias = Callable[[Image.Image], Tensor]
Augment: TypeAlias = Callable[[Image.Image, random.Random], Image.Image]
Tokenize: TypeAlias = Callable[[list[str], int], Tensor]
ItemT = TypeVar("ItemT")

CLASS_FOLDER_SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


def preprocess_text(text: str) -> str:
    """Lower-cased, curly double quotes straightened: how Chinese-CLIP adapts text to its vocabulary."""
    return text.lower().replace("\N{LEFT DOUBLE QUOTATION MARK}", '"').replace("\N{RIGHT DOUBLE QUOTATION MARK}", '"')


def read_texts(path: str | os.PathLike[str]) -> list[tuple[RecordId, str]]:
    """(text id, text as written) of each line of a texts jsonl, in order; image_ids are not looked at.

    Numbers as text are turned into strings. Raises DataError with file and line; an empty file is an error.
    """
    texts = [_read_text(line, f"{path}:{number}") for number, line in numbered_lines(path)]
    if not texts:
        raise DataError(f'{path}: the file is empty; expected lines of {{"text_id": ..., "text": ...}}')
    return texts


def _read_text(line: bytes, where: str) -> tuple[RecordId, str]:
    try:
        record = json_object(line)
        for name in ("text_id", "text"):
            if name not in record:
                raise DataError(f"the field {name!r} is missing; expected text_id and text")
        text_id, text = canonical_id(record["text_id"]), record["text"]
        if isinstance(text, bool) or not isinstance(text, (str, int, float)):
            raise DataError(f"text of text_id {text_id!r}: expected a string, got {type(text).__name__}")
    except DataError as error:
        raise DataError(f"{where}: {error}") from error
    return text_id, str(text)


def load_picture(data: bytes, where: str, transform: Transform) -> Tensor:
    """The transformed picture, float32 (3, R, R); raises DataError that starts with `where`."""
    try:
        return transform(open_picture(data))
    except (DataError, OSError, ValueError) as error:  # a transform may meet what loading let pass
        raise DataError(f"{where}: {error}") from error


class Pair(NamedTuple):
    """A training sample: pixels (3, R, R) float32, tokens (L,) int64; num_skipped unreadable pairs came before it."""

    pixels: Tensor
    tokens: Tensor
    image_id: RecordId
    text_id: RecordId
    num_skipped: int = 0


class PairBatch(NamedTuple):
    """A batch of Pair: pixels (B, 3, R, R), tokens (B, L), and lists of B."""

    pixels: Tensor
    tokens: Tensor
    image_id: list[RecordId]
    text_id: list[RecordId]
    num_skipped: list[int]


class SourcePair(NamedTuple):
    """A pair as it is stored: the bytes of the picture file, the text as written; `where` begins an error about it."""

    picture: bytes
    text: str
    image_id: RecordId
    text_id: RecordId
    where: str


class PairSource(Protocol):
    """Where pairs come from, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> SourcePair:
        """Raises DataError for a pair that cannot be read."""

    def substitute(self, number: int) -> int:
        """The pair to take in place of an unreadable one; asked again and again, it comes back to `number`."""


class LmdbPairs:
    """The pairs of a built split, a PairSource."""

    def __init__(self, split_folder: str | os.PathLike[str], *, split: str | None = None) -> None:
        """Opens the folder with `imgs` and `pairs`; raises DataError when it is none or holds no pair.

        split: its name in the log; default: the folder's name.
        """
        self.images = ImageStore(Path(split_folder) / IMAGES)
        self.pairs = PairStore(Path(split_folder) / PAIRS)
        name = split or Path(split_folder).resolve().name
        num_images, num_pairs = self.images.num_images, len(self.pairs)
        logger.info("%s LMDB file contains %d images and %d pairs.", name, num_images, num_pairs)
        if not num_pairs:
            raise DataError(f"{self.pairs.folder}: holds no pair of picture and text; is this a test split?")

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> SourcePair:
        image_id, text_id, text = self.pairs[number]
        where = f"{self.images.folder}: image id {image_id!r}"
        return SourcePair(self.images.picture(image_id), text, image_id, text_id, where)

    def substitute(self, number: int) -> int:
        return (number + 1) % len(self)


class PairDataset(Dataset[Pair]):
    """The pairs of a source by number, as Pair; `epoch * len + number` is pair `number` in a later epoch.

    The epoch varies the augmentation and nothing else: it is a function of seed, epoch and number, whichever process
    reads the pair, and whatever was read before.
    """

    def __init__(
        self,
        source: PairSource,
        transform: Transform,
        tokenize: Tokenize,
        *,
        context_length: int = 52,
        on_error: Literal["stop", "skip"] = "stop",
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        """on_error="skip" puts the next readable pair in the place of one that cannot be read, with a warning in the
        log and counted in num_skipped. augment: varies a picture before `transform`."""
        self.source, self.transform, self.tokenize, self.context_length = source, transform, tokenize, context_length
        self.on_error, self.augment, self.seed = on_error, augment, seed

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Pair:
        epoch, number = divmod(index, len(self))
        chosen = number
        for num_skipped in itertools.count():
            try:
                return self._load(chosen, random.Random(f"{self.seed} {epoch} {number}"), num_skipped)
            except DataError as error:
                if self.on_error == "stop":
                    raise
                logger.warning("skipped: %s", error)
                chosen = self.source.substitute(chosen)
                if chosen == number:
                    raise DataError(f"{error}; nor can any other that could take its place be read") from error
        raise AssertionError("the loop ends by return or raise")

    def _load(self, number: int, rng: random.Random, num_skipped: int) -> Pair:
        stored, augment = self.source[number], self.augment
        transform = self.transform if augment is None else lambda image: self.transform(augment(image, rng))
        pixels = load_picture(stored.picture, stored.where, transform)
        tokens = self.tokenize([preprocess_text(stored.text)], self.context_length)[0]
        return Pair(pixels, tokens, stored.image_id, stored.text_id, num_skipped)


class ImageDataset(Dataset[tuple[RecordId, Tensor]]):
    """The pictures of an `imgs` folder by index in key order: (image id, picture (3, R, R) float32)."""

    def __init__(self, images_folder: str | os.PathLike[str], transform: Transform) -> None:
        """Opens an `imgs` folder; raises DataError when it is none."""
        self.images = ImageStore(images_folder)
        self.ids = self.images.ids
        self.transform = transform
        logger.info("The specified LMDB directory contains %d images.", len(self.ids))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[RecordId, Tensor]:
        image_id = self.ids[index]
        where = f"{self.images.folder}: image id {image_id!r}"
        return image_id, load_picture(self.images.picture(image_id), where, self.transform)


class FileImageDataset(Dataset[tuple[str, Tensor]]):
    """Picture files by index: (path as given, picture (3, R, R) float32)."""

    def __init__(self, paths: Sequence[str | os.PathLike[str]], transform: Transform) -> None:
        self.paths = [os.fspath(path) for path in paths]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[str, Tensor]:
        path = self.paths[index]
        return path, load_picture(_read_bytes(path), path, self.transform)


def _read_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


class ClassFolderDataset(Dataset[tuple[Tensor, int]]):
    """Pictures in one folder per class: (picture (3, R, R) float32, class index).

    Classes are the sub-folders in sorted order, pictures lie in them at any depth and come in sorted order; hidden
    files and folders, which editors and file managers leave behind, are not looked at.
    """

    def __init__(self, folder: str | os.PathLike[str], transform: Transform) -> None:
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

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return load_picture(_read_bytes(path), path, self.transform), label


def _pictures(folder: Path) -> list[str]:
    found = []
    for place, _, names in sorted(os.walk(folder, followlinks=True)):
        found += [os.path.join(place, name) for name in sorted(names) if _is_picture_name(name)]
    if not found:
        raise DataError(f"{folder}: holds no picture; expected files ending in {', '.join(CLASS_FOLDER_SUFFIXES)}")
    return found


def _is_picture_name(name: str) -> bool:
    return name.lower().endswith(CLASS_FOLDER_SUFFIXES) and not name.startswith(".")


@dataclass(frozen=True)
class _Failure:
    """An error of a worker, carried as a value: torch would wrap it in the text of a stack trace."""

    message: str


class _Guarded(Dataset[Any]):
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            return self.dataset[index]
        except CnClipError as error:
            return _Failure(str(error))


def collate(items: list[Any]) -> Any:
    """Items to one batch: tensors stacked, other fields as lists."""
    failure = next((item for item in items if isinstance(item, _Failure)), None)
    if failure is not None:
        return failure
    columns = zip(*items, strict=True)
    batch = (torch.stack(column) if isinstance(column[0], Tensor) else list(column) for column in columns)
    return PairBatch._make(batch) if isinstance(items[0], Pair) else tuple(batch)


def _begin_worker(_worker: int) -> None:
    torch.set_num_threads(1)  # many workers with many threads each fight for the same cores
    for number in (signal.SIGTERM, signal.SIGINT):
        # Ctrl-C and some schedulers signal every process of a run; the main one saves first, and ends the workers.
        signal.signal(number, signal.SIG_IGN)


class Loader(Generic[ItemT]):
    """Iterates over the batches of a dataset; raises DataError for an item that cannot be read, workers or not."""

    def __init__(self, batches: "DataLoader[Any]", dataset: "Dataset[ItemT]") -> None:
        self._batches = batches
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        for batch in self._batches:
            if isinstance(batch, _Failure):
                raise DataError(batch.message)
            yield batch


def make_loader(
    dataset: "Dataset[ItemT]",
    batch_size: int,
    num_workers: int = 0,
    *,
    sampler: "Sampler[int] | Sequence[int] | None" = None,
    drop_last: bool = False,
    pin_memory: bool = False,
    generator: torch.Generator | None = None,
    multiprocessing_context: str | None = None,
) -> Loader[ItemT]:
    """Batches of a dataset in its order, or in the order of `sampler`, decoded by `num_workers` processes.

    generator: draws the seeds of the workers, in place of torch's random state. Raises ConfigError for a batch size
    below 1 or fewer than 0 workers.
    """
    if batch_size < 1 or num_workers < 0:
        raise ConfigError(f"expected a batch size of 1 or more and 0 or more workers, got {batch_size}, {num_workers}")
    if not len(cast(Sized, dataset)):
        raise DataError("the dataset is empty; nothing to load")
    batches: DataLoader[Any] = DataLoader(
        _Guarded(dataset),
        batch_size=batch_size,
        sampler=sampler,
        num_workers=num_workers,
        collate_fn=collate,
        worker_init_fn=_begin_worker,
        drop_last=drop_last,
        pin_memory=pin_memory,
        generator=generator,
        multiprocessing_context=multiprocessing_context if num_workers else None,
        persistent_workers=False,
    )
    return Loader(batches, dataset)

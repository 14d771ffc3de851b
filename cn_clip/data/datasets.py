"""Torch datasets over the pairs of a built split, and the loader that batches them.

A batch is a tuple with one entry per field of an item: tensors stacked, everything else (ids, labels, paths) a list.
The batch of training pairs has names, PairBatch.
"""

# Shapes: B batch, R resolution, L context length.

import functools
import itertools
import logging
import math
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, NamedTuple, Protocol, TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from cn_clip import ranks
from cn_clip.clip import tokenizer
from cn_clip.clip.tokenizer import TextTransform
from cn_clip.clip.transforms import ImageTransform
from cn_clip.data.lmdb_store import IMAGES, PAIRS, ImageStore, PairStore
from cn_clip.data.pictures import load_picture
from cn_clip.data.records import RecordId, SourcePair
from cn_clip.errors import CnClipError, ConfigError, DataError
from cn_clip.language import both, translated

logger = logging.getLogger(__name__)

Transform: TypeAlias = Callable[[Image.Image], Tensor]
Augment: TypeAlias = Callable[[Image.Image, random.Random], Image.Image]
ItemT = TypeVar("ItemT")
ItemT_co = TypeVar("ItemT_co", covariant=True)


class Pair(NamedTuple):
    """A training sample: pixels (3, R, R) as the transform makes them, tokens (L,) int64.

    num_skipped: unreadable pairs that came before it.
    """

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


class PairSource(Protocol):
    """Where pairs come from, by number."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> SourcePair:
        """Raises DataError for a pair that cannot be read."""

    def substitute(self, number: int) -> int:
        """The pair to take instead of an unreadable one; asked again and again, it comes back to `number`."""


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
            raise DataError("holds no pair of picture and text; is this a test split?", at=self.pairs.folder)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, number: int) -> SourcePair:
        image_id, text_id, text = self.pairs[number]
        return SourcePair(self.images.picture(image_id), text, image_id, text_id, self.images.where(image_id))

    def substitute(self, number: int) -> int:
        """The pair to take instead of one whose picture cannot be read: the next."""
        return (number + 1) % len(self)


@dataclass(frozen=True)
class PixelBytes:
    """Callable: PIL picture of any mode to a uint8 tensor (3, R, R), which a model normalises. Can be pickled."""

    transform: ImageTransform

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(self.transform.bytes(image))


class PairDataset(Dataset[Pair]):
    """The pairs of a source by number, as Pair; `epoch * len + number` is pair `number` in a later epoch.

    The epoch varies the augmentation and nothing else: it is a function of seed, epoch and number, whichever process
    reads the pair, and whatever was read before.
    """

    def __init__(
        self,
        source: PairSource,
        transform: Transform,
        texts: TextTransform,
        *,
        on_error: Literal["stop", "skip"] = "stop",
        augment: Augment | None = None,
        seed: int = 0,
        draft_size: int | None = None,
    ) -> None:
        """texts: zeros pad its rows to its context_length. augment: varies a picture before `transform`.

        draft_size: the side that must remain when a JPEG is decoded at a fraction of its size; None: decoded whole.

        on_error="skip" takes the next readable pair instead of one that cannot be read, with a warning in the log
        and counted in num_skipped.
        """
        self.source, self.transform, self.texts = source, transform, texts
        self.on_error, self.augment, self.seed, self.draft_size = on_error, augment, seed, draft_size

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
                logger.warning("%s%s", both("跳过：", "skipped: "), translated(str(error)))
                chosen = self.source.substitute(chosen)
                if chosen == number:
                    raise DataError(f"{error}; nor can any other that could take its place be read") from error
        raise AssertionError("the loop ends by return or raise")

    def _load(self, number: int, rng: random.Random, num_skipped: int) -> Pair:
        stored, augment = self.source[number], self.augment
        transform = self.transform if augment is None else lambda image: self.transform(augment(image, rng))
        pixels = load_picture(stored.picture, stored.where, transform, draft_size=self.draft_size)
        tokens = torch.from_numpy(tokenizer.pad(self.texts.rows([stored.text]), self.texts.context_length))[0]
        return Pair(pixels, tokens, stored.image_id, stored.text_id, num_skipped)


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
    """Items to one batch: tensors stacked, other fields as lists.

    A worker stacks tensors in shared memory, where the main process finds them; arrays, which go through a pipe, when
    there may be no room: PyTorch loses a batch that finds none, and the training waits for it for ever.
    """
    failure = next((item for item in items if isinstance(item, _Failure)), None)
    if failure is not None:
        return failure
    columns = list(zip(*items, strict=True))
    stack: Callable[[tuple[Tensor, ...]], Any] = torch.stack
    worker = get_worker_info()
    if worker is not None:
        size = sum(part.nbytes for column in columns for part in column if isinstance(part, Tensor))
        num_writers = worker.num_workers * ranks.local_world_size()
        # All workers may write at once, and twice: the batch before may still be on its way.
        stack = _stack_shared if free_shared_memory() > 2 * size * num_writers else _stack_array
    batch: list[Any] = [stack(column) if isinstance(column[0], Tensor) else list(column) for column in columns]
    return PairBatch._make(batch) if isinstance(items[0], Pair) else tuple(batch)


def _stack_array(tensors: tuple[Tensor, ...]) -> Any:
    return torch.stack(tensors).numpy()


def _stack_shared(tensors: tuple[Tensor, ...]) -> Tensor:
    """The same as torch.stack, written once: a stack elsewhere would be copied into shared memory."""
    first = tensors[0]
    storage = torch.UntypedStorage._new_shared(first.nbytes * len(tensors))  # type: ignore[no-untyped-call]
    room = first.new_empty(0).set_(storage).view(len(tensors), *first.shape)
    return torch.stack(tensors, out=room)


def free_shared_memory() -> float:
    """Bytes free in /dev/shm, where PyTorch puts the tensors of workers; infinite on systems without such a limit."""
    if sys.platform != "linux":
        return math.inf
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return status.f_bavail * status.f_frsize


def _begin_worker(_worker: int) -> None:
    torch.set_num_threads(1)  # many workers with many threads each fight for the same cores
    for number in (signal.SIGTERM, signal.SIGINT):
        # Ctrl-C and some schedulers signal every process of a run; the main one saves first, and ends the workers.
        signal.signal(number, signal.SIG_IGN)


class Items(Protocol[ItemT_co]):
    """Anything that has items by number, torch datasets among them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> ItemT_co: ...


class Loader(Generic[ItemT]):
    """Iterates over the batches of a dataset; raises DataError for an item that cannot be read, workers or not.

    Its workers live as long as it does: each iteration asks them for the items that the sampler then names.
    """

    def __init__(self, batches: "DataLoader[Any]", dataset: Items[ItemT]) -> None:
        self._batches = batches
        self._interrupted: Any = None
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        iterator = iter(self._batches)
        for worker in getattr(iterator, "_workers", ()):
            # They ignore SIGTERM, see `_begin_worker`: one that is stuck must end too, and so must those of a loader
            # that an error has left in use when the interpreter ends, which sends it and then waits for them.
            worker._popen.terminate = worker._popen.kill
        try:
            for batch in iterator:
                if isinstance(batch, _Failure):
                    raise DataError(batch.message)
                yield _with_tensors(batch)
        except (Exception, GeneratorExit):
            raise
        except BaseException:  # of a signal: ending the workers takes seconds, and the training is to be saved first
            self._interrupted = iterator
            raise


def _with_tensors(batch: Any) -> Any:
    if not any(isinstance(part, np.ndarray) for part in batch):
        return batch
    _say_small_shared_memory()
    parts = [torch.from_numpy(part) if isinstance(part, np.ndarray) else part for part in batch]
    return PairBatch._make(parts) if isinstance(batch, PairBatch) else tuple(parts)


@functools.cache
def _say_small_shared_memory() -> None:
    free = f"{free_shared_memory() / 1e6:.0f} MB"
    in_chinese = (
        f"/dev/shm 只剩 {free}，放不下各加载进程的批，改走较慢的管道。"
        "请用 docker run --shm-size=8g 或 --ipc=host 启动容器，或减小 --num-workers。"
    )
    in_english = (
        f"/dev/shm has only {free} free, too little for the batches of all workers: they go through pipes, which is "
        "slower. Start the container with docker run --shm-size=8g or --ipc=host, or use fewer --num-workers."
    )
    logger.warning("%s", both(in_chinese, in_english))


def make_loader(
    dataset: Items[ItemT],
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

    generator: draws the seeds of the workers, instead of torch's random state. Raises ConfigError for a batch size
    below 1 or fewer than 0 workers.
    """
    if batch_size < 1 or num_workers < 0:
        raise ConfigError(f"expected a batch size of 1 or more and 0 or more workers, got {batch_size}, {num_workers}")
    if not len(dataset):
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
        persistent_workers=num_workers > 0,
    )
    return Loader(batches, dataset)

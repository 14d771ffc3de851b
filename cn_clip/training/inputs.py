"""What a run reads: which pairs each step sees, and from the settings to batches of pixels and token ids.

The order of the pairs depends only on seed and epoch, and can start anywhere.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from cn_clip import processes, ranks
from cn_clip.clip.tokenizer import ChineseTexts
from cn_clip.clip.transforms import ImageTransform
from cn_clip.data.augment import Augmentation
from cn_clip.data.datasets import LmdbPairs, Loader, PairDataset, PairSource, PixelBytes, make_loader
from cn_clip.data.lmdb_store import IMAGES, PAIRS, PairStore, Split, read_split
from cn_clip.data.pictures import LmdbPictures, PictureDataset
from cn_clip.data.shards import ShardPairs
from cn_clip.data.tars import is_shards
from cn_clip.errors import ConfigError, DataError
from cn_clip.training.distributed import own_share
from cn_clip.training.logger import logger
from cn_clip.training.params import Options

WINDOW = 4096
# Parts that a process reads shards in when --num-workers does not say it: the order shall not depend on the machine.
STREAMS = 4
# Processes that load at most: batches of 8 x 256 pictures fit into the shared memory that the warning advises; where
# the model is computed on the same cores, more would only take them from it.
TRAINING_WORKERS = {"most": 8, "most_on_cpu": 4}
VALIDATION_WORKERS = {"most": 4, "most_on_cpu": 1}


class EpochSampler(Sampler[int]):
    """Sample numbers of one epoch, whole batches of them.

    The order is the one of torch's DistributedSampler with the same seed, so that runs can be compared with
    Chinese-CLIP. The last batch is filled up with samples of the beginning. `start` batches are passed over.
    num_streams: in how many parts a process reads; with another number the order is another.
    """

    def __init__(self, num_samples: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.num_batches = math.ceil(num_samples / (batch_size * world_size))
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.num_streams = 1
        self.epoch, self.start = 0, 0

    @property
    def num_padded(self) -> int:
        """Samples of an epoch over all processes, repeated ones included."""
        return self.num_batches * self.batch_size * self.world_size

    def __len__(self) -> int:
        return (self.num_batches - self.start) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        order = self._order()
        for first in range(self.start * self.batch_size, len(order), self.batch_size):
            yield from order[first : first + self.batch_size].tolist()

    def _order(self) -> Tensor:
        """The samples of this process in this epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_padded, generator=generator)
        return order[self.rank :: self.world_size] % self.num_samples

    def batches(self) -> list[list[int]]:
        """The sample numbers of each batch."""
        numbers = list(self)
        return [numbers[start : start + self.batch_size] for start in range(0, len(numbers), self.batch_size)]


class ShardSampler(EpochSampler):
    """Sample numbers of one epoch such that each loading process reads its own stretch of the shards.

    Samples are numbered shard by shard. In each epoch the shards are put into a random order, one long row of samples,
    which is cut into equal stretches: one for each of `num_workers` loading processes of each rank. A stretch is read
    from front to back, shuffled within a window of WINDOW samples. Batch b of a rank is of stretch b % num_workers,
    as DataLoader gives them to its processes. A shard at a cut is shared by two neighbours.

    Every rank has the same number of batches, the same in each epoch, and no sample comes twice. The num_samples -
    num_padded samples that fill no batch are left out, others each epoch.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int],
        batch_size: int,
        *,
        seed: int,
        num_workers: int = 0,
        rank: int = 0,
        world_size: int = 1,
        window: int = WINDOW,
    ) -> None:
        """shard_sizes: samples in each shard. Raises ConfigError when there are fewer shards than loading processes."""
        super().__init__(sum(shard_sizes), batch_size, seed=seed, rank=rank, world_size=world_size)
        self.num_batches = self.num_samples // (batch_size * world_size)
        self.num_streams, self.window = max(1, num_workers), window
        self.shard_sizes = np.array(shard_sizes, dtype=np.int64)
        self._entropy = seed % 2**64  # NumPy takes no negative seeds
        num_readers = self.num_streams * world_size
        if len(shard_sizes) < num_readers:
            raise ConfigError(
                f"--train-data: {len(shard_sizes)} shards for {num_readers} loading processes ({world_size} x "
                f"{self.num_streams} by --num-workers), some would have nothing to read; lower --num-workers, or write "
                f"{num_readers} shards or more (cn-clip dataset shards --num-shards {num_readers})"
            )

    def _order(self) -> Tensor:
        # The row of all samples used in this epoch, the same on every rank.
        draw = np.random.default_rng((self._entropy, self.epoch))
        shards = draw.permutation(len(self.shard_sizes))
        sizes = self.shard_sizes[shards]
        firsts = (np.cumsum(self.shard_sizes) - self.shard_sizes)[shards]
        row = np.repeat(firsts - (np.cumsum(sizes) - sizes), sizes) + np.arange(self.num_samples)
        left_out = draw.choice(self.num_samples, self.num_samples - self.num_padded, replace=False, shuffle=False)
        row = np.delete(row, left_out)
        first = self.rank * self.num_batches * self.batch_size
        order = np.empty((self.num_batches, self.batch_size), dtype=np.int64)
        for stream in range(self.num_streams):
            own = order[stream :: self.num_streams]
            draw = np.random.default_rng((self._entropy, self.epoch, self.rank, stream))
            # No sample moves by more than the window.
            moved = np.argsort(np.arange(own.size) + self.window * draw.random(own.size), kind="stable")
            own[:] = row[first : first + own.size][moved].reshape(own.shape)
            first += own.size
        return torch.from_numpy(order.reshape(-1))


class EpochNumbers(Sampler[int]):
    """The samples of another sampler as `epoch * num_samples + number`, so that a dataset learns the epoch too.

    Nothing is to be told to the processes that load: the number says it all.
    """

    def __init__(self, sampler: EpochSampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        first = self.sampler.epoch * self.sampler.num_samples
        return (first + number for number in self.sampler)


# --- from the settings to batches -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TrainingData:
    """Batches of `Pair` in the order of the sampler, pixels as bytes."""

    loader: Loader[Any]
    sampler: EpochSampler

    def start_epoch(self, epoch: int, batch: int) -> None:
        """The next pass over the loader is this epoch's, from this batch on."""
        self.sampler.epoch, self.sampler.start = epoch, batch


@dataclass(frozen=True)
class ValidationData:
    """The validation split, token ids of its texts, this process's share of its pictures, and the batches to score."""

    split: Split
    tokens: list[list[int]]
    pixels: Loader[Any]
    sampler: EpochSampler


def training_data(options: Options, resolution: int, device: torch.device) -> TrainingData:
    """This process's part of the training split; raises ConfigError when it holds less than one batch."""
    source: PairSource
    if is_shards(options.train_data):
        source = shards = ShardPairs(options.train_data, split="train", on_error=options.on_error)
        _require_a_batch(len(shards), options.batch_size, "--batch-size")
        sampler: EpochSampler = ShardSampler(
            shards.shard_sizes,
            options.batch_size,
            seed=options.seed,
            num_workers=STREAMS if options.num_workers is None else options.num_workers,
            rank=ranks.rank(),
            world_size=ranks.world_size(),
        )
        left_out = len(shards) - sampler.num_padded
        logger.info("%d pairs, others each epoch, are left out: they fill no batch for every process.", left_out)
    else:
        source = LmdbPairs(options.train_data, split="train")
        sampler = _epoch_sampler(options, len(source), options.batch_size, "--batch-size")
    _require_two(source, options)
    transform = ImageTransform(resolution, options.decode)
    augment = Augmentation(resolution, options.decode) if options.use_augment else None
    dataset = PairDataset(
        source,
        PixelBytes(transform),
        ChineseTexts(options.context_length),
        on_error=options.on_error,
        augment=augment,
        seed=options.seed,
        draft_size=(augment or transform).draft_size,
    )
    loader = make_loader(
        dataset,
        options.batch_size,
        num_loading(options.num_workers, device, "--num-workers", **TRAINING_WORKERS),
        sampler=EpochNumbers(sampler),
        pin_memory=device.type == "cuda",
        generator=_loader_generator(options),
    )
    return TrainingData(loader, sampler)


def validation_data(options: Options, resolution: int, device: torch.device) -> ValidationData | None:
    """The validation split, or None when there is none; raises ConfigError when it holds less than one batch."""
    if options.val_data is None:
        return None
    images = LmdbPictures(f"{options.val_data}/{IMAGES}")
    pairs = PairStore(f"{options.val_data}/{PAIRS}")
    sampler = _epoch_sampler(options, len(pairs), options.valid_batch_size, "--valid-batch-size")
    transform = ImageTransform(resolution, options.decode)
    loader = make_loader(
        PictureDataset(images, PixelBytes(transform), draft_size=transform.draft_size),
        options.valid_batch_size,
        num_loading(options.valid_num_workers, device, "--valid-num-workers", **VALIDATION_WORKERS),
        sampler=own_share(len(images)),
        pin_memory=device.type == "cuda",
        generator=_loader_generator(options),
    )
    split = read_split(pairs, images.ids)
    return ValidationData(split, ChineseTexts(options.context_length).rows(split.texts), loader, sampler)


def num_loading(asked: int | None, device: torch.device, flag: str, *, most: int, most_on_cpu: int) -> int:
    """How many processes load: as many as asked, else one for each core that this process has, within the bounds.

    The cores are shared with the other processes of this machine. most_on_cpu: for a model computed on them too.
    """
    if asked is not None:
        return asked
    cores = processes.usable_cores()
    number = max(1, min(cores // ranks.local_world_size(), most_on_cpu if device.type == "cpu" else most))
    of = f"{cores} cores, {ranks.local_world_size()} training on this machine"
    logger.info("%s: %d (%s)", flag, number, of)
    return number


def _loader_generator(options: Options) -> torch.Generator:
    """Draws the workers' seeds, so that neither loading nor validating moves the random state dropout depends on."""
    return torch.Generator().manual_seed(options.seed)


def _epoch_sampler(options: Options, num_samples: int, batch_size: int, flag: str) -> EpochSampler:
    _require_a_batch(num_samples, batch_size, flag)
    return EpochSampler(num_samples, batch_size, seed=options.seed, rank=ranks.rank(), world_size=ranks.world_size())


def _require_a_batch(num_samples: int, batch_size: int, flag: str) -> None:
    if num_samples < batch_size * ranks.world_size():
        processes = f" in each of {ranks.world_size()} processes" if ranks.world_size() > 1 else ""
        raise ConfigError(
            f"{flag} {batch_size}{processes}: larger than the {num_samples} pairs of the data; choose a smaller one"
        )


def _require_two(source: PairSource, options: Options) -> None:
    """Raises DataError when all pairs have one picture, or one text as the model reads it: there is nothing to learn.

    Reads pairs from far apart until two pictures and two texts are found, which is at once but for such data. A
    teacher's features can be learned from any pictures: then it only warns.
    """
    pictures, texts = set(), set()
    transform = ChineseTexts(options.context_length)
    step = next(step for step in range(len(source) // 2 + 1, len(source) + 2) if math.gcd(step, len(source)) == 1)
    for count in range(len(source)):
        try:
            pair = source[count * step % len(source)]
        except DataError:  # it is told, or passed over, when its turn comes
            continue
        pictures.add(pair.image_id)
        texts.add(tuple(transform.rows([pair.text])[0]))
        if len(pictures) > 1 and len(texts) > 1:
            return
    if not texts:
        return
    same = "text" if len(texts) == 1 else "picture"
    message = f"{options.train_data}: all {len(source)} pairs have the same {same}: there is nothing to tell apart"
    if not options.distillation:
        raise DataError(f"{message}; expected pairs of different pictures and texts")
    logger.warning("%s, only --distillation teaches", message)

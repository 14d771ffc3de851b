"""Which pairs each step sees: an order that depends on seed and epoch alone, and can start anywhere."""

from collections.abc import Iterator, Sequence
from math import ceil

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from cn_clip.errors import ConfigError

WINDOW = 4096


class EpochSampler(Sampler[int]):
    """Sample numbers of one epoch, whole batches of them.

    The order is the one of torch's DistributedSampler with the same seed, so that runs can be compared with
    Chinese-CLIP. The last batch is filled up with samples of the beginning. `start` batches are passed over.
    num_streams: in how many parts a process reads; with another number the order is another.
    """

    def __init__(self, num_samples: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.num_batches = ceil(num_samples / (batch_size * world_size))
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
        row, first = self._row(), self.rank * self.num_batches * self.batch_size
        order = np.empty((self.num_batches, self.batch_size), dtype=np.int64)
        for stream in range(self.num_streams):
            own = order[stream :: self.num_streams]
            own[:] = self._shuffled(row[first : first + own.size], stream).reshape(own.shape)
            first += own.size
        return torch.from_numpy(order.reshape(-1))

    def _row(self) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """The samples used in this epoch over all ranks, shards in random order; the same on every rank."""
        draw = np.random.default_rng((self._entropy, self.epoch))
        shards = draw.permutation(len(self.shard_sizes))
        sizes = self.shard_sizes[shards]
        firsts = (np.cumsum(self.shard_sizes) - self.shard_sizes)[shards]
        row = np.repeat(firsts - (np.cumsum(sizes) - sizes), sizes) + np.arange(self.num_samples)
        left_out = draw.choice(self.num_samples, self.num_samples - self.num_padded, replace=False, shuffle=False)
        return np.delete(row, left_out)

    def _shuffled(
        self, stretch: "np.ndarray[tuple[int], np.dtype[np.int64]]", stream: int
    ) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """No sample moves by more than the window."""
        draw = np.random.default_rng((self._entropy, self.epoch, self.rank, stream))
        return stretch[np.argsort(np.arange(len(stretch)) + self.window * draw.random(len(stretch)), kind="stable")]


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

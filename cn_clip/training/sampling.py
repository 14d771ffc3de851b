"""Which pairs each step sees: an order that depends on seed and epoch alone, and can start anywhere."""

from collections.abc import Iterator
from math import ceil

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[int]):
    """Sample numbers of one epoch, whole batches of them.

    The order is the one of torch's DistributedSampler with the same seed, so that runs can be compared with
    Chinese-CLIP. The last batch is filled up with samples of the beginning. `start` batches are passed over.
    """

    def __init__(self, num_samples: int, batch_size: int, *, seed: int, rank: int = 0, world_size: int = 1) -> None:
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.num_batches = ceil(num_samples / (batch_size * world_size))
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch, self.start = 0, 0

    @property
    def num_padded(self) -> int:
        """Samples of an epoch over all processes, repeated ones included."""
        return self.num_batches * self.batch_size * self.world_size

    def __len__(self) -> int:
        return (self.num_batches - self.start) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_padded, generator=generator)
        own = order[self.rank :: self.world_size] % self.num_samples
        yield from own[self.start * self.batch_size :].tolist()

    def batches(self) -> list[list[int]]:
        """The sample numbers of each batch."""
        numbers = list(self)
        return [numbers[start : start + self.batch_size] for start in range(0, len(numbers), self.batch_size)]


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

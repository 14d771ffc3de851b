"""Which pairs each step sees: an order that depends on seed and epoch alone, and can start anywhere."""

from collections.abc import Iterator
from math import ceil

import torch
from torch.utils.data import Sampler


class EpochSampler(Sampler[list[int]]):
    """Batches of sample numbers for one epoch.

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
        return self.num_batches - self.start

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(self.num_padded, generator=generator)
        own = (order[self.rank :: self.world_size] % self.num_samples).tolist()
        for batch in range(self.start, self.num_batches):
            yield own[batch * self.batch_size : (batch + 1) * self.batch_size]

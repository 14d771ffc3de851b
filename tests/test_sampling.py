"""The order of samples over epochs, ranks and loading processes: nothing twice, nobody waits, every start fits."""

from collections import Counter
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cn_clip.errors import ConfigError
from cn_clip.training.inputs import EpochNumbers, EpochSampler, ShardSampler


@dataclass(frozen=True)
class Setting:
    shard_sizes: list[int]
    batch_size: int
    num_workers: int
    world_size: int
    epoch: int
    window: int

    def sampler(self, rank: int, *, start: int = 0, epoch: int | None = None) -> ShardSampler:
        sampler = ShardSampler(
            self.shard_sizes,
            self.batch_size,
            seed=7,
            num_workers=self.num_workers,
            rank=rank,
            world_size=self.world_size,
            window=self.window,
        )
        sampler.epoch, sampler.start = self.epoch if epoch is None else epoch, start
        return sampler

    def shard(self, number: int) -> int:
        for shard, size in enumerate(self.shard_sizes):
            number -= size
            if number < 0:
                return shard
        raise AssertionError("beyond the last shard")


@st.composite
def sampler_settings(draw: st.DrawFn) -> Setting:
    world_size, num_workers = draw(st.integers(1, 4)), draw(st.integers(0, 4))
    readers = world_size * max(1, num_workers)
    sizes = draw(st.lists(st.integers(0, 40), min_size=readers, max_size=readers + 10))
    batch_size, epoch, window = draw(st.integers(1, 9)), draw(st.integers(0, 5)), draw(st.integers(1, 50))
    return Setting(sizes, batch_size, num_workers, world_size, epoch, window)


@settings(deadline=None)
@given(sampler_settings())
def test_no_sample_comes_twice_and_every_rank_has_the_same_whole_batches(setting: Setting) -> None:
    orders = [list(setting.sampler(rank)) for rank in range(setting.world_size)]
    first = setting.sampler(0)
    assert {len(order) for order in orders} == {first.num_batches * setting.batch_size} == {len(first)}
    seen = Counter(number for order in orders for number in order)
    assert all(count == 1 for count in seen.values())
    assert set(seen) <= set(range(sum(setting.shard_sizes)))
    left_out = sum(setting.shard_sizes) - len(seen)
    assert left_out == first.num_samples - first.num_padded
    assert 0 <= left_out < setting.batch_size * setting.world_size


@settings(deadline=None)
@given(sampler_settings(), st.data())
def test_a_run_resumed_at_any_batch_sees_the_tail_of_the_order(setting: Setting, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, setting.world_size - 1))
    start = data.draw(st.integers(0, setting.sampler(rank).num_batches))
    resumed = setting.sampler(rank, start=start)
    tail = list(setting.sampler(rank))[start * setting.batch_size :]
    assert list(resumed) == tail
    assert len(resumed) == len(tail)


@settings(deadline=None)
@given(sampler_settings())
def test_a_loading_process_reads_one_stretch_of_the_shards(setting: Setting) -> None:
    """Over all processes at most one shard more each than if none were shared."""
    pairs = set()
    workers = max(1, setting.num_workers)
    for rank in range(setting.world_size):
        batches = setting.sampler(rank).batches()
        for batch, numbers in enumerate(batches):
            pairs |= {(rank, batch % workers, setting.shard(number)) for number in numbers}
    assert len(pairs) <= sum(size > 0 for size in setting.shard_sizes) + workers * setting.world_size - 1


def test_a_loading_process_reads_its_shards_one_after_the_other_within_the_window() -> None:
    sampler = ShardSampler([1000] * 8, 10, seed=3, num_workers=2, window=50)
    batches = sampler.batches()
    for worker in (0, 1):
        numbers = [number for batch in batches[worker::2] for number in batch]
        shards = list(dict.fromkeys(number // 1000 for number in numbers))
        assert len(shards) == 4
        place = {shard: step for step, shard in enumerate(shards)}
        moved = [abs(place[n // 1000] * 1000 + n % 1000 - step) for step, n in enumerate(numbers)]
        assert 10 < max(moved) <= 50


def test_each_epoch_has_another_order_and_leaves_others_out() -> None:
    setting = Setting([10, 11], 4, 1, 1, 0, 100)
    orders = [list(setting.sampler(0, epoch=epoch)) for epoch in range(30)]
    assert len({tuple(order) for order in orders}) == 30
    left_out = [set(range(21)) - set(order) for order in orders]
    assert {len(numbers) for numbers in left_out} == {1}
    assert len(set.union(*left_out)) > 10
    assert orders[3] == list(setting.sampler(0, epoch=3))


def test_shards_are_read_in_another_order_each_epoch() -> None:
    sampler = ShardSampler([10] * 6, 5, seed=1, window=1)
    seen = set()
    for epoch in range(5):
        sampler.epoch = epoch
        seen.add(tuple(dict.fromkeys(number // 10 for number in sampler)))
    assert all(sorted(order) == [0, 1, 2, 3, 4, 5] for order in seen)
    assert len(seen) > 3


def test_the_order_depends_on_the_seed_also_a_negative_one() -> None:
    orders = {seed: tuple(ShardSampler([20, 20], 4, seed=seed)) for seed in (0, 1, -1)}
    assert len(set(orders.values())) == 3


@pytest.mark.parametrize(
    ("num_shards", "num_workers", "world_size", "message"),
    [
        (3, 4, 1, "3 shards for 4 loading processes (1 x 4 by --num-workers)"),
        (7, 2, 4, "7 shards for 8 loading processes (4 x 2 by --num-workers)"),
        (1, 0, 2, "1 shards for 2 loading processes (2 x 1 by --num-workers)"),
    ],
)
def test_fewer_shards_than_loading_processes_are_refused(
    num_shards: int, num_workers: int, world_size: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        ShardSampler([10] * num_shards, 2, seed=0, num_workers=num_workers, world_size=world_size)
    assert message in str(caught.value)
    assert "cn-clip dataset shards --num-shards" in str(caught.value)


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 7), st.integers(1, 4), st.integers(0, 3))
def test_ranks_of_an_lmdb_share_each_epoch_with_repeats_only_to_fill_up(
    num_samples: int, batch_size: int, world_size: int, epoch: int
) -> None:
    samplers = [EpochSampler(num_samples, batch_size, seed=1, rank=r, world_size=world_size) for r in range(world_size)]
    for sampler in samplers:
        sampler.epoch = epoch
    seen = Counter(number for sampler in samplers for number in sampler)
    assert sum(seen.values()) == samplers[0].num_padded
    assert set(seen) == set(range(num_samples))
    assert max(seen.values()) - min(seen.values()) <= 1


def test_the_numbers_given_to_a_dataset_hold_the_epoch() -> None:
    sampler = EpochSampler(5, 2, seed=1)
    sampler.epoch, sampler.start = 3, 1
    numbers = list(EpochNumbers(sampler))
    assert [divmod(number, 5) for number in numbers] == [(3, number) for number in sampler]
    assert len(EpochNumbers(sampler)) == len(numbers) == 4


def test_sampling_leaves_the_global_random_state_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    list(ShardSampler([9, 9], 2, seed=1)), list(EpochSampler(9, 2, seed=1))
    assert torch.equal(torch.get_rng_state(), before)

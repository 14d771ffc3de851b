"""From the settings to batches of pixels and token ids."""

import math

import torch

from cn_clip import ranks
from cn_clip.clip.inputs import ChineseTexts
from cn_clip.clip.transforms import ImageTransform
from cn_clip.data.augment import Augmentation
from cn_clip.data.datasets import LmdbPairs, PairDataset, PairSource, make_loader
from cn_clip.data.lmdb_store import IMAGES, PAIRS, PairStore, read_split
from cn_clip.data.pictures import LmdbPictures, PictureDataset
from cn_clip.data.shards import ShardPairs
from cn_clip.data.tars import is_shards
from cn_clip.errors import ConfigError, DataError
from cn_clip.training.distributed import own_share
from cn_clip.training.logs import logger
from cn_clip.training.params import Options
from cn_clip.training.sampling import EpochNumbers, EpochSampler, ShardSampler
from cn_clip.training.trainer import TrainingData, ValidationData


def training_data(options: Options, resolution: int, device: torch.device) -> TrainingData:
    """This process's part of the training split; raises ConfigError when it holds less than one batch."""
    source, sampler = _shards(options) if is_shards(options.train_data) else _lmdb(options)
    _require_two(source, options)
    dataset = PairDataset(
        source,
        ImageTransform(resolution, options.decode),
        ChineseTexts(options.context_length),
        on_error=options.on_error,
        augment=Augmentation(resolution, options.decode) if options.use_augment else None,
        seed=options.seed,
    )
    loader = make_loader(
        dataset,
        options.batch_size,
        options.num_workers,
        sampler=EpochNumbers(sampler),
        pin_memory=device.type == "cuda",
        generator=_loader_generator(options),
    )
    return TrainingData(loader, sampler)


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


def _lmdb(options: Options) -> tuple[PairSource, EpochSampler]:
    pairs = LmdbPairs(options.train_data, split="train")
    return pairs, _sampler(options, len(pairs), options.batch_size, "--batch-size", world_size=ranks.world_size())


def _shards(options: Options) -> tuple[PairSource, EpochSampler]:
    pairs = ShardPairs(options.train_data, split="train", on_error=options.on_error)
    _require_a_batch(len(pairs), options.batch_size, "--batch-size", ranks.world_size())
    sampler = ShardSampler(
        pairs.shard_sizes,
        options.batch_size,
        seed=options.seed,
        num_workers=options.num_workers,
        rank=ranks.rank(),
        world_size=ranks.world_size(),
    )
    left_out = len(pairs) - sampler.num_padded
    logger.info("%d pairs, others each epoch, are left out: they fill no batch for every process.", left_out)
    return pairs, sampler


def validation_data(options: Options, resolution: int) -> ValidationData | None:
    """The validation split, or None when there is none; raises ConfigError when it holds less than one batch."""
    if options.val_data is None:
        return None
    images = LmdbPictures(f"{options.val_data}/{IMAGES}")
    pairs = PairStore(f"{options.val_data}/{PAIRS}")
    sampler = _sampler(
        options, len(pairs), options.valid_batch_size, "--valid-batch-size", world_size=ranks.world_size()
    )
    loader = make_loader(
        PictureDataset(images, ImageTransform(resolution, options.decode)),
        options.valid_batch_size,
        options.valid_num_workers,
        sampler=own_share(len(images)),
        generator=_loader_generator(options),
    )
    split = read_split(pairs, images.ids)
    return ValidationData(split, ChineseTexts(options.context_length).rows(split.texts), loader, sampler)


def _loader_generator(options: Options) -> torch.Generator:
    """Draws the workers' seeds, so that neither loading nor validating moves the random state dropout depends on."""
    return torch.Generator().manual_seed(options.seed)


def _sampler(options: Options, num_samples: int, batch_size: int, flag: str, *, world_size: int = 1) -> EpochSampler:
    _require_a_batch(num_samples, batch_size, flag, world_size)
    rank = ranks.rank() if world_size > 1 else 0
    return EpochSampler(num_samples, batch_size, seed=options.seed, rank=rank, world_size=world_size)


def _require_a_batch(num_samples: int, batch_size: int, flag: str, world_size: int) -> None:
    if num_samples < batch_size * world_size:
        processes = f" in each of {world_size} processes" if world_size > 1 else ""
        raise ConfigError(
            f"{flag} {batch_size}{processes}: larger than the {num_samples} pairs of the data; choose a smaller one"
        )

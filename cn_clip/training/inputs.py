"""From the settings to batches of pixels and token ids."""

import torch

from cn_clip.clip import tokenizer
from cn_clip.clip.transforms import image_transform
from cn_clip.data.datasets import ImageDataset, PairDataset, make_loader
from cn_clip.data.lmdb_store import IMAGES, PAIRS, PairStore
from cn_clip.errors import ConfigError
from cn_clip.training.params import Options
from cn_clip.training.sampling import EpochSampler
from cn_clip.training.trainer import TrainingData, ValidationData
from cn_clip.training.validation import read_split


def training_data(options: Options, resolution: int) -> TrainingData:
    """The training split; raises ConfigError when it holds less than one batch."""
    transform = image_transform(resolution)
    dataset = PairDataset(
        options.train_data,
        transform,
        tokenizer.tokenize,
        context_length=options.context_length,
        split="train",
        on_error=options.on_error,
    )
    sampler = _sampler(options, len(dataset), options.batch_size, "--batch-size")
    loader = make_loader(
        dataset,
        options.batch_size,
        options.num_workers,
        sampler=sampler,
        pin_memory=torch.cuda.is_available(),
        generator=_loader_generator(options),
    )
    return TrainingData(loader, sampler)


def validation_data(options: Options, resolution: int) -> ValidationData | None:
    """The validation split, or None when there is none; raises ConfigError when it holds less than one batch."""
    if options.val_data is None:
        return None
    images = ImageDataset(f"{options.val_data}/{IMAGES}", image_transform(resolution))
    pairs = PairStore(f"{options.val_data}/{PAIRS}")
    sampler = _sampler(options, len(pairs), options.valid_batch_size, "--valid-batch-size")
    loader = make_loader(
        images, options.valid_batch_size, options.valid_num_workers, generator=_loader_generator(options)
    )
    return ValidationData(read_split(pairs, images.ids, options.context_length), loader, sampler)


def _loader_generator(options: Options) -> torch.Generator:
    """Draws the workers' seeds, so that neither loading nor validating moves the random state dropout depends on."""
    return torch.Generator().manual_seed(options.seed)


def _sampler(options: Options, num_samples: int, batch_size: int, flag: str) -> EpochSampler:
    if num_samples < batch_size:
        raise ConfigError(f"{flag} {batch_size}: larger than the {num_samples} pairs of the data; choose a smaller one")
    return EpochSampler(num_samples, batch_size, seed=options.seed)

"""Chinese-CLIP's training data under its names, for programs with their own loop; `cn-clip train` has `inputs`."""

# B batch, R resolution, L tokens

import os
import random
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch.distributed as dist
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torch.utils.data.distributed import DistributedSampler

from cn_clip import ranks
from cn_clip.clip import _tokenizer
from cn_clip.clip.tokenizer import preprocess_text as _preprocess_text
from cn_clip.clip.tokenizer import tokenize
from cn_clip.clip.transforms import _convert_to_rgb as _convert_to_rgb
from cn_clip.clip.transforms import image_transform
from cn_clip.data.augment import Augmentation
from cn_clip.data.datasets import LmdbPairs
from cn_clip.data.lmdb_store import IMAGES, PAIRS, LmdbReader
from cn_clip.data.pictures import load_picture
from cn_clip.zoo import fetch_resolution as fetch_resolution

__all__ = ["_tokenizer"]


class Augmented:
    """Callable: a PIL picture varied by Python's own random numbers, which torch's loaders seed, then `transform`."""

    def __init__(self, resolution: int) -> None:
        self.augment, self.transform = Augmentation(resolution), image_transform(resolution)

    def __call__(self, image: Image.Image) -> Tensor:
        return self.transform(self.augment(image, random.Random(random.random())))


class LMDBDataset(Dataset[tuple[Tensor, Tensor, int]]):
    """(pixels (3, R, R) float32, token ids (L,) int64, position of [SEP]) of the pairs of a built split, by number.

    Beyond `number_samples`, up to `dataset_len`, it begins again. Programs may set `transform`, and read the LMDBs
    themselves with `txn_pairs` and `txn_imgs`.
    """

    def __init__(
        self,
        lmdb_path: str,
        split: str = "val",
        max_txt_length: int = 64,
        use_augment: bool = False,
        resolution: int = 224,
    ) -> None:
        """Pictures are varied with `use_augment` where `split` is "train".

        Raises AssertionError when a folder is not there, DataError when it is no LMDB or holds no pair.
        """
        for folder in (lmdb_path, os.path.join(lmdb_path, PAIRS), os.path.join(lmdb_path, IMAGES)):
            if not os.path.isdir(folder):
                raise AssertionError(
                    f"{folder}: no such folder; expected the {split} split, a folder with imgs and pairs"
                )
        self.lmdb_path, self.split = lmdb_path, split
        self.max_txt_length, self.use_augment = max_txt_length, use_augment
        self.source = LmdbPairs(lmdb_path, split=split)
        self.number_samples, self.number_images = len(self.source), self.source.images.num_images
        self.dataset_len, self.global_batch_size = self.number_samples, 1  # until `pad_dataset`
        is_varied = split == "train" and use_augment
        self.transform: Callable[[Image.Image], Tensor] = (Augmented if is_varied else image_transform)(resolution)

    @property
    def txn_pairs(self) -> Any:
        """LMDB's transaction over the pairs, `number: pickled (image id, text id, text)`."""
        return LmdbReader(os.path.join(self.lmdb_path, PAIRS)).transaction()

    @property
    def txn_imgs(self) -> Any:
        """LMDB's transaction over the pictures, `image id: base64`."""
        return LmdbReader(os.path.join(self.lmdb_path, IMAGES)).transaction()

    def __len__(self) -> int:
        return self.dataset_len

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, int]:
        stored = self.source[index % self.number_samples]
        pixels = load_picture(stored.picture, stored.where, self.transform)
        tokens = tokenize([_preprocess_text(stored.text)], context_length=self.max_txt_length)[0]
        return pixels, tokens, int(tokens.ne(0).sum()) - 1


def pad_dataset(dataset: LMDBDataset, global_batch_size: int) -> None:
    """Lengthens a dataset, which then repeats its beginning, so that the last batch of all processes is full."""
    dataset.dataset_len = ceil(dataset.dataset_len / global_batch_size) * global_batch_size
    dataset.global_batch_size = global_batch_size


@dataclass
class DataInfo:
    """A loader, what chooses the order of its samples, and its dataset."""

    dataloader: Any  # a DataLoader that also has `num_samples` and `num_batches`
    sampler: Sampler[int]
    dataset: LMDBDataset
    epoch_id: int


def get_dataset(args: Any, is_train: bool, max_txt_length: int = 64, epoch_id: int = 0) -> DataInfo:
    """Batches (pixels (B, 3, R, R), token ids (B, L), positions of [SEP] (B,)) of a split, for this process.

    Of `args`, for training: train_data, batch_size, num_workers, use_augment; for validation: val_data,
    valid_batch_size, valid_num_workers; for both: vision_model, whose resolution is R, and seed. Both are shuffled:
    validation alike in every epoch. Processes are those of torch.distributed, or of WORLD_SIZE before it is set up.
    """
    path = args.train_data if is_train else args.val_data
    if path is None:
        raise AssertionError(f"args.{'train_data' if is_train else 'val_data'} is None; expected the folder of a split")
    dataset = LMDBDataset(
        path,
        split="train" if is_train else "val",
        max_txt_length=max_txt_length,
        use_augment=args.use_augment if is_train else False,
        resolution=fetch_resolution(args.vision_model),
    )
    is_joined = dist.is_available() and dist.is_initialized()
    world_size, rank = (dist.get_world_size(), dist.get_rank()) if is_joined else (ranks.world_size(), ranks.rank())
    batch_size = args.batch_size if is_train else args.valid_batch_size
    pad_dataset(dataset, batch_size * world_size)
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, world_size, rank, shuffle=True, seed=args.seed)
    sampler.set_epoch(epoch_id if is_train else 0)
    loader: Any = DataLoader(
        dataset,
        batch_size=batch_size,
        num_workers=args.num_workers if is_train else args.valid_num_workers,
        sampler=sampler,
    )
    loader.num_samples, loader.num_batches = len(dataset), len(dataset) // dataset.global_batch_size
    return DataInfo(loader, sampler, dataset, epoch_id)


def get_data(args: Any, epoch_id: int = 0, max_txt_length: int = 64) -> dict[str, DataInfo]:
    """`get_dataset` of both splits, as "train" and "val", of those whose paths `args` has."""
    paths = {"train": args.train_data, "val": args.val_data}
    return {
        name: get_dataset(args, is_train=name == "train", max_txt_length=max_txt_length, epoch_id=epoch_id)
        for name, path in paths.items()
        if path
    }

"""Chinese-CLIP's datasets, loaders and zero-shot classification, under its names; for programs with their own loop.

The commands read through `data.pictures` and `data.records`, which these are faces of.
"""

# B batch, R resolution, L tokens, N pictures, C classes, D embedding

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, SequentialSampler

from cn_clip import ranks
from cn_clip.clip import tokenizer
from cn_clip.clip.scoring import LOGIT_SCALE
from cn_clip.clip.tokenizer import preprocess_text as _preprocess_text
from cn_clip.clip.tokenizer import tokenize
from cn_clip.clip.transforms import ImageTransform, _convert_to_rgb, image_transform
from cn_clip.data.pictures import ClassFolders, LmdbPictures, load_picture
from cn_clip.data.records import RecordId, read_texts
from cn_clip.evaluation.zeroshot import read_index
from cn_clip.language import both
from cn_clip.progress import counted
from cn_clip.zoo import fetch_resolution as fetch_resolution

__all__ = ["tokenize"]


class EvalTxtDataset(Dataset[tuple[RecordId, Tensor]]):
    """(text id, token ids (L,) int64) of each line of a texts file; `texts` has (text id, text as written)."""

    def __init__(self, jsonl_filename: str, max_txt_length: int = 24) -> None:
        """Raises AssertionError when there is no such file, DataError with file and line for a faulty one."""
        if not os.path.exists(jsonl_filename):
            raise AssertionError(f"{jsonl_filename}: no such file; expected the texts, one JSON object a line")
        self.texts = read_texts(jsonl_filename)
        self.max_txt_length = max_txt_length

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, idx: int) -> tuple[RecordId, Tensor]:
        text_id, text = self.texts[idx]
        return text_id, tokenizer.tokenize([_preprocess_text(text)], self.max_txt_length)[0]


class EvalImgDataset(Dataset[tuple[RecordId, Tensor]]):
    """(image id, pixels (3, R, R) float32) of an LMDB's pictures in the order of its keys."""

    def __init__(self, lmdb_imgs: str, resolution: int = 224) -> None:
        """Raises AssertionError when there is no such folder, DataError when it holds no pictures."""
        if not os.path.isdir(lmdb_imgs):
            raise AssertionError(f"{lmdb_imgs}: no such folder; expected the LMDB of the pictures, such as .../imgs")
        self.pictures = LmdbPictures(lmdb_imgs)
        self.number_images = len(self.pictures)
        self.transform = self._build_transform(resolution)

    def _build_transform(self, resolution: int) -> ImageTransform:
        return image_transform(resolution)

    def __len__(self) -> int:
        return self.number_images

    def __getitem__(self, idx: int) -> tuple[RecordId, Tensor]:
        stored = self.pictures[idx]
        return stored.key, load_picture(stored.data, stored.where, self.transform)


class ClassFolderDataset(Dataset[tuple[Any, int]]):
    """(picture as `transform` makes it, number of its class) over class folders, with torchvision's attributes."""

    def __init__(self, root: str, transform: Callable[[Image.Image], Any] | None = None) -> None:
        """Raises DataError when the folder holds no class folders, or one of them no picture."""
        self.root, self.transform = root, transform
        self.folders = ClassFolders(root)
        self.classes = self.folders.classes
        self.class_to_idx = {name: number for number, name in enumerate(self.classes)}
        self.samples = self.imgs = self.folders.samples
        self.targets = [number for _, number in self.samples]

    def __len__(self) -> int:
        return len(self.folders)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        stored = self.folders[index]
        return load_picture(stored.data, stored.where, self._prepare), stored.key

    def _prepare(self, image: Image.Image) -> Any:
        image = _convert_to_rgb(image)
        return image if self.transform is None else self.transform(image)


@dataclass
class DataInfo:
    """A loader, and what chooses the order of its samples; None: their own."""

    dataloader: Any  # a DataLoader that also has `num_samples` and `num_batches`
    sampler: Sampler[int] | None


def get_eval_txt_dataset(args: Any, max_txt_length: int = 24) -> DataInfo:
    """Batches (text ids (B,), token ids (B, L)) of `args.text_data`, `args.text_batch_size` texts each.

    Ids are int64, or a list where they are strings.
    """
    return _in_order(EvalTxtDataset(args.text_data, max_txt_length=max_txt_length), args.text_batch_size)


def get_eval_img_dataset(args: Any) -> DataInfo:
    """Batches (image ids (B,), pixels (B, 3, R, R)) of `args.image_data`, `args.img_batch_size` pictures each.

    R is the resolution of `args.vision_model`. Ids are int64, or a list where they are strings.
    """
    dataset = EvalImgDataset(args.image_data, resolution=fetch_resolution(args.vision_model))
    return _in_order(dataset, args.img_batch_size)


def _in_order(dataset: EvalTxtDataset | EvalImgDataset, batch_size: int) -> DataInfo:
    sampler = SequentialSampler(dataset)
    loader: Any = DataLoader(
        dataset, batch_size=batch_size, sampler=sampler, pin_memory=ranks.choose_device(None).type == "cuda"
    )
    loader.num_samples, loader.num_batches = len(dataset), len(loader)
    return DataInfo(loader, sampler)


def get_zeroshot_dataset(args: Any, preprocess_fn: Callable[[Image.Image], Any]) -> DataInfo:
    """Batches (pictures as `preprocess_fn` makes them, class numbers (B,) int64) of the class folders `args.datapath`.

    `args.img_batch_size` pictures each, decoded by `args.num_workers` processes.
    """
    dataset = ClassFolderDataset(args.datapath, transform=preprocess_fn)
    return DataInfo(DataLoader(dataset, batch_size=args.img_batch_size, num_workers=args.num_workers), None)


# --- zero-shot classification of tensors; the command computes with `evaluation.zeroshot` -----------------------------


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


@torch.no_grad()
def zero_shot_classifier(
    model: nn.Module, classnames: Sequence[str], templates: Sequence[Callable[[str], str]], args: Any
) -> Tensor:
    """Unit class vectors (D, C): the mean over the templates of the unit text features of each class.

    model: called as `model(None, token_ids)`; it computes where it lies. Of `args`: context_length.
    """
    vectors = []
    for classname in counted(classnames, both("类", "classes"), both("编码标签", "encoding labels")):
        texts = [_preprocess_text(template(classname)) for template in templates]
        token_ids = tokenize(texts, context_length=args.context_length).to(_device(model))
        vectors.append(F.normalize(F.normalize(model(None, token_ids), dim=-1).mean(dim=0), dim=0))
    return torch.stack(vectors, dim=1)


def accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """For each k, of how many rows of `output` (B, C) the class `target` (B,) is among the k largest."""
    best = output.topk(max(topk), dim=1).indices
    is_right = best == target.view(-1, 1)
    return [float(is_right[:, :k].sum()) for k in topk]


@torch.no_grad()
def run(
    model: nn.Module, classifier: Tensor, dataloader: Iterable[tuple[Tensor, Tensor]], args: Any
) -> tuple[float, Tensor]:
    """(share of pictures whose class comes first, probabilities (N, C)).

    dataloader: batches of pixels and class numbers. With `args.index`, ELEVATER's JSON list, the rows are in its order.
    Raises DataError when that list is not of these pictures.
    """
    device, right, rows = _device(model), 0.0, []
    for images, target in counted(dataloader, both("批", "batches"), both("分类图片", "classifying")):
        features = F.normalize(model(images.to(device), None), dim=-1)
        rows.append((LOGIT_SCALE * features @ classifier).softmax(dim=-1))
        right += accuracy(rows[-1], target.to(device))[0]
    probabilities_NC = torch.cat(rows)
    top1 = right / len(probabilities_NC)
    index = getattr(args, "index", "")
    return top1, probabilities_NC[read_index(Path(index), len(probabilities_NC))] if index else probabilities_NC

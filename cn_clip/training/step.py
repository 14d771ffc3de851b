"""Gradients of one update, from one batch or from several joined exactly (gradient caching), on one process or many."""

# B pairs of a batch, L tokens, R resolution, D embedding, T teacher's embedding

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from cn_clip import ranks
from cn_clip.clip.transfers import on_device
from cn_clip.clip.transforms import normalised
from cn_clip.data.datasets import PairBatch
from cn_clip.data.records import RecordId
from cn_clip.training import state
from cn_clip.training.distributed import Gather, Parallel, gather_rows, rows_of_this, sum_of_all
from cn_clip.training.loss import Objective, Pairs, Scores

Encode = Callable[[Tensor], Any]


class Batch(NamedTuple):
    """Pairs on the training device, (image id, text id) of each, and where wanted keys: equal for equal content."""

    pixels_B3RR: Tensor
    tokens_BL: Tensor
    ids: list[tuple[RecordId, RecordId]]
    keys_B2: Tensor | None


class Features(NamedTuple):
    """What the forward pass leaves of one batch, or of several joined."""

    image_BD: Tensor
    text_BD: Tensor
    scale: Tensor


class Teacher:
    """A picture tower that is not trained. `encode` takes pixels and returns features, or a tuple that begins so.

    resolution: what pixels are resized to (bicubic, antialiased); None: they are handed over as they are.
    """

    def __init__(self, encode: Encode, *, resolution: int | None) -> None:
        self.encode, self.resolution = encode, resolution

    @torch.no_grad()
    def features(self, pixels_B3RR: Tensor) -> Tensor:
        """Features (B, D), float32, not normalised, without gradient; mixed precision as the caller has it.

        pixels: float, normalised, or uint8, which are normalised before they are resized.
        """
        pixels_B3RR = normalised(pixels_B3RR).float()
        if self.resolution not in (None, pixels_B3RR.shape[-1]):
            size = [self.resolution, self.resolution]
            pixels_B3RR = F.interpolate(pixels_B3RR, size=size, mode="bicubic", antialias=True, align_corners=False)
        output = self.encode(pixels_B3RR)
        features_BD: Tensor = output[0] if isinstance(output, tuple) else output
        return features_BD.float()


@dataclass(frozen=True)
class Learner:
    """Turns batches into gradients. `gather` says which features of other processes the loss sees.

    local_loss: each process computes the loss of its own pairs among those of all; needs `gather` "gradients".
    """

    parallel: Parallel
    objective: Objective
    scaler: torch.amp.GradScaler
    autocast: Callable[[], AbstractContextManager[object]]
    gather: Gather = "none"
    mask_ratio: float = 0.0
    multi_positive: bool = False
    local_loss: bool = False
    teacher: Teacher | None = None

    def backward(self, batches: Sequence[Batch]) -> Scores:
        """Adds the gradients of the batches taken as one to the weights, in units of the gradient scaler.

        The scores are those of the joined batch, over all processes whose features the loss sees.
        """
        if len(batches) > 1:
            return self._cached(batches)
        with self.parallel.accumulating(more_to_come=False):
            with self.autocast():
                features = self._forward(batches[0])
                scores = self._score(features, self.parallel.logit_bias, batches)
            torch.autograd.backward(self.scaler.scale(scores.loss))
        self.parallel.finish_gradients()
        return self._of_all(scores)

    def _forward(self, batch: Batch) -> Features:
        return Features(*self.parallel(batch.pixels_B3RR, batch.tokens_BL, self.mask_ratio))

    def _cached(self, batches: Sequence[Batch]) -> Scores:
        """Features without gradients, the loss and its gradients at the features, then each batch again with them.

        Both passes of a batch start from the same random state. Source: arXiv:2101.06983.
        """
        randomness, parts = [], []
        with self.parallel.without_gradients(), self.autocast():
            for batch in batches:
                randomness.append(state.rng_state(self.parallel.device))
                parts.append(self._forward(batch))
        features = [torch.cat([part[tower] for part in parts]) for tower in (0, 1)]
        own_bias = self.parallel.logit_bias
        leaves = [tensor.detach().requires_grad_() for tensor in (*features, parts[0].scale)]
        bias = None if own_bias is None else own_bias.detach().requires_grad_()
        with self.autocast():
            scores = self._score(Features(*leaves), bias, batches)
        torch.autograd.backward(self.scaler.scale(scores.loss))
        sizes = [len(batch.ids) for batch in batches]
        image, text, scale = (_gradient(leaf) for leaf in leaves)
        rows = list(zip(image.split_with_sizes(sizes), text.split_with_sizes(sizes), strict=True))
        last = len(batches) - 1
        for number, batch in enumerate(batches):
            state.restore_rng(randomness[number], self.parallel.device)
            with self.parallel.accumulating(more_to_come=number < last):
                with self.autocast():
                    again = self._forward(batch)
                outputs: list[Tensor] = [again.image_BD, again.text_BD]
                gradients: list[Tensor] = [*rows[number]]
                if number == last:  # scale and bias belong to the joined batch, not to one of them
                    outputs += [again.scale] if own_bias is None else [again.scale, own_bias]
                    gradients += [scale] if bias is None else [scale, _gradient(bias)]
                # The outputs of a frozen tower depend on no trained weight. One sum: DDP must see every weight in one
                # backward pass, and FSDP's hooks hang on tensors, not on lists.
                pairs = zip(outputs, gradients, strict=True)
                sums = [(output.float() * gradient.float()).sum() for output, gradient in pairs if output.requires_grad]
                if sums:
                    torch.autograd.backward(torch.stack(sums).sum())
        self.parallel.finish_gradients()
        return self._of_all(scores)

    @property
    def _is_local(self) -> bool:
        return self.local_loss and ranks.world_size() > 1

    def _of_all(self, scores: Scores) -> Scores:
        scores = scores._replace(loss=scores.loss.detach())
        if not self._is_local:
            return scores
        loss, images_right, texts_right = sum_of_all(torch.stack(scores)).unbind()
        return Scores(loss / ranks.world_size(), images_right, texts_right)

    def _score(self, features: Features, bias: Tensor | None, batches: Sequence[Batch]) -> Scores:
        def gathered(rows: Tensor) -> Tensor:
            return gather_rows(rows, self.gather)

        pairs = Pairs(gathered(features.image_BD), gathered(features.text_BD), features.scale, bias)
        if self.multi_positive:
            image_keys, text_keys = gathered(torch.cat([_keys(batch) for batch in batches])).unbind(1)
            pairs = pairs._replace(image_keys_N=image_keys, text_keys_N=text_keys)
        if self._is_local:
            pairs = pairs._replace(own_rows=rows_of_this(len(features.image_BD)))
        if self.teacher is not None:
            taught = torch.cat([self.teacher.features(batch.pixels_B3RR) for batch in batches])
            pairs = pairs._replace(teacher_NT=taught if self._is_local else gathered(taught))
        return self.objective(pairs)


def _gradient(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


def make_batch(pairs: PairBatch, device: torch.device, *, with_keys: bool = True) -> Batch:
    """A batch of the loader on the training device, see `on_device`; its texts are cut to the longest.

    with_keys: for a learner with `multi_positive`; they take a hash for each picture and text.
    """
    tokens_BL = cut_to_longest(pairs.tokens)
    tensors = [pairs.pixels, tokens_BL]
    if with_keys:  # int64; texts are compared as the model reads them
        images = [_key(image_id) for image_id in pairs.image_id]
        texts = [_key(row[: int(row.ne(0).sum())].tolist()) for row in tokens_BL]
        tensors.append(torch.tensor([images, texts]).t())
    pixels_B3RR, tokens_BL, *keys = on_device(tensors, device)
    ids = list(zip(pairs.image_id, pairs.text_id, strict=True))
    return Batch(pixels_B3RR, tokens_BL, ids, keys[0] if keys else None)


def joined(batches: Iterable[Batch], number: int) -> Iterator[list[Batch]]:
    """The batches of each update, `number` of them; those at the end that fill no update are left out."""
    rest = iter(batches)
    while len(update := list(itertools.islice(rest, number))) == number:
        yield update


def _keys(batch: Batch) -> Tensor:
    assert batch.keys_B2 is not None, "a batch made without keys cannot be learned from with multi_positive"
    return batch.keys_B2


def cut_to_longest(tokens_BL: Tensor) -> Tensor:
    """Token ids without the columns in which every row has padding."""
    longest = int(tokens_BL.ne(0).any(dim=0).nonzero().max()) + 1
    return tokens_BL[:, :longest]


def _key(value: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True)

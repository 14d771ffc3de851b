"""Validation: loss and accuracy inside batches as Chinese-CLIP reports them, and true recall over the whole split."""

# N pictures, T texts, P pairs, B batch, D embedding

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cn_clip import ranks
from cn_clip.clip import tokenizer
from cn_clip.clip.model import CLIP
from cn_clip.clip.transfers import on_device
from cn_clip.data.lmdb_store import Split
from cn_clip.retrieval.recall import Recall, RecallBothWays, recall_from_features
from cn_clip.training.distributed import from_first, gather_shares, own_share
from cn_clip.training.inputs import EpochSampler
from cn_clip.training.loss import Pairs, contrastive_scores


@dataclass(frozen=True)
class Validation:
    """Loss in nats, in-batch accuracies in [0, 1], and recall of both directions over the whole split."""

    loss: float
    image_to_text_acc: float
    text_to_image_acc: float
    text_to_image: Recall
    image_to_text: Recall

    @property
    def recall(self) -> RecallBothWays:
        """Both directions as one."""
        return RecallBothWays(self.text_to_image, self.image_to_text)

    @property
    def mean_recall(self) -> float:
        """The mean of both directions over k: what the best checkpoint is chosen by."""
        return self.recall.mean

    def values(self) -> dict[str, float]:
        """All of it under one name each, recalls in [0, 1]."""
        accuracies = {"image_to_text_acc": self.image_to_text_acc, "text_to_image_acc": self.text_to_image_acc}
        return {"loss": self.loss, **accuracies, **self.recall.values()}


@torch.no_grad()
def validate(
    model: CLIP,
    split: Split,
    tokens: list[list[int]],
    pixel_batches: Iterable[Tensor],
    sampler: EpochSampler,
    autocast: Callable[[], AbstractContextManager[object]],
) -> Validation:
    """Computes every picture and text once, then scores batches of pairs in the order of `sampler` of each process.

    tokens: token ids of each text. pixel_batches: this process's `own_share` of the pictures, (B, 3, R, R) each,
    normalised or bytes. The
    model is left in training mode as found. With several processes every one must ask, and all get the same answer.
    """
    was_training = model.training
    model.eval()
    with autocast():
        # Through the model's call: FSDP's hooks hang there.
        own_images = _joined(model(*on_device([pixels], _device(model)), None) for pixels in pixel_batches)
        # Texts in batches of like length; their features go back into the order of this process's share.
        own = [tokens[number] for number in own_share(len(tokens))]
        order = sorted(range(len(own)), key=lambda number: len(own[number]))
        batches = [order[start : start + sampler.batch_size] for start in range(0, len(order), sampler.batch_size)]
        padded = (tokenizer.pad([own[number] for number in batch], len(own[batch[-1]])) for batch in batches)
        sorted_texts = _joined(model(None, torch.from_numpy(batch).to(_device(model))) for batch in padded)
        own_texts = torch.empty_like(sorted_texts)
        own_texts[order] = sorted_texts
    images_ND = gather_shares(own_images, len(split.image_ids))
    texts_TD = gather_shares(own_texts, len(tokens))
    model.train(was_training)
    loss, image_to_text_acc, text_to_image_acc = _in_batches(images_ND, texts_TD, split, sampler, model.logit_scale)
    recalls = None
    if ranks.rank() == 0:
        recalls = recall_from_features(images_ND.cpu().numpy(), texts_TD.cpu().numpy(), np.array(split.pairs))
    return Validation(loss, image_to_text_acc, text_to_image_acc, *from_first(recalls))


def _device(model: CLIP) -> torch.device:
    return model.logit_scale.device


def _joined(batches: Iterator[Tensor]) -> Tensor:
    return torch.cat([F.normalize(batch.float(), dim=-1) for batch in batches])


def _in_batches(
    images_ND: Tensor, texts_TD: Tensor, split: Split, sampler: EpochSampler, logit_scale: Tensor
) -> tuple[float, float, float]:
    """Mean loss and mean accuracies over batches of pairs."""
    device = images_ND.device
    pairs_P2 = torch.tensor(split.pairs, device=device)
    # Every process has all features, so that each can score the batches of all.
    every_rank = [
        EpochSampler(
            sampler.num_samples, sampler.batch_size, seed=sampler.seed, rank=rank, world_size=sampler.world_size
        )
        for rank in range(sampler.world_size)
    ]
    batches = [batch for own in every_rank for batch in own.batches()]
    rows_P = torch.tensor([row for batch in batches for row in batch], device=device)
    values = []
    # TF32 would move logits, up to 100 times a cosine, by some hundredths.
    with ranks.full_float32(device):
        for rows_B in torch.split(rows_P, [len(batch) for batch in batches]):
            image_B, text_B = pairs_P2[rows_B].unbind(1)
            scores = contrastive_scores(Pairs(images_ND[image_B], texts_TD[text_B], logit_scale.float().exp()))
            values.append(torch.stack([scores.loss * len(rows_B), scores.images_right, scores.texts_right]))
    totals = torch.zeros(3, dtype=torch.float64)
    for of_batch in torch.stack(values).cpu():  # once for all: each would wait for the device
        totals += of_batch
    loss, image_to_text, text_to_image = (totals / sampler.num_padded).tolist()
    return loss, image_to_text, text_to_image

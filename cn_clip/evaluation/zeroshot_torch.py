"""Zero-shot classification of tensors under Chinese-CLIP's names; the command computes with `zeroshot`."""

# B batch, N pictures, C classes, D embedding

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from cn_clip.clip.inputs import preprocess_text
from cn_clip.clip.tokenizer import tokenize
from cn_clip.evaluation.elevater import read_index
from cn_clip.evaluation.zeroshot import LOGIT_SCALE


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
    for classname in tqdm(classnames):
        texts = [preprocess_text(template(classname)) for template in templates]
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
    for images, target in tqdm(dataloader):
        features = F.normalize(model(images.to(device), None), dim=-1)
        rows.append((LOGIT_SCALE * features @ classifier).softmax(dim=-1))
        right += accuracy(rows[-1], target.to(device))[0]
    probabilities_NC = torch.cat(rows)
    top1 = right / len(probabilities_NC)
    index = getattr(args, "index", "")
    return top1, probabilities_NC[read_index(Path(index), len(probabilities_NC))] if index else probabilities_NC

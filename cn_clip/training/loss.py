"""The losses of a batch: pure functions of features, which never hold the whole N x N matrix of a large batch."""

# N pairs of the global batch, B rows of one block, D embedding, T teacher's embedding

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK_ROWS = 4096  # with 32,768 pairs a block of logits is 0.5 GiB in float32


class Pairs(NamedTuple):
    """Features of a batch, picture i with text i, and what the loss may want to know of them.

    image_ND, text_ND: unit rows. scale: exp(logit_scale). bias: of the sigmoid loss. image_keys_N, text_keys_N: int64,
    equal where picture or text is the same. teacher_NT: picture features of a teacher, float32; with own_rows of these.
    own_rows: the pairs of this process (local loss); None: the loss is of all.
    """

    image_ND: Tensor
    text_ND: Tensor
    scale: Tensor
    bias: Tensor | None = None
    image_keys_N: Tensor | None = None
    text_keys_N: Tensor | None = None
    teacher_NT: Tensor | None = None
    own_rows: slice | None = None


class Scores(NamedTuple):
    """Loss in nats; how many pictures rank their own text first and how many texts their picture, counts in float32."""

    loss: Tensor
    images_right: Tensor
    texts_right: Tensor


@dataclass(frozen=True)
class Objective:
    """What training minimises: the loss of the pairs, and `distillation_weight` times the distance from the teacher.

    dimensions: the loss of the pairs is the mean of those of whole vectors and of their first so many numbers, as unit
    rows (Matryoshka). Source: arXiv:2205.13147.
    """

    kind: Literal["clip", "siglip"] = "clip"
    distillation_weight: float = 0.0
    dimensions: tuple[int, ...] = ()

    def __call__(self, pairs: Pairs, block_rows: int = BLOCK_ROWS) -> Scores:
        """Scores of a batch; more than `block_rows` pairs are computed in blocks, again in the backward pass.

        With `own_rows` they are the part of these pairs: the mean of it over the processes is the loss of the batch.
        """
        of = {"clip": contrastive_scores, "siglip": sigmoid_scores}[self.kind]
        scores = of(pairs, block_rows)
        if self.dimensions:
            parts = [of(_beginning(pairs, count), block_rows).loss for count in self.dimensions]
            scores = scores._replace(loss=torch.stack([scores.loss, *parts]).mean())
        if pairs.teacher_NT is None:
            return scores
        student_ND = pairs.image_ND if pairs.own_rows is None else pairs.image_ND[pairs.own_rows]
        distillation = feature_distillation_loss(pairs.teacher_NT, student_ND)
        return scores._replace(loss=scores.loss + self.distillation_weight * distillation)


def _beginning(pairs: Pairs, count: int) -> Pairs:
    """The pairs with the first numbers of their vectors alone, unit rows again."""
    image_ND, text_ND = (F.normalize(rows_ND[:, :count].float(), dim=-1) for rows_ND in (pairs.image_ND, pairs.text_ND))
    return pairs._replace(image_ND=image_ND, text_ND=text_ND)


def contrastive_scores(pairs: Pairs, block_rows: int = BLOCK_ROWS) -> Scores:
    """InfoNCE, mean of both directions. Source: arXiv:2103.00020, fig. 3.

    With keys, pairs that share a picture or a text are left out of each other's denominators.

    Worked example: logits [[2, 0], [1, 3]] (a row is a picture) in blocks of one row. A block has its rows whole:
    ln(e^2 + e^0) - 2 = 0.127, and ln(e^1 + e^3) - 3 = 0.127; of the columns it has a part each: (2, 0), and (1, 3).
    The parts join: ln(e^2 + e^1) - 2 = 0.313, and ln(e^0 + e^3) - 3 = 0.049. Loss: (0.127 + 0.181) / 2 = 0.154.
    """
    if pairs.own_rows is not None:
        return _own_scores(_softmax_rows, pairs, pairs.own_rows, block_rows)
    blocks = _blocks(_softmax_block, pairs, block_rows)
    row_lse_N, own_N = torch.cat([block.row for block in blocks]), torch.cat([block.own for block in blocks])
    column_lse_N = torch.stack([block.column for block in blocks]).logsumexp(dim=0)
    loss = ((row_lse_N - own_N).mean() + (column_lse_N - own_N).mean()) / 2
    return Scores(loss, *_right(blocks))


def sigmoid_scores(pairs: Pairs, block_rows: int = BLOCK_ROWS) -> Scores:
    """Each picture with each text is a yes-or-no question: sum over texts, mean over pictures.

    Source: arXiv:2303.15343. With keys, pairs that share a picture or a text are no question to each other.
    """
    if pairs.own_rows is not None:
        return _own_scores(_sigmoid_rows, pairs, pairs.own_rows, block_rows)
    blocks = _blocks(_sigmoid_block, pairs, block_rows)
    return Scores(torch.cat([block.row for block in blocks]).mean(), *_right(blocks))


class _Block(NamedTuple):
    """Some pictures with all texts: a value per row, the part of a value per column, and where the largest lie."""

    row: Tensor
    own: Tensor
    column: Tensor
    best_text: Tensor
    best_image: Tensor
    best_logit: Tensor


def _blocks(compute: Any, pairs: Pairs, block_rows: int) -> list[_Block]:
    starts = range(0, len(pairs.image_ND), block_rows)
    return [_Block(*values) for values in _each(compute, [(pairs, start, block_rows) for start in starts])]


def _each(compute: Any, blocks: list[tuple[Any, ...]]) -> list[Any]:
    """What `compute` makes of each block; several are computed again in the backward pass, instead of kept."""
    if len(blocks) == 1:
        return [compute(*blocks[0])]
    return [checkpoint(compute, *block, use_reentrant=False) for block in blocks]


def _logits(pairs: Pairs, start: int, block_rows: int) -> tuple[Tensor, Tensor]:
    """Float32 logits of pictures start, start + 1, ... with all texts, and the text number of each row's own text."""
    rows_BD = pairs.image_ND[start : start + block_rows]
    logits_BN = (pairs.scale * rows_BD @ pairs.text_ND.t()).float()
    if pairs.bias is not None:
        logits_BN = logits_BN + pairs.bias
    own_B = torch.arange(start, start + len(rows_BD), device=rows_BD.device)
    if pairs.image_keys_N is not None and pairs.text_keys_N is not None:
        # By comparison: assigning a number to chosen elements would upload it, and wait for the device.
        is_other_BN = own_B.unsqueeze(1) != torch.arange(len(pairs.text_ND), device=own_B.device)
        same_BN = (_same(pairs.image_keys_N, own_B) | _same(pairs.text_keys_N, own_B)) & is_other_BN
        # Finite: the logarithm of a sum over minus infinities has no gradient.
        logits_BN = logits_BN.masked_fill(same_BN, torch.finfo(logits_BN.dtype).min / 2)
    return logits_BN, own_B


def _same(keys_N: Tensor, own_B: Tensor) -> Tensor:
    return keys_N[own_B].unsqueeze(1) == keys_N.unsqueeze(0)


def _softmax_block(pairs: Pairs, start: int, block_rows: int) -> _Block:
    logits_BN, own_B = _logits(pairs, start, block_rows)
    own = logits_BN.gather(1, own_B.unsqueeze(1)).squeeze(1)
    return _Block(logits_BN.logsumexp(dim=1), own, logits_BN.logsumexp(dim=0), *_best(logits_BN, start))


def _sigmoid_block(pairs: Pairs, start: int, block_rows: int) -> _Block:
    logits_BN, own_B = _logits(pairs, start, block_rows)
    row = _sigmoid_rows(logits_BN, own_B)
    return _Block(row, row, row, *_best(logits_BN, start))


def _sigmoid_rows(logits_BN: Tensor, own_B: Tensor) -> Tensor:
    sign_BN = torch.full_like(logits_BN, -1.0).scatter_(1, own_B.unsqueeze(1), 1.0)
    return -F.logsigmoid(sign_BN * logits_BN).sum(dim=1)


def _softmax_rows(logits_BN: Tensor, own_B: Tensor) -> Tensor:
    return F.cross_entropy(logits_BN, own_B, reduction="none")


def _own_scores(rows: Any, pairs: Pairs, own_rows: slice, block_rows: int) -> Scores:
    """Own pictures with all texts, and own texts with all pictures: 2 B x N logits of a process instead of N x N.

    Worked example: logits [[2, 0], [1, 3]], softmax. Process 0 has row (2, 0) and column (2, 1): (0.127 + 0.313) / 2;
    process 1 row (1, 3) and column (0, 3): (0.127 + 0.049) / 2. The mean of both is 0.154, as of the whole matrix.
    """
    texts_first = pairs._replace(image_ND=pairs.text_ND, text_ND=pairs.image_ND)
    texts_first = texts_first._replace(image_keys_N=pairs.text_keys_N, text_keys_N=pairs.image_keys_N)
    starts = range(own_rows.start, own_rows.stop, block_rows)
    losses, right = [], []
    for one_way in (pairs, texts_first):
        blocks = [(rows, one_way, start, min(block_rows, own_rows.stop - start)) for start in starts]
        parts = _each(_own_block, blocks)
        losses.append(torch.cat([values for values, _ in parts]).mean())
        right.append(torch.cat([is_right for _, is_right in parts]).sum().float())
    return Scores((losses[0] + losses[1]) / 2, *right)


def _own_block(rows: Any, pairs: Pairs, start: int, num_rows: int) -> tuple[Tensor, Tensor]:
    logits_BN, own_B = _logits(pairs, start, num_rows)
    return rows(logits_BN, own_B), logits_BN.detach().argmax(dim=1) == own_B


def _best(logits_BN: Tensor, start: int) -> tuple[Tensor, Tensor, Tensor]:
    largest = logits_BN.detach().max(dim=0)
    return logits_BN.detach().argmax(dim=1), largest.indices + start, largest.values


def _right(blocks: list[_Block]) -> tuple[Tensor, Tensor]:
    best_text_N = torch.cat([block.best_text for block in blocks])
    block_of_N = torch.stack([block.best_logit for block in blocks]).argmax(dim=0, keepdim=True)
    best_image_N = torch.stack([block.best_image for block in blocks]).gather(0, block_of_N).squeeze(0)
    own_N = torch.arange(len(best_text_N), device=best_text_N.device)
    return (best_text_N == own_N).sum().float(), (best_image_N == own_N).sum().float()


def feature_distillation_loss(teacher_ND: Tensor, student_ND: Tensor) -> Tensor:
    """1 - the mean cosine of the rows, in float32, in [0, 2]; gradients reach both arguments.

    The numbers of features may differ: the student's rows are then stretched or shrunk to the teacher's by linear
    interpolation, as Chinese-CLIP does. Raises ValueError when the numbers of rows differ.
    """
    if len(teacher_ND) != len(student_ND):
        raise ValueError(f"{len(teacher_ND)} rows of the teacher, but {len(student_ND)} of the student")
    teacher_ND, student_ND = teacher_ND.float(), student_ND.float()
    if teacher_ND.shape[1] != student_ND.shape[1]:
        student_N1D = student_ND.unsqueeze(1)
        stretched = F.interpolate(student_N1D, size=teacher_ND.shape[1], mode="linear", align_corners=False)
        student_ND = stretched.squeeze(1)
    return 1 - F.cosine_similarity(teacher_ND, student_ND, dim=1).mean()

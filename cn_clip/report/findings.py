"""What the model of a report finds, confuses and looks at: ranked queries, a confusion matrix, regions and tokens."""

# N pictures, M texts, C classes, D embedding, K results; H, W regions of the last feature map, S all of them

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from cn_clip import command
from cn_clip.clip import scoring, tokenizer
from cn_clip.clip.backends.base import Rows
from cn_clip.clip.backends.pytorch import TorchBackend
from cn_clip.clip.choice import Choice
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.families.names import refuse
from cn_clip.clip.model import CLIP
from cn_clip.clip.opening import open_quietly
from cn_clip.clip.pictures import open_picture
from cn_clip.clip.templates import load_templates, read_labels
from cn_clip.clip.visual import ModifiedResNet, ResidualAttentionBlock
from cn_clip.data.lmdb_store import IMAGES, PAIRS, PairStore, is_split_folder, read_split
from cn_clip.data.pictures import ClassFolders, LmdbPictures
from cn_clip.errors import DataError
from cn_clip.evaluation import zeroshot
from cn_clip.evaluation.retrieval import split_features
from cn_clip.features.extraction import picture_rows
from cn_clip.language import both
from cn_clip.retrieval.flat import top_k
from cn_clip.retrieval.recall import RecallBothWays, recall_from_features

_SCORES_IN_FLIGHT = 1 << 22
GROUP_SIZE = 8
MOST_MISTAKES = 12


def open_encoder(chosen: Choice, say: command.Speaker) -> Encoder:
    """The model in PyTorch; raises ConfigError for texts longer than it takes, CheckpointError for another family."""
    say(both(f"打开模型 {chosen.model}", f"opening the model {chosen.model}"))
    refuse(chosen.model)
    return open_quietly(chosen, say)


# --- queries


class FoundPicture(NamedTuple):
    """A picture found: its number in the split, its cosine, and whether it belongs to the query."""

    image: int
    score: float
    is_right: bool


@dataclass(frozen=True)
class Query:
    """A text and what it found, best first. right: its own picture of the highest score, `rank` its position from 1."""

    text: str
    rank: int
    right: FoundPicture
    hits: list[FoundPicture]


@dataclass(frozen=True)
class Retrieval:
    """Recall over a whole split, the rank of the right picture of every text, and some of its queries."""

    folder: Path
    num_images: int
    num_texts: int
    recall: RecallBothWays
    ranks_M: NDArray[np.int64]
    best: list[Query]
    median: list[Query]
    worst: list[Query]
    pictures: LmdbPictures

    def facts(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        sizes = {"num_images": self.num_images, "num_texts": self.num_texts}
        groups = {
            name: [{"text": query.text, "rank": query.rank, "similarity": query.right.score} for query in queries]
            for name, queries in (("best", self.best), ("median", self.median), ("worst", self.worst))
        }
        return {**sizes, **self.recall.values(), **groups}


def examine_queries(encoder: Encoder, folder: Path, *, k: int, batch_size: int, num_workers: int | None) -> Retrieval:
    """Computes every picture and text of a built split and ranks them.

    The queries are ordered by the rank of their right picture, and of equal ranks by how far its score lies above
    (or least below) that of the best wrong picture. Raises DataError for a folder that is no split.
    """
    if not is_split_folder(folder):
        raise DataError(f"no built split is here; expected the folders {IMAGES} and {PAIRS} in it (--data)", at=folder)
    pictures = LmdbPictures(folder / IMAGES)
    split = read_split(PairStore(folder / PAIRS), pictures.ids)
    images_ND, texts_MD = split_features(encoder, pictures, split, batch_size=batch_size, num_workers=num_workers)
    recall = recall_from_features(images_ND, texts_MD, split.pairs)
    ranking = rank_all(images_ND, texts_MD, split.pairs)
    groups = choose(first_of_each(ranking.order_M, split.texts), GROUP_SIZE)
    chosen = [text for group in groups for text in group]
    matches = top_k(texts_MD[chosen], images_ND, k)
    pairs, found = set(split.pairs), dict[int, Query]()
    for text, indices, scores in zip(chosen, matches.indices.tolist(), matches.scores.tolist(), strict=True):
        hits = [
            FoundPicture(image, score, (image, text) in pairs) for image, score in zip(indices, scores, strict=True)
        ]
        right = FoundPicture(int(ranking.right_M[text]), float(ranking.scores_M[text]), True)
        found[text] = Query(split.texts[text], int(ranking.ranks_M[text]), right, hits)
    best, median, worst = ([found[text] for text in group] for group in groups)
    sizes = (len(images_ND), len(texts_MD))
    return Retrieval(folder, *sizes, recall, ranking.ranks_M, best, median, worst, pictures)


class Ranking(NamedTuple):
    """For every text: the position of its first right picture from 1, its number and score; texts by success."""

    ranks_M: NDArray[np.int64]
    right_M: NDArray[np.int64]
    scores_M: NDArray[np.float32]
    order_M: NDArray[np.int64]


def rank_all(images_ND: Rows, texts_MD: Rows, pairs: Sequence[tuple[int, int]]) -> Ranking:
    """Ranks as `flat.top_k` would give them for all N pictures: by falling cosine, equal ones in their order.

    pairs: (picture, text); every text has at least one. Memory is bounded by blocks of texts.
    """
    right_of: dict[int, list[int]] = defaultdict(list)
    for image, text in pairs:
        right_of[text].append(image)
    num_texts = len(texts_MD)
    ranks_M, right_M = np.empty(num_texts, dtype=np.int64), np.empty(num_texts, dtype=np.int64)
    scores_M, margins_M = np.empty(num_texts, dtype=np.float32), np.empty(num_texts, dtype=np.float32)
    step = max(1, _SCORES_IN_FLIGHT // max(len(images_ND), 1))
    gallery_DN = images_ND.astype(np.float64).T
    for start in range(0, num_texts, step):
        block = (texts_MD[start : start + step].astype(np.float64) @ gallery_DN).astype(np.float32)
        for text, scores_N in enumerate(block, start):
            own = np.array(sorted(set(right_of[text])))
            right = own[scores_N[own].argmax()]
            score = scores_N[right]
            before = np.count_nonzero(scores_N > score) + np.count_nonzero(scores_N[:right] == score)
            right_M[text], scores_M[text], ranks_M[text] = right, score, before + 1
            scores_N[own] = -np.inf
            margins_M[text] = score - scores_N.max(initial=-1.0)
    return Ranking(ranks_M, right_M, scores_M, np.lexsort((-margins_M, ranks_M)))


def first_of_each(order_M: NDArray[np.int64], texts: Sequence[str]) -> list[int]:
    """The numbers of the texts in their order, of texts in the same words only the first."""
    numbers: dict[str, int] = {}
    for number in order_M.tolist():
        numbers.setdefault(texts[number], number)
    return list(numbers.values())


def choose(order: list[int], group_size: int) -> tuple[list[int], list[int], list[int]]:
    """(best first, from the middle, worst first) of texts in order of success: no text twice, the best served first."""
    size = min(group_size, max(1, len(order) // 3))
    best, rest = order[:size], order[size:]
    worst, rest = rest[-size:][::-1], rest[: max(0, len(rest) - size)]
    begin = max(0, (len(rest) - size) // 2)
    return best, rest[begin : begin + size], worst


# --- zero-shot classification


@dataclass(frozen=True)
class Mistake:
    """Pictures of the class `true` taken for `taken`: how many, and the one the model was surest of."""

    true: int
    taken: int
    count: int
    sample: str
    probability: float


@dataclass(frozen=True)
class Confusion:
    """counts_CC: pictures by true class (row) and class they were taken for. mistakes: the most frequent first."""

    folder: Path
    labels: list[str]
    counts_CC: NDArray[np.int64]
    accuracy: zeroshot.Accuracy
    mistakes: list[Mistake]

    @property
    def num_pictures(self) -> int:
        """Pictures classified."""
        return int(self.counts_CC.sum())

    def facts(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        labels, shares = self.labels, self.accuracy.per_class
        return {
            "top1": self.accuracy.top1,
            "top5": self.accuracy.top5,
            "per_class": [{"label": label, "accuracy": share} for label, share in zip(labels, shares, strict=True)],
            "mistakes": [
                {"label": labels[one.true], "taken_for": labels[one.taken], "count": one.count, "sample": one.sample}
                for one in self.mistakes
            ],
        }


def examine_classes(
    encoder: Encoder,
    folder: Path,
    labels_file: Path,
    dataset: str,
    templates_file: str | None,
    *,
    batch_size: int,
    num_workers: int | None,
) -> Confusion:
    """Classifies as `cn-clip zeroshot` does; raises DataError when folders and labels do not fit together.

    dataset: chooses the prompt templates, unless a file of them is given.
    """
    templates = load_templates(dataset, Path(templates_file) if templates_file else None)
    labels = read_labels(labels_file)
    pictures = ClassFolders(folder)
    numbers = zeroshot.numbers_of_labels(folder, pictures.classes, labels_file, len(labels))
    classes_CD = scoring.classifier(encoder, labels, templates, batch_size=batch_size)
    paths = [path for path, _ in pictures.samples]
    rows = picture_rows(pictures, encoder, names=paths, batch_size=batch_size, num_workers=num_workers)
    images_ND = np.concatenate(list(rows))
    targets_N = np.array([numbers[label] for _, label in pictures.samples], dtype=np.int64)
    return tally(scoring.probabilities(images_ND, classes_CD), targets_N, labels, paths, folder)


def tally(
    probabilities_NC: NDArray[np.float32],
    targets_N: NDArray[np.int64],
    labels: list[str],
    paths: Sequence[str],
    folder: Path,
) -> Confusion:
    """Counts what each picture was taken for: its most probable class, the first of equals."""
    accuracy = zeroshot.accuracy(probabilities_NC, targets_N)
    taken_N = probabilities_NC.argmax(axis=1)
    counts_CC = np.zeros((len(labels), len(labels)), dtype=np.int64)
    np.add.at(counts_CC, (targets_N, taken_N), 1)
    wrong_CC = counts_CC * ~np.eye(len(labels), dtype=bool)
    most = np.argsort(-wrong_CC, axis=None, kind="stable")[:MOST_MISTAKES]
    mistakes = []
    for true, taken in (divmod(int(cell), len(labels)) for cell in most if wrong_CC.flat[cell]):
        numbers = np.flatnonzero((targets_N == true) & (taken_N == taken))
        surest = int(numbers[probabilities_NC[numbers, taken].argmax()])
        probability = float(probabilities_NC[surest, taken])
        mistakes.append(Mistake(true, taken, len(numbers), paths[surest], probability))
    return Confusion(folder, labels, counts_CC, accuracy, mistakes)


# --- regions and tokens


@dataclass(frozen=True)
class PairView:
    """A picture and a text, and what the model makes of them.

    similarity: their cosine. map_HW: cosine of each region with the text. tokens: each piece of the text in order, and
    how much the cosine of the pair falls without it; below 0, the piece stands in the way.
    """

    path: str
    text: str
    image: Image.Image
    similarity: float
    map_HW: NDArray[np.float32]
    tokens: list[tuple[str, float]]

    def facts(self) -> dict[str, Any]:
        """What `--json` prints of it."""
        return {"picture": self.path, "text": self.text, "similarity": self.similarity, "tokens": self.tokens}


def examine_pair(encoder: Encoder, path: str, text: str) -> PairView:
    """Looks into one pair; raises DataError for a picture that cannot be read and a text without tokens."""
    assert isinstance(encoder.backend, TorchBackend), "the report opens models in PyTorch"
    image = open_picture(Path(path), name=path)
    ids = encoder.texts.rows([text])[0]
    if len(ids) <= 2:
        raise DataError(f"--text {text!r}: no token is left of it; expected words")
    pixels_3RR = torch.from_numpy(encoder.transform.array(image))
    rows = without_each(ids)
    texts_LE = torch.from_numpy(encoder.encode_tokens(tokenizer.pad(rows, len(ids))))
    image_E, regions_HWE = region_vectors(encoder.backend.model, pixels_3RR.to(encoder.backend.device))
    image_E, regions_HWE = image_E.cpu(), regions_HWE.cpu()
    cosines = (texts_LE @ image_E).tolist()
    drops = [cosines[0] - cosine for cosine in cosines[1:]]
    names = {number: piece for piece, number in tokenizer.vocab().items()}
    pieces = [names[number] for number in ids[1:-1]]
    map_HW: NDArray[np.float32] = (regions_HWE @ texts_LE[0]).numpy()
    return PairView(path, text, image, cosines[0], map_HW, list(zip(pieces, drops, strict=True)))


def without_each(ids: list[int]) -> list[list[int]]:
    """The row of ids itself, then the rows that lack one of the ids between the first and the last."""
    return [ids, *(ids[:region] + ids[region + 1 :] for region in range(1, len(ids) - 1))]


@torch.inference_mode()
def region_vectors(model: CLIP, pixels_3RR: Tensor) -> tuple[Tensor, Tensor]:
    """(unit vector of the picture (E,), unit vectors of its regions (H, W, E)), float32.

    A region goes through the last attention as if it looked at itself alone: its own value, through the layers behind.
    Source: MaskCLIP, arXiv:2112.01071, section 3.2.
    """
    visual = model.visual
    layer = visual.attnpool if isinstance(visual, ModifiedResNet) else visual.transformer.resblocks[-1]
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        image_E = model.encode_image(pixels_3RR[None])[0]
    finally:
        hook.remove()
    if isinstance(visual, ModifiedResNet):
        side = seen[0].shape[-1]
        x_SC = seen[0][0].flatten(1).T + visual.attnpool.positional_embedding[1:].to(seen[0].dtype)
        regions_SE = visual.attnpool.c_proj(visual.attnpool.v_proj(x_SC))
    else:
        assert isinstance(layer, ResidualAttentionBlock)
        x_SD, width, side = seen[0][1:, 0], seen[0].shape[-1], visual.grid_size[0]
        attention = layer.attn
        value_SD = F.linear(layer.ln_1(x_SD), attention.in_proj_weight[-width:], attention.in_proj_bias[-width:])
        x_SD = x_SD + attention.out_proj(value_SD)
        x_SD = x_SD + layer.mlp(layer.ln_2(x_SD))
        regions_SE = visual.ln_post(x_SD) @ visual.proj
    regions_HWE = F.normalize(regions_SE.float(), dim=-1).reshape(side, side, -1)
    return F.normalize(image_E.float(), dim=-1), regions_HWE

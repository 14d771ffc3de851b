"""Retrieval: what each query finds among features, and the recall of benchmarks and of mixtures of weights."""

# N pictures, T texts, D embedding

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cn_clip import ranks
from cn_clip.clip.backends.base import Rows
from cn_clip.clip.choice import Choice
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.loading import open_model
from cn_clip.clip.model import CLIP
from cn_clip.clip.opening import identity, open_encoder
from cn_clip.clip.weights.checkpoint import Checkpoint
from cn_clip.clip.weights.writing import check_finite, check_same_tensors, refuse_inputs, write_checkpoint
from cn_clip.command import Speaker
from cn_clip.data.lmdb_store import IMAGES, PAIRS, PairStore, Split, read_split
from cn_clip.data.pictures import LmdbPictures
from cn_clip.data.records import RecordId, read_texts
from cn_clip.errors import DataError
from cn_clip.evaluation import annotations
from cn_clip.evaluation.annotations import FIELDS, Direction, Ranking
from cn_clip.features.extraction import Pictures, Texts, Work, job_of, picture_rows, write_files
from cn_clip.features.files import read_features
from cn_clip.features.options import OutputFormat
from cn_clip.features.rows import Features
from cn_clip.features.store import job_text
from cn_clip.files import atomic_write, replaceable, settle
from cn_clip.language import both
from cn_clip.progress import progress
from cn_clip.retrieval.flat import GALLERY_BLOCK, Gallery, top_k
from cn_clip.retrieval.recall import RecallBothWays, recall_from_features

OTHER: dict[Direction, Direction] = {"text": "image", "image": "text"}
NUM_FOUND = annotations.NUM_PREDICTIONS
JOB_FILE = "features.json"
_QUERIES_A_STEP = 1024


def search(
    queries: Features, gallery: Features, k: int, *, device: torch.device, block: int = GALLERY_BLOCK
) -> Iterator[tuple[RecordId, list[RecordId]]]:
    """Yields (query id, ids of the k vectors of the gallery with the largest products), in the order of the queries.

    Best first; equal ones in the order of the gallery. block: vectors of the gallery that are compared at a time.
    """
    checked = Gallery.of(gallery.vectors)
    with progress(len(queries.ids), both("条", "queries"), both("检索", "searching")) as bar:
        for start in range(0, len(queries.ids), _QUERIES_A_STEP):
            step = slice(start, start + _QUERIES_A_STEP)
            found = top_k(queries.vectors[step], checked, k, gallery_block=block, device=device)
            for query_id, row in zip(queries.ids[step], found.indices.tolist(), strict=True):
                yield query_id, [gallery.ids[position] for position in row]
            bar.advance(len(found.indices))


def write_predictions(
    output: str,
    features: Mapping[Direction, str],
    query: Direction,
    k: int,
    *,
    block: int,
    device: torch.device,
    say: Speaker,
) -> dict[str, int | float]:
    """Searches with the feature files of both sides and writes a line for each query; returns counts and seconds.

    Raises DataError for faulty or unlike feature files; the output appears whole or not at all.
    """
    searched = OTHER[query]
    with atomic_write(output) as stream:
        started = time.perf_counter()
        say(f"Begin to load {searched} features...")
        gallery = read_features(features[searched], FIELDS[searched].query_id, progress=True)
        say(f"Finished loading {searched} features.")
        say(f"Begin to compute top-{k} predictions for {query}s...")
        queries = read_features(features[query], FIELDS[query].query_id, progress=True)
        wide, other = queries.vectors.shape[1], gallery.vectors.shape[1]
        if wide != other:
            raise DataError(
                f"{features['image']} and {features['text']}: the {query} features have {wide} numbers, the others "
                f"{other}; extract both with the same model"
            )
        loaded = time.perf_counter()
        for query_id, found in search(queries, gallery, k, block=block, device=device):
            stream.write(annotations.line_of(query, query_id, found))
    counts = {"num_queries": len(queries.ids), "num_searched": len(gallery.ids), "top_k": k}
    return counts | {"load_seconds": loaded - started, "search_seconds": time.perf_counter() - loaded}


# --- benchmarks -------------------------------------------------------------------------------------------------------


def check_split(data: Path, split: str) -> None:
    """Raises DataError saying which part of a split is missing or cannot be scored, and what to do."""
    images, texts = data / "lmdb" / split / IMAGES, data / f"{split}_texts.jsonl"
    settle(data)
    if not data.is_dir():
        raise DataError(f"no such folder; expected a dataset with lmdb/{split}/imgs and {split}_texts.jsonl", at=data)
    if not texts.is_file():
        raise DataError(
            f"{split}_texts.jsonl is missing; expected the texts of the split with their image_ids", at=data
        )
    if not images.is_dir() and (data / f"{split}_imgs.tsv").is_file():
        raise DataError(
            f"lmdb/{split}/imgs is missing; pack the tsv and jsonl files first: "
            f"cn-clip dataset build --data_dir {data} --splits {split}",
            at=data,
        )
    if not images.is_dir():
        raise DataError(
            f"neither lmdb/{split}/imgs nor {split}_imgs.tsv is there; expected the pictures of the split", at=data
        )
    num_images, num_texts, has_answer = len(LmdbPictures(images)), 0, False
    for _, found in annotations.read_relevant(str(texts)):
        num_texts, has_answer = num_texts + 1, has_answer or bool(found)
    if not has_answer:
        raise DataError("no text has image_ids, so nothing can be scored; choose a split with answers", at=texts)
    for count, what in ((num_images, "pictures"), (num_texts, "texts")):
        if count < NUM_FOUND:
            raise DataError(f"{split} has {count} {what}; recall at 10 needs at least {NUM_FOUND}", at=data)


def benchmark(
    data: Path,
    split: str,
    queries: Sequence[Direction],
    chosen: Choice,
    output: Path,
    say: Speaker,
    *,
    batch_size: int,
    num_workers: int | None,
) -> dict[Direction, dict[str, float]]:
    """Recall in percent, by direction: `r1`, `r5`, `r10`, `mean_recall`; of a split that `check_split` has passed.

    `output` exists and receives features, predictions and annotations; features of the same job that are there are
    taken as they are, and a killed extraction goes on. Raises CnClipError naming a text or picture that is faulty.
    """
    encoder = open_encoder(chosen, say.muted())
    of_model, device = identity(chosen, encoder), ranks.choose_device(chosen.device)
    texts, images = data / f"{split}_texts.jsonl", data / "lmdb" / split / IMAGES
    files = {"image": str(output / f"{split}_imgs.img_feat.npz"), "text": str(output / f"{split}_texts.txt_feat.npz")}
    pictures = Pictures(LmdbPictures(images), batch_size=batch_size, num_workers=num_workers)
    works: list[Work] = [Texts(read_texts(texts), batch_size=batch_size, path=texts), pictures]
    job = job_text({work.kind: job_of(work, encoder, of_model) for work in works})
    job_file = output / f"{split}_{JOB_FILE}"
    are_there = all(Path(file).is_file() for file in files.values())
    if are_there and job_file.is_file() and job_file.read_text(encoding="utf-8") == job:
        listed = ", ".join(files.values())
        say(both(f"特征已有，不再计算：{listed}", f"features are there already; not computed again: {listed}"))
    else:
        if are_there:
            say.note(
                both(
                    f"{output}: 里面的特征是别的设置算出来的，重新计算",
                    f"{output}: holds features made with other settings; computing again",
                )
            )
        say(both("提取特征……", "extracting features…"))
        job_file.unlink(missing_ok=True)
        npz: OutputFormat = "npz"
        write_files([(work, files[work.kind], npz) for work in works], encoder, of_model, Speaker(quiet=True))
        with atomic_write(job_file) as stream:
            stream.write(job)
    annotation = output / f"{split}_texts.jsonl"
    with atomic_write(annotation, "wb") as copy, texts.open("rb") as source:
        shutil.copyfileobj(source, copy)
    return {query: _recall(files, annotation, query, device, say) for query in queries}


def _recall(
    files: Mapping[str, str], annotation: Path, query: Direction, device: torch.device, say: Speaker
) -> dict[str, float]:
    """Writes the predictions, and for pictures the annotation turned round, beside the annotation."""
    say(both("以文搜图……", "text → image…") if query == "text" else both("以图搜文……", "image → text…"))
    mark = "" if query == "text" else "tr_"
    predictions = annotation.with_name(annotation.name.replace("texts.jsonl", f"{mark}predictions.jsonl"))
    asked, gallery = (read_features(files[side], FIELDS[side].query_id) for side in (query, OTHER[query]))
    predicted: Ranking = {}
    with atomic_write(predictions) as stream:
        for query_id, found in search(asked, gallery, NUM_FOUND, device=device):
            stream.write(annotations.line_of(query, query_id, found))
            predicted[query_id] = found
    standard = str(annotation)
    if query == "text":
        relevant = annotations.read_annotation(standard)
    else:
        standard, _, relevant = annotations.turn_round(standard)
    annotations.check_complete(relevant, predicted, query=query)
    result = annotations.score(relevant, predicted, query=query, standard=standard, submit=predictions)
    return {name: result["scoreJson"][name] for name in ("r1", "r5", "r10", "mean_recall")}


# --- mixtures of weights (WiSE-FT) ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ends:
    """Both checkpoints with the tensors of their models, which are the same by name and shape, and a model for them."""

    zeroshot: Checkpoint
    finetuned: Checkpoint
    model: CLIP

    def mixture(self, alpha: float) -> dict[str, Tensor]:
        """The weights at `alpha`, see `interpolate`."""
        return interpolate(self.zeroshot.state_dict, self.finetuned.state_dict, alpha)


@dataclass(frozen=True)
class Point:
    """Recall of one mixture, in [0, 1]."""

    alpha: float
    recall: RecallBothWays

    def values(self) -> dict[str, float]:
        """One name each, for JSON; `mean_recall` is that of both directions."""
        return {"alpha": self.alpha, **self.recall.values(), "mean_recall": self.recall.mean}


def open_ends(
    zeroshot: str, finetuned: str, *, vision: str | None = None, text: str | None = None, output: str | None = None
) -> Ends:
    """Opens both; vision, text: the towers of weights that leave them open. output: where a mixture is to be written.

    Raises CheckpointError naming the first tensor that differs, or holds NaN or infinity, and CnClipError, before any
    work, for an output that is one of them or cannot be written.
    """
    if output is not None:
        refuse_inputs(output, [zeroshot, finetuned])
        replaceable(output)
    opened = []
    for name in (zeroshot, finetuned):
        model, checkpoint = open_model(name, vision=vision, text=text)
        opened.append(replace(checkpoint, state_dict=dict(model.state_dict())))
        check_finite(opened[-1])
    check_same_tensors(*opened)
    return Ends(opened[0], opened[1], model)


def interpolate(zeroshot: dict[str, Tensor], finetuned: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) * zeroshot + alpha * finetuned, exact at 0 and 1; whole numbers are those of the fine-tuned model."""
    return {
        name: zeroshot[name].lerp(value, alpha) if value.is_floating_point() else value
        for name, value in finetuned.items()
    }


def write_mixture(path: str, ends: Ends, alpha: float, *, names: Mapping[str, str]) -> None:
    """A checkpoint of the mixture with epoch, step and name of the fine-tuned one; names: of both, to be kept in it."""
    write_checkpoint(path, ends.mixture(alpha), ends.finetuned, wise_ft={"alpha": alpha, **names})


def recall_along(
    ends: Ends,
    alphas: Sequence[float],
    folder: str,
    *,
    batch_size: int,
    num_workers: int | None,
    precision: str,
    device: str,
    context_length: int,
) -> list[Point]:
    """Recall of both directions at each alpha, on the whole split whose LMDB folder is given."""
    pictures = LmdbPictures(f"{folder}/{IMAGES}")
    split = read_split(PairStore(f"{folder}/{PAIRS}"), pictures.ids)
    points = []
    sizes: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
    with progress(len(alphas) * len(pictures), both("张", "pictures"), both("编码图片", "encoding pictures")) as bar:
        for alpha in alphas:
            ends.model.load_state_dict(ends.mixture(alpha), assign=True)
            encoder = Encoder(ends.model, device=device, precision=precision, context_length=context_length)
            images_ND, texts_TD = split_features(encoder, pictures, split, **sizes, advance=bar.advance)
            points.append(Point(alpha, recall_from_features(images_ND, texts_TD, split.pairs)))
    return points


def split_features(
    encoder: Encoder,
    pictures: LmdbPictures,
    split: Split,
    *,
    batch_size: int,
    num_workers: int | None,
    advance: Callable[[int], object] | None = None,
) -> tuple[Rows, Rows]:
    """Unit rows of all pictures (N, D) and texts (T, D) of a split; advance: called with the size of each batch."""
    rows, names = [], pictures.ids
    sizes: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
    for rows_BD in picture_rows(pictures, encoder, names=names, what="image_id", **sizes):
        rows.append(rows_BD)
        if advance is not None:
            advance(len(rows_BD))
    return np.concatenate(rows), encoder.encode_texts(split.texts, batch_size=batch_size)

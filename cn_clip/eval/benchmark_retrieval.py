"""Runs a retrieval benchmark: features, top-k and recall by the functions of those commands; `evaluate` calls it."""

import contextlib
import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from cn_clip.command import Speaker
from cn_clip.errors import DataError
from cn_clip.evaluation.benchmark_sets import RetrievalSet, Split
from cn_clip.evaluation.model_choice import ModelChoice
from cn_clip.files import atomic_write, settle
from cn_clip.zoo_results import Query

if TYPE_CHECKING:
    from cn_clip.eval.extract_features import Options as FeatureOptions

NUM_FOUND = 10
JOB_FILE = "features.json"


def measure(
    data: Path, benchmark: RetrievalSet, split: Split, given: ModelChoice, output: Path, say: Speaker
) -> Mapping[Query, Mapping[str, float]]:
    """Recall in percent, by direction: `r1`, `r5`, `r10`, `mean_recall`; of a dataset that `check` has passed.

    `output` exists and receives features, predictions and annotations; features of the same job that are there are
    taken as they are, and a killed extraction goes on. Raises CnClipError naming a text or picture that is faulty.
    """
    texts = data / f"{split}_texts.jsonl"
    options = _feature_options(data, texts, split, given, output)
    _extract(options, output / f"{split}_{JOB_FILE}", say)
    annotation = output / f"{split}_texts.jsonl"
    with atomic_write(annotation, "wb") as stream, texts.open("rb") as source:
        shutil.copyfileobj(source, stream)
    return {query: _recall(options, annotation, query, given.device, say) for query in benchmark.queries}


def check(data: Path, split: Split) -> None:
    """Raises DataError saying which part of a split is missing or cannot be scored, and what to do."""
    from cn_clip.data.pictures import LmdbPictures
    from cn_clip.evaluation.annotations import read_relevant

    images, texts = data / "lmdb" / split / "imgs", data / f"{split}_texts.jsonl"
    settle(data)
    if not data.is_dir():
        raise DataError(f"no such folder; expected a dataset with lmdb/{split}/imgs and {split}_texts.jsonl", at=data)
    if not texts.is_file():
        raise DataError(
            f"{split}_texts.jsonl is missing; expected the texts of the split with their image_ids", at=data
        )
    if not images.is_dir():
        raise DataError(f"{_without_lmdb(data, split)}", at=data)
    num_images, num_texts, has_answer = len(LmdbPictures(images)), 0, False
    for _, found in read_relevant(str(texts)):
        num_texts, has_answer = num_texts + 1, has_answer or bool(found)
    if not has_answer:
        raise DataError("no text has image_ids, so nothing can be scored; choose a split with answers", at=texts)
    for count, what in ((num_images, "pictures"), (num_texts, "texts")):
        if count < NUM_FOUND:
            raise DataError(f"{split} has {count} {what}; recall at 10 needs at least {NUM_FOUND}", at=data)


def _without_lmdb(data: Path, split: Split) -> str:
    if (data / f"{split}_imgs.tsv").is_file():
        return (
            f"lmdb/{split}/imgs is missing; 先打包 / pack the tsv and jsonl files first: "
            f"cn-clip dataset build --data_dir {data} --splits {split}"
        )
    return f"neither lmdb/{split}/imgs nor {split}_imgs.tsv is there; expected the pictures of the split"


def _feature_options(data: Path, texts: Path, split: Split, given: ModelChoice, output: Path) -> "FeatureOptions":
    from cn_clip.eval import extract_features

    return extract_features.Options(
        extract_image_feats=True,
        extract_text_feats=True,
        image_data=str(data / "lmdb" / split / "imgs"),
        text_data=str(texts),
        image_feat_output_path=str(output / f"{split}_imgs.img_feat.npz"),
        text_feat_output_path=str(output / f"{split}_texts.txt_feat.npz"),
        img_batch_size=given.batch_size,
        text_batch_size=given.batch_size,
        context_length=given.chosen.context_length,
        num_workers=given.num_workers,
        decode=given.decode,
        model=given.chosen.model,
        precision=given.precision,
        backend=given.backend,
        vision_model=given.chosen.vision,  # type: ignore[arg-type]  # zoo names its towers as plain strings
        text_model=given.chosen.text,  # type: ignore[arg-type]
        device=given.device,
        num_threads=given.num_threads,
        download_root=given.download_root,
        json=True,
    )


def _extract(options: "FeatureOptions", job_file: Path, say: Speaker) -> None:
    """Computes both feature files unless they are there and `job_file` says that they are of this job."""
    from cn_clip.clip import opening
    from cn_clip.features import extraction
    from cn_clip.features.store import job_text

    quiet = Speaker(quiet=True)
    encoder = opening.open_encoder(options.chosen, quiet)
    identity = opening.identity(options.chosen, encoder)
    works = extraction.open_works(options, quiet)
    job = job_text({work.kind: extraction.job_of(options, work, encoder, identity) for work in works})
    files = [Path(options.output_file(kind)[0]) for kind in options.kinds]
    if all(file.is_file() for file in files):
        if job_file.is_file() and job_file.read_text(encoding="utf-8") == job:
            say(f"特征已有，不再计算 / the features are there: {', '.join(map(str, files))}")
            return
        say.note(f"{job_file.parent}: 其中的特征属于别的设置，重新计算 / features of another job; computing again")
    say("提取特征 / extracting features…")
    job_file.unlink(missing_ok=True)
    with contextlib.redirect_stdout(io.StringIO()):
        extraction.extract(options, encoder, identity, quiet)
    with atomic_write(job_file) as stream:
        stream.write(job)


def _recall(
    options: "FeatureOptions", annotation: Path, query: Query, device: str, say: Speaker
) -> Mapping[str, float]:
    from cn_clip import ranks
    from cn_clip.evaluation import annotations, retrieval
    from cn_clip.features.files import read_features

    say("以文搜图 / texts find pictures…" if query == "text" else "以图搜文 / pictures find texts…")
    mark = "" if query == "text" else "tr_"
    predictions = annotation.with_name(annotation.name.replace("texts.jsonl", f"{mark}predictions.jsonl"))
    queries, gallery = (
        read_features(options.output_file(side)[0], annotations.FIELDS[side].query_id)
        for side in (query, retrieval.OTHER[query])
    )
    predicted: annotations.Ranking = {}
    with atomic_write(predictions) as stream:
        for query_id, found in retrieval.search(queries, gallery, NUM_FOUND, device=ranks.choose_device(device)):
            stream.write(annotations.line_of(query, query_id, found))
            predicted[query_id] = found
    standard = str(annotation)
    if query == "text":
        relevant = annotations.read_annotation(standard)
    else:
        standard, _, relevant = annotations.turn_round(standard)
    annotations.check_complete(relevant, predicted, query=query)
    result = annotations.score(relevant, predicted, query=query, standard=standard, submit=predictions)
    scores: dict[str, float] = result["scoreJson"]
    return {name: scores[name] for name in ("r1", "r5", "r10", "mean_recall")}

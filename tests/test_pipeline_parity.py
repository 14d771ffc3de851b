"""The retrieval pipeline as users run it, beside the reference's recording on photos with Chinese captions.

Recorded by tools/golden/record_pipeline.py; the photos are for research only, so they are not in the repository.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import re
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pipeline_weights
import pytest
import torch
from dataset_files import REPOSITORY
from numpy.typing import NDArray

from cn_clip import zoo
from cn_clip.clip.model import CLIP
from cn_clip.eval import (
    evaluation,
    evaluation_tr,
    extract_features,
    make_topk_predictions,
    make_topk_predictions_tr,
    transform_ir_annotation_to_tr,
)
from cn_clip.features.files import Features, read_features, write_features
from cn_clip.preprocess import build_lmdb_dataset

GOLDEN = pipeline_weights.GOLDEN
DATA = Path(os.environ.get("CN_CLIP_TEST_DATA", REPOSITORY.parent / "shared" / "data")) / "flickr8k-cn"
FEATURES = ["--image-feats=valid_imgs.img_feat.jsonl", "--text-feats=valid_texts.txt_feat.jsonl", "--top-k=10"]
IMAGE_FILE, TEXT_FILE = "valid_imgs.img_feat.jsonl", "valid_texts.txt_feat.jsonl"
Rankings: TypeAlias = list[tuple[int, list[int]]]
Main: TypeAlias = Callable[[list[str]], None]


class Golden(NamedTuple):
    """A recording: what was printed and written, and every some-th feature."""

    content: dict[str, Any]
    arrays: dict[str, NDArray[Any]]


def read_golden(part: str) -> Golden:
    content = json.loads(gzip.decompress((GOLDEN / f"{part}.json.gz").read_bytes()))
    return Golden(content, dict(np.load(GOLDEN / f"{part}.npz")))


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- the reference's own features: no photos needed


@pytest.mark.parametrize("part", pipeline_weights.PARTS)
def test_top_k_of_the_reference_features_equals_the_reference_byte_for_byte(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    golden = read_golden(part)
    digests, arrays = golden.content["sample_sha256"], golden.arrays
    write_features(IMAGE_FILE, "image_id", [(arrays["image_ids"].tolist(), arrays["images"])])
    write_features(TEXT_FILE, "text_id", [(arrays["text_ids"].tolist(), arrays["texts"])])
    make_topk_predictions.main([*FEATURES, "--output=valid_predictions.jsonl"])
    make_topk_predictions_tr.main([*FEATURES, "--output=valid_tr_predictions.jsonl"])
    # The feature files too: ids, spaces and every digit are written as the reference writes them.
    assert {path.name: sha256(path) for path in tmp_path.iterdir()} == digests


# --- the whole pipeline on photos


def write_photos(folder: Path, part: str) -> None:
    num_pictures, _, _ = pipeline_weights.PARTS[part]
    with (DATA / "valid_imgs.tsv").open() as source:
        lines = list(islice(source, num_pictures))
    (folder / "valid_imgs.tsv").write_text("".join(lines))
    ids = {int(line.split("\t")[0]) for line in lines}
    with (DATA / "valid_texts.jsonl").open(encoding="utf-8") as source:
        kept = [line for line in source if ids.issuperset(json.loads(line)["image_ids"])]
    (folder / "valid_texts.jsonl").write_text("".join(kept), encoding="utf-8")


def save_weights(path: Path) -> None:
    with torch.device("meta"):
        model = CLIP.from_config(zoo.model_config(pipeline_weights.VISION, pipeline_weights.TEXT))
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    tensors = {name: torch.from_numpy(value) for name, value in pipeline_weights.state_dict(shapes).items()}
    named = {f"module.{name}": value for name, value in tensors.items()}
    torch.save({"epoch": 0, "step": 0, "name": "golden", "state_dict": named}, path)


class Run(NamedTuple):
    """A folder in which all six scripts have run, and what each of them printed."""

    part: str
    folder: Path
    golden: Golden
    printed: dict[str, str]


@pytest.fixture(scope="module", params=["first", pytest.param("all", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    if not (DATA / "valid_imgs.tsv").exists():
        pytest.skip(f"{DATA} is not there; set CN_CLIP_TEST_DATA to the folder that holds flickr8k-cn")
    folder = tmp_path_factory.mktemp("pipeline")
    write_photos(folder, request.param)
    save_weights(folder / "model.pt")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        printed = {name: printed_by(main, arguments) for name, (main, arguments) in PIPELINE.items()}
    return Run(request.param, folder, read_golden(request.param), printed)


def printed_by(main: Main, arguments: list[str]) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        main(arguments)
    return printed.getvalue()


# The commands of the guides, in their order; file names are relative, as in the recording.
PIPELINE: dict[str, tuple[Main, list[str]]] = {
    "build": (build_lmdb_dataset.main, ["--data_dir=.", "--splits=valid"]),
    "extract": (
        extract_features.main,
        [
            *("--extract-image-feats", "--extract-text-feats", "--resume=model.pt", "--device=cpu"),
            *("--image-data=lmdb/valid/imgs", "--text-data=valid_texts.jsonl", "--context-length=52"),
            *("--img-batch-size=32", "--text-batch-size=32"),
            *(f"--vision-model={pipeline_weights.VISION}", f"--text-model={pipeline_weights.TEXT}"),
        ],
    ),
    "topk": (make_topk_predictions.main, [*FEATURES, "--output=valid_predictions.jsonl"]),
    "topk_tr": (make_topk_predictions_tr.main, [*FEATURES, "--output=valid_tr_predictions.jsonl"]),
    "transform": (transform_ir_annotation_to_tr.main, ["--input=valid_texts.jsonl"]),
    "recall": (evaluation.main, ["valid_texts.jsonl", "valid_predictions.jsonl", "result.json"]),
    "recall_tr": (evaluation_tr.main, ["valid_texts.tr.jsonl", "valid_tr_predictions.jsonl", "tr_result.json"]),
}


def test_features_have_the_ids_of_the_reference_and_its_values_within_1e_4(run: Run) -> None:
    _, image_step, text_step = pipeline_weights.PARTS[run.part]
    images = read_features(run.folder / IMAGE_FILE, "image_id")
    texts = read_features(run.folder / TEXT_FILE, "text_id")
    for name, ours, step in (("image", images, image_step), ("text", texts, text_step)):
        assert ours.ids[::step] == run.golden.arrays[f"{name}_ids"].tolist()
        error = np.linalg.norm(ours.vectors[::step] - run.golden.arrays[f"{name}s"], axis=1).max()
        print(f"{name} features: largest relative error {error:.1e}")
        assert error < 1e-4  # of unit rows


def read_rankings(path: Path) -> Rankings:
    records = [json.loads(line) for line in path.read_text().splitlines()]
    return [(query, found) for query, found in (record.values() for record in records)]


def swaps(ours: Rankings, theirs: Any, queries: Features, gallery: Features) -> list[float]:
    """How far the scores of the two ids lie apart, for each place where the rankings differ."""
    assert [query for query, _ in ours] == [query for query, _ in theirs]
    query_rows = {one: queries.vectors[row].astype(np.float64) for row, one in enumerate(queries.ids)}
    gallery_rows = {one: gallery.vectors[row].astype(np.float64) for row, one in enumerate(gallery.ids)}
    return [
        abs(float(query_rows[query] @ (gallery_rows[a] - gallery_rows[b])))
        for (query, found), (_, recorded) in zip(ours, theirs, strict=True)
        for a, b in zip(found, recorded, strict=True)
        if a != b
    ]


@pytest.mark.parametrize(
    ("predictions", "recorded"),
    [("valid_predictions.jsonl", "predictions"), ("valid_tr_predictions.jsonl", "tr_predictions")],
)
def test_found_ids_are_those_of_the_reference_but_for_equal_scores(run: Run, predictions: str, recorded: str) -> None:
    images = read_features(run.folder / IMAGE_FILE, "image_id")
    texts = read_features(run.folder / TEXT_FILE, "text_id")
    ours = read_rankings(run.folder / predictions)
    pair = (texts, images) if recorded == "predictions" else (images, texts)
    gaps = swaps(ours, run.golden.content[recorded], *pair)
    places = sum(len(found) for _, found in ours)
    print(f"{predictions}: {len(gaps)} of {places} places differ, by at most {max(gaps, default=0):.1e} in score")
    assert max(gaps, default=0) < 1e-5
    assert len(gaps) <= places / 500


def test_results_of_recall_are_the_reference_bytes(run: Run) -> None:
    for name, recorded in (("result.json", "result"), ("tr_result.json", "tr_result")):
        assert (run.folder / name).read_text() == run.golden.content[recorded]


def test_annotation_turned_round_is_the_reference_file(run: Run) -> None:
    assert sha256(run.folder / "valid_texts.tr.jsonl") == run.golden.content["sha256"]["valid_texts.tr.jsonl"]


@pytest.mark.parametrize("script", PIPELINE)
def test_the_scripts_print_every_line_of_the_reference(run: Run, script: str) -> None:
    def lines(printed: str) -> list[str]:
        printed = printed.replace("./lmdb", "lmdb")  # the reference joins paths as text
        return [re.sub(r"from .*(?=/model_configs/)", "", line) for line in printed.splitlines()]

    ours, theirs = lines(run.printed[script]), lines(run.golden.content["printed"][script])
    assert [line for line in theirs if line not in ours] == []
    if script != "extract":  # ours reads the checkpoint before it opens the data
        assert [line for line in ours if line in theirs] == theirs

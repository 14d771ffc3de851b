"""One text, or one picture, gives one vector, by whichever way it comes in."""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from dataset_files import jsonl_line, tsv_line, write_split
from serving import data_url, served

import cn_clip.clip as clip
from cn_clip import cli
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.inputs import ChineseTexts
from cn_clip.data.datasets import LmdbPairs, PairDataset
from cn_clip.data.lmdb_store import IMAGES, PAIRS, PairStore
from cn_clip.data.picture_sets import LmdbPictures
from cn_clip.data.splits import read_split
from cn_clip.demo import emoji
from cn_clip.eval import shard_worker, zeroshot
from cn_clip.eval.feature_files import read_features
from cn_clip.retrieval.store import Index, open_index

MODEL = ("--device", "cpu", "--num-threads", "1")
TOLERANCE = {"rtol": 0, "atol": 2e-6}
# As users write them, and the rows of ids that Chinese-CLIP's scripts make of them.
TEXTS = [
    "“生日”蛋糕",
    "A “Red” HEART",
    "İstanbul“",
    "全角ＡＢＣ，１２３",
    "零\u200b宽",
    "行\u2028内",
    "   ",
    "猫" * 300,
]
PREPARED = [text.lower().replace("“", '"').replace("”", '"') for text in TEXTS]


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder("Emoji-Tiny", device="cpu")


@pytest.fixture(scope="module")
def expected(encoder: Encoder) -> np.ndarray:
    """Unit rows of the texts, computed from what Chinese-CLIP's scripts make of them."""
    model, _ = clip.load_from_name("Emoji-Tiny", device="cpu")
    with torch.no_grad():
        rows = model.encode_text(clip.tokenize(PREPARED))
    return (rows / rows.norm(dim=-1, keepdim=True)).numpy()


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split with a picture for each text, and the LMDB of it."""
    folder = tmp_path_factory.mktemp("data")
    pictures = [emoji.png(one) for one in emoji.load()[: len(TEXTS)]]
    write_split(
        folder,
        [tsv_line(number, data) for number, data in enumerate(pictures)],
        [jsonl_line(number, text, [number]) for number, text in enumerate(TEXTS)],
        split="valid",
    )
    quietly("dataset", "build", "--data_dir", folder, "--splits", "valid")
    return folder


def quietly(*args: object) -> dict[str, Any]:
    """Runs a command in this process and returns the JSON that it prints."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        cli.main([*map(str, args), "--json"])
    return dict(json.loads(out.getvalue()))


@pytest.fixture(scope="module")
def index(data: Path) -> Index:
    folder = data / "one.index"
    quietly("index", "build", data / "lmdb" / "valid", "--output", folder, "--model", "Emoji-Tiny")
    return open_index(folder)


@pytest.fixture(scope="module")
def client(encoder: Encoder, index: Index) -> Iterator[httpx.Client]:
    with served(encoder, index=index) as address, httpx.Client(base_url=address, timeout=60) as client:
        yield client


def post(client: httpx.Client, route: str, **fields: Any) -> Any:
    answer = client.post(f"/v1/{route}", json={"model": "tiny", **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def vectors(data: Any) -> np.ndarray:
    return np.array([one["embedding"] for one in data], dtype=np.float32)


# --- texts


def test_the_text_transform_prepares_and_tokenize_stays_bare() -> None:
    assert ChineseTexts(52).rows(TEXTS) == ChineseTexts(52).rows(PREPARED)
    assert ChineseTexts(52).rows(["“猫”"]) == ChineseTexts(52).rows(['"猫"'])
    assert clip.tokenize(["“猫”"]).tolist() != clip.tokenize(['"猫"']).tolist()


def test_the_encoder_gives_the_vectors_of_the_scripts(encoder: Encoder, expected: np.ndarray) -> None:
    np.testing.assert_allclose(encoder.encode_texts(TEXTS), expected, **TOLERANCE)


@pytest.mark.parametrize("suffix", ["jsonl", "npz", "parquet"])
def test_features_gives_them(data: Path, expected: np.ndarray, suffix: str, tmp_path: Path) -> None:
    if suffix == "parquet":
        pytest.importorskip("pyarrow")
    output = tmp_path / f"texts.{suffix}"
    texts = ("--text-data", data / "valid_texts.jsonl", "--text-feat-output-path", output)
    quietly("features", "--extract-text-feats", *texts, "--resume", "Emoji-Tiny", *MODEL)
    np.testing.assert_allclose(read_features(output, "text_id").vectors, expected, **TOLERANCE)


def test_workers_of_ray_give_them(data: Path, encoder: Encoder, expected: np.ndarray) -> None:
    part = shard_worker.TextPart(list(enumerate(TEXTS)))
    np.testing.assert_allclose(shard_worker.text_rows(encoder, part, batch_size=3), expected, **TOLERANCE)


def test_the_service_gives_them(client: httpx.Client, expected: np.ndarray) -> None:
    np.testing.assert_allclose(vectors(post(client, "embeddings", input=TEXTS)), expected, **TOLERANCE)
    for text, row in zip(TEXTS, expected, strict=True):
        np.testing.assert_allclose(vectors(post(client, "embeddings", input=text))[0], row, **TOLERANCE)


def test_search_scores_with_them_on_the_command_line_and_over_http(
    client: httpx.Client, index: Index, expected: np.ndarray
) -> None:
    for text, row in zip(TEXTS, expected, strict=True):
        wanted = {hit.id: hit.score for hit in index.search(row[None], len(TEXTS))[0]}
        over_http = {hit["id"]: hit["score"] for hit in post(client, "search", query=text, k=len(TEXTS))}
        assert over_http == pytest.approx(wanted, abs=2e-6)
        if text.strip():  # an empty query is a slip of the hand
            found = quietly("search", index.place, text, "--k", len(TEXTS), *MODEL)
            assert {hit["id"]: hit["score"] for hit in found["hits"]} == pytest.approx(wanted, abs=2e-6)


def test_classifiers_are_made_of_them(client: httpx.Client, encoder: Encoder, expected: np.ndarray) -> None:
    labels = TEXTS[:4]
    np.testing.assert_allclose(zeroshot.classifier(encoder, labels, ["{}"]), expected[:4], **TOLERANCE)
    picture = emoji.png(emoji.load()[0])
    wanted = expected[:4] @ encoder.encode_images([picture])[0]
    found = post(client, "classify", image=data_url(picture), labels=labels, templates=["{}"])
    assert {one["index"]: one["cosine"] for one in found} == pytest.approx(dict(enumerate(wanted.tolist())), abs=2e-6)


def test_training_and_validation_read_the_ids_of_them(data: Path) -> None:
    texts, split = ChineseTexts(52), data / "lmdb" / "valid"
    pairs = PairDataset(LmdbPairs(split), lambda image: torch.zeros(1), texts)
    assert [pairs[number].tokens.tolist() for number in range(len(pairs))] == clip.tokenize(PREPARED).tolist()
    whole = read_split(PairStore(split / PAIRS), LmdbPictures(split / IMAGES).ids)
    assert texts.rows(whole.texts) == texts.rows(PREPARED)

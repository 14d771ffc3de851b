"""Vectors that are cut: of models that were trained so, alike in every backend, in features, an index, the service."""

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from serving import served

from cn_clip import cli
from cn_clip.clip import Encoder, load_from_name, marks
from cn_clip.clip.weights.checkpoint import read_checkpoint
from cn_clip.demo import emoji
from cn_clip.errors import CheckpointError, ConfigError

TEXTS = ["苹果", "太阳", "笑脸"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint that says that its vectors may be cut at 64 and 128 of 256 numbers."""
    path = tmp_path_factory.mktemp("cut") / "cut.pt"
    state = {f"module.{name}": value for name, value in load_from_name("Emoji-Tiny")[0].state_dict().items()}
    torch.save({"epoch": 1, "step": 2, "name": "cut", "state_dict": state, "matryoshka": [64, 128]}, path)
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emoji.export(tmp_path_factory.mktemp("pictures"), count=12).parent


def run(capsys: pytest.CaptureFixture[str], *args: object) -> Any:
    cli.main([*map(str, args), "--json"])
    return json.loads(capsys.readouterr().out)


def beginnings(rows: Any, count: int) -> Any:
    part = rows[:, :count].astype(np.float64)
    return part / np.linalg.norm(part, axis=1, keepdims=True)


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_rows_are_the_beginnings_of_whole_ones_scaled_to_length_1(backend: Any, model: Path, tmp_path: Path) -> None:
    if backend == "onnx":
        pytest.importorskip("onnxruntime")
    settings: dict[str, Any] = {"device": "cpu", "backend": backend, "download_root": tmp_path}
    whole, cut = Encoder(model, **settings), Encoder(model, dimensions=64, **settings)
    assert (whole.dimensions, cut.dimensions, cut.embed_dim, whole.cut, cut.cut) == (256, 64, 64, None, 64)
    images = [emoji.png(one) for one in emoji.load()[:5]]
    np.testing.assert_allclose(cut.encode_texts(TEXTS), beginnings(whole.encode_texts(TEXTS), 64), atol=1e-6)
    np.testing.assert_allclose(cut.encode_images(images), beginnings(whole.encode_images(images), 64), atol=1e-6)
    assert cut.encode_texts([]).shape == (0, 64)
    assert Encoder(model, dimensions=256, **settings).cut is None, "which is all of it"


def test_tensors_are_cut_too_and_another_process_cuts_alike(model: Path) -> None:
    cut = Encoder(model, dimensions=128, device="cpu")
    rows = cut.encode_texts(TEXTS, output="torch")
    assert isinstance(rows, torch.Tensor)
    np.testing.assert_allclose(rows.numpy(), cut.encode_texts(TEXTS), atol=1e-6)
    import pickle

    again = pickle.loads(pickle.dumps(cut))
    np.testing.assert_array_equal(again.encode_texts(TEXTS), cut.encode_texts(TEXTS))


@pytest.mark.parametrize(
    ("name", "dimensions", "reason"),
    [
        (None, 100, "dimensions 100: .* have 256 numbers, and were trained to be cut at 64, 128 alone"),
        (None, 257, "dimensions 257: .* cut at 64, 128 alone"),
        ("Emoji-Tiny", 64, "dimensions 64: .* have 256 numbers, and were not trained to be cut"),
    ],
)
def test_what_a_model_was_not_trained_for_is_refused(
    name: str | None, dimensions: int, reason: str, model: Path
) -> None:
    with pytest.raises(ConfigError, match=reason):
        Encoder(name or model, dimensions=dimensions, device="cpu")


def test_the_dimensions_stay_with_the_weights(model: Path, tmp_path: Path) -> None:
    Encoder(model, device="cpu").save(tmp_path / "saved.safetensors")
    assert read_checkpoint(tmp_path / "saved.safetensors").matryoshka == (64, 128)
    whole = load_from_name(str(model), device="cpu")[0]
    Encoder(whole, device="cpu").save(tmp_path / "memory.pt")
    assert Encoder(tmp_path / "memory.pt", device="cpu").facts.matryoshka == (64, 128)
    torch.save({**torch.load(model, weights_only=True), "matryoshka": ["a"]}, tmp_path / "damaged.pt")
    with pytest.raises(CheckpointError, match=r"matryoshka is \['a'\], expected a list of whole numbers"):
        read_checkpoint(tmp_path / "damaged.pt")


def test_marks_of_fingerprints() -> None:
    both = marks.marked("ab12", merge_tokens=8, dimensions=64)
    assert both == "ab12+merge8+first64"
    assert (marks.merged_in(both), marks.cut_in(both)) == (8, 64)
    assert (marks.merged_in("ab12+first64"), marks.cut_in("ab12+first64")) == (0, 64)
    assert (marks.merged_in("ab12"), marks.cut_in("ab12+merge8")) == (0, None)


def test_an_index_keeps_to_its_dimensions(
    model: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = tmp_path / "small.index"
    built = ("--model", model, "--device", "cpu")
    run(capsys, "index", "build", pictures, "--output", index, "--dimensions", 64, *built)
    facts = run(capsys, "index", "info", index)
    assert facts["model"]["embed_dim"] == 64
    assert facts["model"]["fingerprint"].endswith("+first64")
    found = run(capsys, "search", index, "苹果", "--device", "cpu")
    assert len(found["hits"]) == 10
    with pytest.raises(SystemExit, match="1"):
        cli.main(["search", str(index), "苹果", "--dimensions", "128", "--device", "cpu"])
    assert "--dimensions 128: the vectors have 64 numbers; leave it out" in capsys.readouterr().err
    run(capsys, "index", "add", index, pictures, "--device", "cpu")


def test_features_are_cut_and_those_of_other_dimensions_are_others(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    emoji.write_dataset(tmp_path / "data")
    texts = tmp_path / "data" / "valid_texts.jsonl"
    flags = ["--extract-text-feats", "--text-data", texts, "--resume", model, "--device", "cpu", "--dimensions", "64"]
    run(capsys, "features", *flags, "--text-feat-output-path", tmp_path / "texts.npz")
    with np.load(tmp_path / "texts.npz") as arrays:
        assert arrays["features"].shape[1] == 64
        np.testing.assert_allclose(np.linalg.norm(arrays["features"], axis=1), 1, atol=1e-6)


def test_the_service_gives_what_is_asked_for(model: Path) -> None:
    encoder = Encoder(model, device="cpu")
    whole = encoder.encode_texts(TEXTS)
    with served(encoder) as address, httpx.Client(base_url=address) as client:
        name = client.get("/v1/models").json()["data"][0]["id"]
        body: dict[str, Any] = {"model": name, "input": TEXTS, "dimensions": 64}
        answer = client.post("/v1/embeddings", json=body)
        assert answer.status_code == 200
        rows = np.array([one["embedding"] for one in answer.json()["data"]])
        np.testing.assert_allclose(rows, beginnings(whole, 64), atol=1e-6)
        refused = client.post("/v1/embeddings", json={**body, "dimensions": 100})
        assert refused.status_code == 400
        assert "the model has any of 64, 128, 256 and cannot give 100" in refused.text

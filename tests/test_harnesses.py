"""MTEB and CLIP_benchmark measure models of this package, and find the recall that `cn-clip evaluate` finds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_files import REPOSITORY, jsonl_line, picture, tsv_line, write_split

from cn_clip import cli
from cn_clip.clip.encoder import Encoder
from cn_clip.demo import emoji
from cn_clip.errors import ConfigError, DataError

pytestmark = [
    pytest.mark.harnesses,
    pytest.mark.filterwarnings("ignore:.*ill-defined"),  # scikit-learn's, of classes that were never named
]
DATA = Path(os.environ.get("CN_CLIP_TEST_DATA", REPOSITORY.parent / "shared" / "data")) / "flickr8k-cn"
NUM_PICTURES = 40


@pytest.fixture(scope="module")
def emojis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split of pictures with one or two texts each, as `cn-clip evaluate flickr30k-cn` reads it."""
    folder = tmp_path_factory.mktemp("split")
    shown = emoji.load()[:NUM_PICTURES]
    images = [tsv_line(one.number, emoji.png(one)) for one in shown]
    texts = [jsonl_line(one.number, one.name, [one.number]) for one in shown]
    texts += [jsonl_line(10_000 + one.number, "、".join(one.tags), [one.number]) for one in shown[:15]]
    write_split(folder, images, texts, split="test")
    cli.main(["dataset", "build", "--data_dir", str(folder), "--splits", "test"])
    return folder


def measured(folder: Path, benchmark: str, split: str, output: Path, *more: str) -> dict[str, dict[str, float]]:
    """What `cn-clip evaluate` measures, in percent."""
    flags = ["--model", "Emoji-Tiny", "--device", "cpu", "--split", split, "--output", str(output), *more]
    cli.main(["evaluate", benchmark, "--data", str(folder), *flags])
    found: dict[str, dict[str, float]] = json.loads((output / "result.json").read_text(encoding="utf-8"))["measured"]
    return found


def recalls_of_mteb(folder: Path, benchmark: str, split: str) -> dict[str, dict[str, float]]:
    import mteb as package

    from cn_clip.evaluation import mteb

    both_ways = mteb.tasks(benchmark, folder, split=split)
    names = dict(zip(("text", "image"), both_ways, strict=True))
    encoder = mteb.MtebEncoder("Emoji-Tiny", device="cpu")
    return {
        query: mteb.recalls_of(package.evaluate(encoder, task, cache=None, show_progress_bar=False).task_results[0])
        for query, task in names.items()
    }


def recalls_of_clip_benchmark(folder: Path, split: str) -> dict[str, dict[str, float]]:
    from clip_benchmark.metrics import zeroshot_retrieval

    from cn_clip.evaluation import clip_benchmark

    model, transform, tokenizer = clip_benchmark.load("Emoji-Tiny")
    pairs = clip_benchmark.RetrievalPairs(folder, split, transform)
    loader = torch.utils.data.DataLoader(pairs, batch_size=64, collate_fn=pairs.collate)
    found = zeroshot_retrieval.evaluate(model, loader, tokenizer, "cpu", amp=False, recall_k_list=[1, 5, 10])
    names = {"text": "image", "image": "text"}  # it calls a direction by what is found
    return {
        query: {f"r{k}": 100 * found[f"{side}_retrieval_recall@{k}"] for k in (1, 5, 10)}
        for query, side in names.items()
    }


def check_alike(folder: Path, benchmark: str, split: str, output: Path) -> None:
    ours = measured(folder, benchmark, split, output)
    theirs = recalls_of_mteb(folder, benchmark, split), recalls_of_clip_benchmark(folder, split)
    for query in ("text", "image"):
        for k in ("r1", "r5", "r10"):
            values = [ours[query][k], *(one[query][k] for one in theirs)]
            print(query, k, *(f"{value:.4f}" for value in values))
            # MTEB keeps five digits of the share, three of the percents.
            assert max(values) - min(values) < 1e-3, (query, k, values)


def test_one_recall_by_all_three(emojis: Path, tmp_path: Path) -> None:
    check_alike(emojis, "flickr30k-cn", "test", tmp_path)
    assert 5 < measured(emojis, "flickr30k-cn", "test", tmp_path)["text"]["r1"] < 100


def test_one_recall_by_all_three_on_photos(tmp_path: Path) -> None:
    if not DATA.is_dir():
        pytest.skip(f"{DATA} is not there; set CN_CLIP_TEST_DATA to the folder that holds flickr8k-cn")
    data = tmp_path / "flickr8k-cn"
    data.mkdir()
    for name in ("valid_imgs.tsv", "valid_texts.jsonl"):
        (data / name).symlink_to(DATA / name)
    cli.main(["dataset", "build", "--data_dir", str(data), "--splits", "valid"])
    check_alike(data, "flickr30k-cn", "valid", tmp_path / "out")


# --- MTEB


def test_the_encoder_gives_the_rows_of_encoder_and_its_cosines() -> None:
    from mteb.models import EncoderProtocol

    from cn_clip.evaluation.mteb import MtebEncoder

    adapter, encoder = MtebEncoder("Emoji-Tiny", device="cpu"), Encoder("Emoji-Tiny", device="cpu")
    assert isinstance(adapter, EncoderProtocol)
    images = [emoji_image(number) for number in range(3)]
    rows = adapter.encode([{"image": images[:2]}, {"image": images[2:]}], task_metadata=None, hf_split="", hf_subset="")
    np.testing.assert_allclose(rows, encoder.encode_images(images), atol=1e-6)
    texts = adapter.encode([{"text": ["苹果", "太阳"]}])
    np.testing.assert_allclose(texts, encoder.encode_texts(["苹果", "太阳"]), atol=1e-6)
    of_both = adapter.encode([{"text": ["苹果", "太阳"], "image": images[:2]}])
    np.testing.assert_allclose(of_both, texts + rows[:2], atol=1e-6)
    expected = encoder.similarity(texts, rows)
    np.testing.assert_allclose(adapter.similarity(2 * texts, torch.from_numpy(rows)).numpy(), expected, atol=1e-6)
    pairs = adapter.similarity_pairwise(texts, rows[:2]).numpy()
    np.testing.assert_allclose(pairs, np.diag(expected[:, :2]), atol=1e-6)
    with pytest.raises(DataError, match=r"batch of \['audio'\]; expected image or text"):
        adapter.encode([{"audio": [1]}])


def emoji_image(number: int) -> Any:
    import io

    from PIL import Image

    return Image.open(io.BytesIO(emoji.png(emoji.load()[number]))).convert("RGB")


def test_the_model_card_says_what_the_model_is() -> None:
    from cn_clip.evaluation.mteb import MtebEncoder

    meta = MtebEncoder("Emoji-Tiny", device="cpu").mteb_model_meta
    assert (meta.name, meta.modalities, meta.embed_dim) == ("cn_clip/Emoji-Tiny", ["image", "text"], 256)


def test_classification_by_mteb_is_that_of_one_template(tmp_path: Path) -> None:
    import mteb as package

    from cn_clip.clip.templates import load_templates
    from cn_clip.evaluation import mteb
    from cn_clip.evaluation.benchmark_sets import class_names

    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]
    for label in range(10):
        folder = tmp_path / "test" / f"{label:03d}"
        folder.mkdir(parents=True)
        for number, colour in enumerate(colours):
            (folder / f"{number}.png").write_bytes(picture(tuple(min(one + 20 * label, 255) for one in colour)))
    (task,) = mteb.tasks("MNIST", tmp_path)
    result = package.evaluate(
        mteb.MtebEncoder("Emoji-Tiny", device="cpu"), task, cache=None, show_progress_bar=False
    ).task_results[0]
    encoder = Encoder("Emoji-Tiny", device="cpu")
    rows = encoder.class_rows([one.chinese for one in class_names("mnist")], load_templates("mnist")[:1])
    paths = sorted((tmp_path / "test").rglob("*.png"))
    found = np.argmax(encoder.encode_images(paths) @ rows.T, axis=1)
    expected = np.mean(found == [int(path.parent.name) for path in paths])
    assert result.scores["test"][0]["accuracy"] == pytest.approx(expected, abs=1e-9)


def test_tasks_say_what_is_missing(tmp_path: Path) -> None:
    from cn_clip.evaluation import mteb

    with pytest.raises(ConfigError, match="no benchmark 'mug'; expected one of: muge"):
        mteb.tasks("mug", tmp_path)
    with pytest.raises(DataError, match=r"valid_texts\.jsonl is missing"):
        mteb.tasks("muge", tmp_path)
    with pytest.raises(ConfigError, match="mnist is measured on its test pictures"):
        mteb.tasks("mnist", tmp_path, split="valid")


# --- CLIP_benchmark


def test_its_command_line_takes_models_of_this_package(tmp_path: Path) -> None:
    shown = "from clip_benchmark import models; print(models.TYPE2FUNC['cn_clip'].__module__)"
    command = f"import cn_clip.evaluation.clip_benchmark as one; one.register(); one.register(); {shown}"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    run: dict[str, Any] = {"capture_output": True, "text": True, "check": True, "env": environment, "cwd": tmp_path}
    out = subprocess.run([sys.executable, "-c", command], **run)
    assert out.stdout.split() == ["cn_clip.evaluation.clip_benchmark"]
    out = subprocess.run([sys.executable, "-m", "cn_clip.evaluation.clip_benchmark", "eval", "--help"], **run)
    assert "cn_clip" in out.stdout


def test_towers_and_tokens_are_those_of_encoder() -> None:
    from cn_clip.evaluation import clip_benchmark

    model, transform, tokenizer = clip_benchmark.load("Emoji-Tiny")
    encoder = Encoder("Emoji-Tiny", device="cpu")
    np.testing.assert_allclose(
        model.encode_text(tokenizer(["苹果", "太阳"])).numpy(), encoder.encode_texts(["苹果", "太阳"]), atol=1e-6
    )
    image = emoji_image(0)
    pixels = transform(image)[None]
    np.testing.assert_allclose(model.encode_image(pixels).numpy(), encoder.encode_images([image]), atol=1e-6)

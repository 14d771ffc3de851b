"""Emoji-Tiny, the model that comes with the package: its file, its card, and what it finds among unseen drawings."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

import cn_clip
from cn_clip import zoo
from cn_clip.clip import Encoder, load_from_name
from cn_clip.clip.weights import hub
from cn_clip.demo import emoji
from cn_clip.retrieval.recall import recall_from_features

ROOT = Path(__file__).resolve().parent.parent
ENTRY = zoo.BUNDLED["Emoji-Tiny"]
CARD = zoo.BUNDLED_DIR / "MODEL_CARD.md"
WAYS = ("text_to_image", "image_to_text")


@pytest.fixture(scope="module")
def metadata() -> dict[str, str]:
    with safe_open(ENTRY.path, framework="pt") as file:
        content: dict[str, str] = file.metadata()
        return content


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder("Emoji-Tiny", device="cpu")


@pytest.fixture(scope="module")
def pictures() -> list[emoji.Emoji]:
    return emoji.load("twemoji")


@pytest.fixture(scope="module")
def gallery(encoder: Encoder, pictures: list[emoji.Emoji]) -> Any:
    return encoder.encode_images([one.picture for one in pictures])


def test_the_file_stays_below_25_megabytes() -> None:
    assert 10_000_000 < ENTRY.path.stat().st_size <= 25_000_000


def test_the_file_says_what_it_is_and_where_it_comes_from(metadata: dict[str, str]) -> None:
    assert (metadata["name"], metadata["vision_model"], metadata["text_model"]) == (
        "Emoji-Tiny",
        ENTRY.vision,
        ENTRY.text,
    )
    assert metadata["licence"].startswith("MIT")
    assert metadata["cn_clip"] == cn_clip.__version__
    assert int(metadata["seed"]) >= 0
    assert "twemoji" in metadata["not_seen"].split()
    assert "twemoji" not in metadata["data"].split()


def test_it_loads_by_name_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a bundled model must not be downloaded")

    monkeypatch.setattr(hub, "download", refuse)
    model, transform = load_from_name("Emoji-Tiny", device="cpu", download_root=str(tmp_path))
    assert (model.resolution, transform.resolution, model.training) == (64, 64, False)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert list(tmp_path.iterdir()) == []


def test_recall_on_the_drawings_it_has_not_seen_is_that_of_the_file_and_of_the_card(
    encoder: Encoder, pictures: list[emoji.Emoji], gallery: Any, metadata: dict[str, str]
) -> None:
    texts = encoder.encode_texts([one.name for one in pictures])
    found = recall_from_features(gallery, texts, [(n, n) for n in range(len(pictures))])._asdict()
    said = json.loads(metadata["twemoji"])
    card = CARD.read_text(encoding="utf-8")
    for way in WAYS:
        measured = [100 * found[way].at[k] for k in (1, 5, 10)]
        noted = [said[way][f"r{k}"] for k in (1, 5, 10)]
        assert measured == pytest.approx(noted, abs=0.3), way  # a rank may turn on another processor's rounding
        row = re.search(rf"^\|[^|]*`{way}`[^|]*\|(.*)\|$", card, re.MULTILINE)
        assert row, way
        assert [float(cell) for cell in row[1].split("|")] == noted


@pytest.mark.parametrize("page", ["docs/serving.md", "docs/en/serving.md"])
def test_the_cosines_of_the_page_on_serving_are_those_of_the_model(
    page: str, encoder: Encoder, pictures: list[emoji.Emoji], gallery: Any
) -> None:
    scores = gallery @ encoder.encode_texts([one.name for one in pictures]).T
    others = scores[~np.eye(len(pictures), dtype=bool)]
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.search(rf"{len(pictures):,} (?:张 )?Twemoji.*?(0\.\d+).*?(0\.\d+).*?(0\.\d+)", text)
    assert found, page
    measured = [float(np.median(np.diag(scores))), float(np.median(others)), float(np.quantile(others, 0.95))]
    assert [float(one) for one in found.groups()] == pytest.approx(measured, abs=0.006)


# Each phrase is no emoji's name; one of the pictures named must be among the first five.
PHRASES: dict[str, set[str]] = {
    "下雨天": {"雨伞", "雷阵雨", "下雨", "晴转雨"},
    "想吃水果": {"樱桃", "桃", "菠萝", "西瓜", "蓝莓"},
    "加班好累": {"累死了", "累"},
    "小猫": {"猫脸", "猫"},
    "坐飞机去旅行": {"飞机", "小型飞机"},
    "弹钢琴": {"音乐键盘"},
    "夏天吃冰淇淋": {"冰淇淋", "圆筒冰激凌", "刨冰"},
}


@pytest.mark.parametrize("phrase", PHRASES)
def test_a_free_phrase_finds_a_fitting_picture_among_its_first_five(
    phrase: str, encoder: Encoder, pictures: list[emoji.Emoji], gallery: Any
) -> None:
    assert phrase not in {one.name for one in pictures}
    scores = (encoder.encode_texts([phrase]) @ gallery.T)[0]
    first = {pictures[n].name for n in np.argsort(-scores)[:5]}
    assert first & PHRASES[phrase], first


def test_the_models_command_lists_it_with_its_file_after_the_published_ones() -> None:
    command = [sys.executable, "-m", "cn_clip", "models", "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    listed = json.loads(done.stdout)["models"]
    assert [model["name"] for model in listed] == [*zoo.PUBLISHED, *zoo.QA_CLIP, "Emoji-Tiny"]
    last = listed[-1]
    assert (last["bundled"], last["path"], last["repository"]) == (True, str(ENTRY.path), None)
    assert not any(model["bundled"] for model in listed[:-1])


def test_the_card_names_every_vendor_learned_from_and_its_licence(metadata: dict[str, str]) -> None:
    card = CARD.read_text(encoding="utf-8")
    for vendor in metadata["data"].split():
        row = re.search(rf"^\| `{vendor}` \|.*$", card, re.MULTILINE)
        assert row, vendor
        assert re.search("Apache-2.0|MIT|CC BY 4.0", row[0]), vendor

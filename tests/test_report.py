"""The report: its numbers by hand, its page as a browser would read it, and what it says where something is missing."""

import base64
import functools
import json
import re
from datetime import datetime
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from dataset_files import REPOSITORY, jsonl_line, run_script, tsv_line, write_split
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Template
from PIL import Image
from tiny_models import tiny_model, tiny_pixels

from cn_clip.clip import tokenizer
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.visual import ModifiedResNet, VisualTransformer
from cn_clip.demo import emoji
from cn_clip.errors import DataError
from cn_clip.eval import evaluation, extract_features, make_topk_predictions
from cn_clip.evaluation import zeroshot
from cn_clip.preprocess import build_lmdb_dataset
from cn_clip.report import findings, page
from cn_clip.report import main as report
from cn_clip.report.run_folder import read_logs, read_run
from cn_clip.retrieval.recall import KS, recall_from_features

HOSTILE = '<script>alert("1")</script>&amp;\u202e的猫'
METRICS = [
    {"step": 0, "kind": "valid", "loss": 3.5, "text_to_image_mean_recall": 0.10, "image_to_text_mean_recall": 0.20},
    {"step": 10, "kind": "train", "loss": 3.0, "lr": 1e-4, "samples_per_second": 100.0, "peak_memory_gib": 1.5},
    {"step": 20, "kind": "train", "loss": None, "lr": 2e-4, "samples_per_second": 140.0, "peak_memory_gib": 1.25},
    {
        "step": 20,
        "kind": "valid",
        "loss": 2.5,
        "text_to_image_r1": 0.25,
        "text_to_image_mean_recall": 0.5,
        "image_to_text_mean_recall": 0.25,
    },
    {"step": 30, "kind": "train", "loss": 2.0, "lr": 1e-4, "samples_per_second": 120.0, "peak_memory_gib": 1.25},
    {"step": 30, "kind": "valid", "loss": 2.5, "text_to_image_mean_recall": 0.5, "image_to_text_mean_recall": 0.25},
]
# Lines of Chinese-CLIP: no speed, no recall.
OLD_LOG = """\
2024-01-02,03:04:05 | INFO | Rank 0 | Params:
2024-01-02,03:04:05 | INFO | Rank 0 |   lr: 5e-05
2024-01-02,03:04:05 | INFO | Rank 0 |   vision_model: ViT-B-16
2024-01-02,03:04:15 | INFO | Rank 0 | Global Steps: 10/30 | Train Epoch: 1 [640/1920 (33%)] | Loss: 2.500000 | \
Image2Text Acc: 10.00 | Text2Image Acc: 12.00 | Data Time: 0.010s | Batch Time: 0.500s | LR: 0.000050 | \
logit_scale: 4.605 | Global Batch Size: 64
some other line
2024-01-02,03:04:25 | INFO | Rank 0 | Global Steps: 20/30 | Train Epoch: 1 [1280/1920 (67%)] | Loss: nan | \
Data Time: 0.010s | Batch Time: 0.250s | LR: 0.000040 | logit_scale: 4.605 | Global Batch Size: 64
2024-01-02,03:04:35 | INFO | Rank 0 | Validation Result (epoch 1 @ 20 steps) | Valid Loss: 1.250000 | \
Image2Text Acc: 40.00 | Text2Image Acc: 42.50 | logit_scale: 4.605 | Valid Batch Size: 64
"""


class Reader(HTMLParser):
    """The elements of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def all(self, tag: str, style: str = "") -> list[dict[str, str | None]]:
        return [found for name, found in self.elements if name == tag and style in (found.get("class") or "")]


def drawn(template: str, **values: object) -> str:
    """What a template makes of the values, with the macros of the report at hand."""
    return compiled(template).render(values)


@functools.cache
def compiled(template: str) -> Template:
    macros = "{% from 'words.html' import picture, quoted %}{% from 'charts.html' import confusion_chart, line_chart %}"
    return page.environment().from_string(macros + template)


# --- markup


@settings(deadline=None)  # the first example compiles the templates
@given(st.text())
def test_text_never_becomes_markup(text: str) -> None:
    read = Reader(drawn('<p title="{{ text }}">{{ quoted(text, 10000) }}</p>', text=text))
    assert [name for name, _ in read.elements] == ["p", "bdi"]
    shown = re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", text)
    assert read.text == shown
    assert read.elements[0][1] == {"title": shown}
    read.text.encode()


def test_values_are_written_as_html_has_them() -> None:
    assert drawn("{{ quoted(text, 3) }}{{ quoted(text) }}", text="一二三四") == "<bdi>一二…</bdi><bdi>一二三四</bdi>"
    assert drawn("{{ a }} {{ b }} {{ c }} {{ d }}", a=1.004, b=2.5, c=100, d="1.004") == "1 2.5 100 1.004"
    assert [page.percent(share) for share in (0, 0.0123, 0.375, 0.9996)] == ["0 %", "1.23 %", "37.5 %", "100 %"]
    assert [page.duration(seconds) for seconds in (12.4, 185, 3725)] == ["12 s", "3 min 05 s", "1 h 02 min"]


# --- charts


def test_ticks_are_round_and_hold_the_values() -> None:
    assert page.ticks(0, 100, count=5) == [0, 25, 50, 75, 100]
    assert page.ticks(0, 1600, count=5, whole=True) == [0, 500, 1000, 1500, 2000]
    assert page.ticks(0, 3, count=5, whole=True) == [0, 1, 2, 3]
    np.testing.assert_allclose(page.ticks(2.1, 2.9, count=5), [2.0, 2.2, 2.4, 2.6, 2.8, 3.0])
    np.testing.assert_allclose(page.ticks(-0.3, -0.3, count=5), [-0.3, -0.275], atol=1e-9)
    assert page.ticks(0, 0, count=5)[0] == 0


@given(st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_ticks_never_leave_out_an_end(low: float, span: float) -> None:
    found = page.ticks(low, low + span, count=5)
    step = found[1] - found[0]
    assert 2 <= len(found) <= 9
    assert found[0] <= low + 1e-6 * step
    assert found[-1] >= low + span - 1e-6 * step


def test_thinning_keeps_every_peak() -> None:
    values = np.zeros(10_000)
    values[[123, 4567]] = 9.0, -9.0
    steps, kept = page.thinned((np.arange(10_000.0), values))
    assert len(steps) <= page.MOST_POINTS
    assert (steps[kept == 9], steps[kept == -9]) == (123, 4567)
    assert (np.diff(steps) > 0).all()


def test_a_curve_goes_through_its_places() -> None:
    line = page.Line("loss", (np.array([0.0, 50.0, 100.0]), np.array([0.0, 10.0, 5.0])), "blue")
    chart = page.line_chart([line], form=str, from_zero=True)
    read = Reader(drawn("{{ line_chart(chart, '损失', 'loss') }}", chart=chart))
    (curve,) = read.all("polyline")
    assert curve["class"] == "line blue"
    assert curve["points"] == "54,216 260,12 466,114"  # 54 to 466 across, 216 up to 12
    assert read.all("svg")[0]["aria-label"] == "loss: 0.0 → 5.0"
    assert page.line_chart([], form=str) is None
    assert not drawn("{{ line_chart(none, '损失', 'loss') }}").strip()


# --- the run folder


def write_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in METRICS), encoding="utf-8")
    (folder / "params_2026-01-01-00-00-00.txt").write_text("lr: 1\n", encoding="utf-8")
    params = f"lr: 0.0001\nvision_model: ViT-Tiny-64\nname: {HOSTILE}\nresume: None\n"
    (folder / "params_2026-01-02-00-00-00.txt").write_text(params, encoding="utf-8")
    return folder


def test_a_run_is_read_from_its_metrics(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run"))
    assert (run.source, run.last_step, run.num_infinite) == ("metrics.jsonl", 30, 1)
    assert run.params["lr"] == "0.0001"
    steps, losses = run.points("train", "loss")
    assert (steps.tolist(), losses.tolist()) == ([10, 30], [3.0, 2.0])
    assert run.points("valid", "text_to_image_r1", factor=100)[1].tolist() == [25.0]
    assert run.best() == (20, 0.375)  # of equals the first
    assert (run.log.max_steps, run.log.begin, run.log.end, run.checkpoints) == (None, None, None, [])


def test_a_log_of_chinese_clip_says_the_same(tmp_path: Path) -> None:
    path = tmp_path / "out_2024-01-02-03-04-05.log"
    path.write_text(OLD_LOG, encoding="utf-8")
    run = read_run(tmp_path)
    assert run.source == path.name
    assert run.params == {"lr": "5e-05", "vision_model": "ViT-B-16"}
    assert (run.log.max_steps, run.log.global_batch, run.log.seconds, run.num_infinite) == (30, 64, 30.0, 1)
    assert (run.log.begin, run.log.end) == (datetime(2024, 1, 2, 3, 4, 5), datetime(2024, 1, 2, 3, 4, 35))
    assert run.records == [
        {"step": 10, "kind": "train", "loss": 2.5, "lr": 5e-5, "logit_scale": 4.605, "samples_per_second": 128.0},
        {"step": 20, "kind": "train", "loss": None, "lr": 4e-5, "logit_scale": 4.605, "samples_per_second": 256.0},
        {"step": 20, "kind": "valid", "loss": 1.25, "image_to_text_acc": 0.4, "text_to_image_acc": 0.425},
    ]
    assert run.best() is None


def test_a_log_that_chinese_clip_wrote_is_read_whole() -> None:
    # cn_clip 1.6.0, by tools/golden/record_log.py; it validates twice at the end of an epoch.
    run = read_run(REPOSITORY / "tests" / "golden" / "training_log")
    assert run.source == "out_2026-11-22-00-33-35.log"
    assert (run.log.max_steps, run.log.global_batch, run.log.seconds, run.last_step) == (4, 4, 18.0, 4)
    assert (run.log.begin, run.log.end) == (datetime(2026, 11, 22, 0, 33, 36), datetime(2026, 11, 22, 0, 33, 54))
    steps, losses = run.points("train", "loss")
    assert (steps.tolist(), losses.tolist()) == ([1, 2, 3, 4], [1.407055, 1.398269, 1.379691, 1.391590])
    assert run.points("train", "lr")[1].tolist() == [1e-5, 1e-5, 8e-6, 3e-6]
    assert run.points("train", "samples_per_second")[1].round(3).tolist() == [1.305, 1.656, 2.044, 2.036]
    assert run.points("train", "logit_scale")[1].tolist() == [2.659] * 4
    values = {"kind": "valid", "image_to_text_acc": 0.25, "text_to_image_acc": 0.25}
    assert run.validations() == [{**values, "step": 2, "loss": 1.386325}, {**values, "step": 4, "loss": 1.386338}]
    written = (run.folder / "params_2026-11-22-00-33-35.txt").read_text(encoding="utf-8").splitlines()
    assert run.params == run.log.params == dict(line.split(": ", 1) for line in written)
    assert len(run.params) == 54


def test_lines_of_speed_and_recall_belong_to_the_step_before(tmp_path: Path) -> None:
    path = tmp_path / "out_1.log"
    more = """\
2024-01-02,03:04:36 | INFO | Rank 0 | Validation Recall (epoch 1 @ 20 steps) | 9 images, 9 texts | \
Text2Image R@1: 30.00 R@5: 60.00 R@10: 90.00 | Image2Text R@1: 0.00 R@5: 0.00 R@10: 0.00
2024-01-02,03:04:37 | INFO | Rank 0 | Global Steps: 30/30 | Train Epoch: 1 [1920/1920 (100%)] | Loss: 2.000000 | \
Data Time: 0.010s | Batch Time: 0.000s | LR: 0.000000 | logit_scale: 4.605 | Global Batch Size: 64
2024-01-02,03:04:37 | INFO | Rank 0 | Speed: 70.5 samples/s | Peak Memory: 2.25 GiB
"""
    path.write_text(OLD_LOG + more, encoding="utf-8")
    validation, step = read_logs([path]).records[-2:]
    recalls = {name: round(value, 9) for name, value in validation.items() if "_r" in name or "recall" in name}
    assert recalls == {
        **{"text_to_image_r1": 0.3, "text_to_image_r5": 0.6, "text_to_image_r10": 0.9},
        **{"image_to_text_r1": 0.0, "image_to_text_r5": 0.0, "image_to_text_r10": 0.0},
        **{"text_to_image_mean_recall": 0.6, "image_to_text_mean_recall": 0.0},
    }
    assert (step["samples_per_second"], step["peak_memory_gib"]) == (70.5, 2.25)


def test_steps_done_again_after_a_restart_count_once(tmp_path: Path) -> None:
    first, second = tmp_path / "out_1.log", tmp_path / "out_2.log"
    first.write_text(OLD_LOG, encoding="utf-8")
    again = [line for line in OLD_LOG.splitlines() if "Steps: 20/30" in line]
    second.write_text("\n".join(again).replace("Loss: nan", "Loss: 1.000000"), encoding="utf-8")
    records = read_logs([first, second]).records
    assert [(record["step"], record["kind"], record["loss"]) for record in records] == [
        (10, "train", 2.5),
        (20, "train", 1.0),
    ]


def test_a_run_that_began_anew_under_the_name_is_read_without_the_one_before(tmp_path: Path) -> None:
    first, second = tmp_path / "out_1.log", tmp_path / "out_2.log"
    first.write_text(OLD_LOG, encoding="utf-8")
    again = [line for line in OLD_LOG.splitlines() if "Steps: 10/30" in line or "vision_model" in line]
    second.write_text("\n".join(again).replace("2024-01-02", "2024-02-03"), encoding="utf-8")
    alone, both = read_logs([second]), read_logs([first, second])
    assert both == alone
    assert both.begin is not None
    assert (both.begin.month, both.params, len(both.records)) == (2, {"vision_model": "ViT-B-16"}, 1)
    nothing = tmp_path / "out_0.log"  # refused before its first step
    nothing.write_text("2020-01-01,00:00:00 | INFO | Rank 0 | Params:\n", encoding="utf-8")
    assert read_logs([nothing, second]) == alone


def test_another_run_of_the_name_is_not_added_whatever_its_first_step(tmp_path: Path) -> None:
    def log(started: str, steps: range, *said: str) -> Path:
        path = tmp_path / f"out_{started}.log"
        messages = ["  checkpoint_path: logs/waves/checkpoints", *said]
        messages += [
            f"Global Steps: {step}/900 | Train Epoch: 1 | Loss: 2.5 | Batch Time: 0.5s | LR: 0.1 | logit_scale: 4.6 "
            "| Global Batch Size: 64 |"
            for step in steps
        ]
        lines = [f"{started},00:00:{second:02d} | INFO | Rank 0 | {one}" for second, one in enumerate(messages)]
        path.write_text("\n".join(lines), encoding="utf-8")
        (tmp_path / f"params_{started}.txt").write_text(f"seed: {started[-1]}\n", encoding="utf-8")
        return path

    first = log("2024-01-01", range(10, 60, 10))
    own = "=> loaded checkpoint 'logs/waves/checkpoints/epoch_latest.pt' (epoch 1 @ 20 steps)"
    resumed = log("2024-01-02", range(30, 100, 10), own)
    whole = read_logs([first, resumed])
    assert [record["step"] for record in whole.records] == list(range(10, 100, 10))
    assert (whole.names, whole.seconds) == ([first.name, resumed.name], 5.0 + 8.0)
    # Logged less often than the first, or begun with the checkpoint of another run: not the same run.
    other = "=> loaded checkpoint 'logs/old/checkpoints/epoch3.pt' (epoch 3 @ 80 steps)"
    for said in ([], [other]):
        anew = log("2024-01-03", range(90, 190, 50), *said)
        assert read_logs([first, resumed, anew]) == read_logs([anew])
    refused = log("2024-01-04", range(0))  # before its first step
    assert read_logs([first, resumed, refused]) == whole
    run = read_run(tmp_path)
    assert (run.source, run.params["seed"], run.last_step) == ("out_2024-01-03.log", "3", 140)


# --- retrieval


def test_ranks_by_hand() -> None:
    images = np.eye(4, dtype=np.float32)
    texts = np.array([[0.9, 0.3, 0.2, 0.1], [0.9, 0.3, 0.2, 0.1], [0.5, 0.5, 0.5, 0.5], [0, 0, 0.8, 0.6]], np.float32)
    # The first text has pictures 1 and 3, the others one; all pictures are alike to the third text.
    ranking = findings.rank_all(images, texts, [(3, 0), (1, 0), (0, 1), (2, 2), (2, 3)])
    assert ranking.ranks_M.tolist() == [2, 1, 3, 1]
    assert ranking.right_M.tolist() == [1, 0, 2, 2]
    np.testing.assert_allclose(ranking.scores_M, [0.3, 0.9, 0.5, 0.8])
    assert ranking.order_M.tolist() == [1, 3, 0, 2]  # leads of 0.6 and 0.2, then ranks 2 and 3


@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(1, 12))
def test_ranks_give_the_recall_that_the_package_computes(seed: int, num_images: int, num_texts: int) -> None:
    random = np.random.default_rng(seed)
    images = random.integers(-1, 2, (num_images, 3)).astype(np.float32)  # many equal scores
    texts = random.integers(-1, 2, (num_texts, 3)).astype(np.float32)
    pairs = [(int(random.integers(num_images)), text) for text in range(num_texts) for _ in range(2)]
    ranks = findings.rank_all(images, texts, pairs).ranks_M
    expected = recall_from_features(images, texts, pairs).text_to_image.at
    assert {k: float((ranks <= k).mean()) for k in KS} == pytest.approx(dict(expected))


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (1, ([0], [], [])),
        (2, ([0], [], [1])),
        (3, ([0], [1], [2])),
        (7, ([0, 1], [2, 3], [6, 5])),
        (31, (list(range(8)), list(range(11, 19)), list(range(30, 22, -1)))),
    ],
)
def test_no_query_is_shown_twice(number: int, expected: tuple[list[int], list[int], list[int]]) -> None:
    assert findings.choose(list(range(number)), 8) == expected


def test_texts_in_the_same_words_are_shown_once() -> None:
    assert findings.first_of_each(np.array([2, 0, 3, 1]), ["狗", "猫", "猫", "鸟"]) == [2, 0, 3]


# --- zero-shot classification


def test_confusions_by_hand() -> None:
    probabilities = np.array(
        [[0.6, 0.4, 0], [0.3, 0.7, 0], [0.1, 0.9, 0], [0.2, 0.8, 0], [0.5, 0, 0.5], [0, 0.1, 0.9]], dtype=np.float32
    )
    targets = np.array([0, 0, 0, 1, 2, 2])
    found = findings.tally(probabilities, targets, ["猫", "狗", "鸟"], list("abcdef"), Path("test"))
    assert found.counts_CC.tolist() == [[1, 2, 0], [0, 1, 0], [1, 0, 1]]
    assert found.accuracy.top1 == 0.5
    assert found.accuracy.per_class == [pytest.approx(1 / 3), 1.0, 0.5]
    assert [(one.true, one.taken, one.count, one.sample) for one in found.mistakes] == [(0, 1, 2, "c"), (2, 0, 1, "e")]
    assert found.mistakes[0].probability == pytest.approx(0.9)


def test_of_many_classes_those_with_most_mistakes_are_drawn() -> None:
    counts = np.diag([5, 5, 5, 5])
    counts[0, 3] = 2
    counts[2, 1] = 1
    assert page.most_confused(counts, 2) == [0, 3]
    assert page.most_confused(counts, 4) == [0, 1, 2, 3]
    matrix = page.Matrix(["a", HOSTILE], [(0, 0, 5, 7), (0, 1, 2, 7), (1, 1, 5, 5)])
    drawing = Reader(drawn("{{ confusion_chart(matrix, 'said') }}", matrix=matrix))
    cells = [found for found in drawing.all("rect") if found["class"] in ("right", "wrong")]
    shares = [0.12 + 0.88 * share for share in (5 / 7, 2 / 7, 1)]
    assert [(cell["class"], float(cell["fill-opacity"] or 0)) for cell in cells] == [
        (kind, pytest.approx(share, abs=0.005)) for kind, share in zip(("right", "wrong", "right"), shares, strict=True)
    ]
    assert f"a → {HOSTILE}: 2 / 7" in drawing.text
    assert drawing.all("script") == []


def test_shares_are_of_all_pictures_of_a_class_also_of_those_taken_for_classes_not_shown() -> None:
    # Of each of 40 classes 10 pictures are right and 2 taken for its neighbour; one of class 0 for class 40, which
    # has the fewest mistakes and is left out.
    counts = np.diag([10] * 41)
    counts[range(40), [number ^ 1 for number in range(40)]] = 2
    counts[0, 40] = 1
    labels = [f"第{number}类" for number in range(41)]
    accuracy = zeroshot.Accuracy(top1=0.8, top5=None, per_class=[0.8] * 41)
    part = page.zeroshot_part(findings.Confusion(Path("test"), labels, counts, accuracy, []))
    read = Reader(page.page("t", "", {"zeroshot": part}))
    titles = [text for text in read.texts if " → " in text]
    assert titles[:2] == ["第0类 → 第0类: 10 / 13", "第0类 → 第1类: 2 / 13"]
    assert titles[2:4] == ["第1类 → 第0类: 2 / 12", "第1类 → 第1类: 10 / 12"]
    assert len(titles) == 80
    assert float(read.all("rect", "right")[0]["fill-opacity"] or 0) == pytest.approx(0.12 + 0.88 * 10 / 13, abs=0.005)


def test_long_labels_do_not_make_a_long_page() -> None:
    labels = [f"{number:02d}" + "&" * 298 for number in range(page.MOST_CLASSES)]
    cells = [(row, column, 1, 40) for row in range(len(labels)) for column in range(len(labels))]
    drawing = drawn("{{ confusion_chart(matrix, 'said') }}", matrix=page.Matrix(labels, cells))
    cut = "&" * 37 + "…"
    assert f"00{cut} → 39{cut}: 1 / 40" in Reader(drawing).texts
    # 1,600 cells of two labels of 40 characters, each five bytes as HTML, and the rectangle around them.
    assert len(drawing.encode()) < 1600 * (2 * 40 * 5 + 200)


# --- places and tokens


def test_a_region_of_a_vit_passes_the_last_layer_alone() -> None:
    model = tiny_model("vit")
    assert isinstance(model.visual, VisualTransformer)
    # Without its attention the last layer sees each token alone anyway, so both ways must agree.
    last = model.visual.transformer.resblocks[-1]
    last.attn.out_proj.weight.data.zero_()
    pixels = tiny_pixels(model, 1)[0]
    image, vectors = findings.region_vectors(model, pixels)
    with torch.inference_mode():
        patches = model.visual.conv1(pixels[None]).flatten(2).transpose(1, 2)
        tokens = torch.cat([model.visual.class_embedding.expand(1, 1, -1), patches], dim=1)
        tokens = model.visual.ln_pre(tokens + model.visual.positional_embedding).transpose(0, 1)
        tokens = model.visual.transformer(tokens)[:, 0]
        expected = F.normalize(model.visual.ln_post(tokens) @ model.visual.proj, dim=-1)
        whole = F.normalize(model.encode_image(pixels[None])[0], dim=-1)
    assert vectors.shape == (4, 4, 24)
    torch.testing.assert_close(vectors.reshape(16, 24), expected[1:])
    torch.testing.assert_close(image, whole)


def test_the_value_of_a_region_counts_in_a_vit() -> None:
    model = tiny_model("vit")
    pixels = tiny_pixels(model, 1)[0]
    last = model.visual.transformer.resblocks[-1]
    before = findings.region_vectors(model, pixels)[1]
    last.attn.in_proj_weight.data[:128] += 1.0  # queries and keys: no place looks at another
    torch.testing.assert_close(findings.region_vectors(model, pixels)[1], before)
    last.attn.in_proj_weight.data[128:] += 1.0
    assert (findings.region_vectors(model, pixels)[1] - before).abs().max() > 1e-2


def test_the_regions_of_a_resnet_add_up_to_the_picture_where_attention_is_even() -> None:
    model = tiny_model("resnet")
    assert isinstance(model.visual, ModifiedResNet)
    pool = model.visual.attnpool
    for parameter in (pool.q_proj.weight, pool.q_proj.bias):
        parameter.data.zero_()
    pool.positional_embedding.data[0] = pool.positional_embedding.data[1:].mean(dim=0)  # the query is the mean place
    pixels = tiny_pixels(model, 1)[0]
    seen: list[torch.Tensor] = []
    pool.c_proj.register_forward_hook(lambda _, inputs, output: seen.append(output))
    image, vectors = findings.region_vectors(model, pixels)
    raw = seen[-1]  # of the places, before they are made unit vectors
    assert vectors.shape == (2, 2, 24)
    torch.testing.assert_close(F.normalize(raw, dim=-1).reshape(2, 2, 24), vectors)
    torch.testing.assert_close(F.normalize(raw.mean(dim=0), dim=-1), image)


def test_a_token_counts_what_the_cosine_loses_without_it(tmp_path: Path) -> None:
    picture, encoder = emoji.load()[5], Encoder("Emoji-Tiny", num_threads=1)
    path = tmp_path / "picture.png"
    path.write_bytes(emoji.png(picture))
    view = findings.examine_pair(encoder, str(path), "红色的 CAT")
    image = encoder.encode_images([path])[0]
    cosine = encoder.encode_texts(["红色的 CAT"])[0] @ image
    assert view.similarity == pytest.approx(float(cosine), abs=1e-5)
    assert [piece for piece, _ in view.tokens] == ["红", "色", "的", "cat"]
    without = [float(encoder.encode_texts([text])[0] @ image) for text in ("色的cat", "红的cat", "红色cat", "红色的")]
    assert [drop for _, drop in view.tokens] == pytest.approx([float(cosine) - one for one in without], abs=1e-5)
    assert view.map_HW.shape == (2, 2)
    assert np.abs(view.map_HW).max() <= 1 + 1e-5
    with pytest.raises(DataError, match="no token is left"):
        findings.examine_pair(encoder, str(path), "\u200b")
    assert tokenizer.encode(["\u200b"], 52) == [[101, 102]]


def test_rows_without_each_token() -> None:
    assert findings.without_each([1, 7, 8, 2]) == [[1, 7, 8, 2], [1, 8, 2], [1, 7, 2]]


def test_bright_is_where_the_map_is_high() -> None:
    low_to_high = np.array([[0.1, 0.1], [0.1, 0.3]], dtype=np.float32)
    drawn = np.asarray(page.overlaid(Image.new("RGB", (40, 20), "black"), low_to_high)).astype(int)
    assert drawn.shape == (20, 40, 3)
    np.testing.assert_allclose(drawn[9, 19], np.array([68, 1, 84]) * page.OPACITY, atol=1)
    np.testing.assert_allclose(drawn[10, 20], np.array([253, 231, 37]) * page.OPACITY, atol=1)


# --- thumbnails


def shown(thumbnail: page.Thumbnail) -> tuple[Image.Image, int, dict[str, str | None]]:
    ((_, attributes),) = Reader(drawn("{{ picture(thumbnail, alt) }}", thumbnail=thumbnail, alt=HOSTILE)).elements
    data = base64.b64decode((attributes["src"] or "").removeprefix("data:image/jpeg;base64,"), validate=True)
    return Image.open(BytesIO(data)), len(data), attributes


def test_thumbnails_are_bounded_and_white_where_nothing_is() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 900, 3), dtype=np.uint8))
    small, size, attributes = shown(page.thumbnail(noise, side=144, num_bytes=1_000))
    assert (small.format, size <= 1_000, attributes["alt"]) == ("JPEG", True, HOSTILE)
    assert (attributes["width"], attributes["height"]) == (str(small.width), str(small.height))
    assert small.width <= 144
    whole, _, _ = shown(page.thumbnail(Image.new("RGBA", (50, 40)), side=144, num_bytes=3_000))
    assert (whole.size, whole.getpixel((25, 20))) == ((50, 40), (255, 255, 255))


# --- the command

NUM_PICTURES = 30


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A split `lmdb/valid` of 30 drawings and 31 texts, one of them hostile."""
    folder = tmp_path_factory.mktemp("dataset")
    pictures = emoji.load()[:NUM_PICTURES]
    images = [tsv_line(one.number, emoji.png(one)) for one in pictures]
    texts = [jsonl_line(place, one.name, [one.number]) for place, one in enumerate(pictures)]
    texts.append(jsonl_line(99, HOSTILE, [pictures[0].number]))
    write_split(folder, images, texts, split="valid")
    build_lmdb_dataset.main(["--data_dir", str(folder), "--splits", "valid"])
    return folder


def write_classes(folder: Path) -> Path:
    for number, chosen in enumerate((slice(0, 4), slice(4, 7))):
        (folder / f"{number:03d}").mkdir(parents=True)
        for one in emoji.load()[chosen]:
            (folder / f"{number:03d}" / f"{one.number}.png").write_bytes(emoji.png(one))
    (folder.parent / "labels.txt").write_text(f"{HOSTILE}\n时钟\n", encoding="utf-8")
    return folder


def recall_by_commands(dataset: Path) -> dict[str, float]:
    """What `features`, `topk` and `recall` give."""
    images, texts = dataset / "images.jsonl", dataset / "texts.jsonl"
    standard, found, result = dataset / "valid_texts.jsonl", dataset / "found.jsonl", dataset / "result.json"
    extract_features.main(
        [
            *("--extract-image-feats", "--extract-text-feats", "--resume", "Emoji-Tiny", "--num-threads", "1"),
            *("--image-data", str(dataset / "lmdb" / "valid" / "imgs"), "--text-data", str(standard)),
            *("--image-feat-output-path", str(images), "--text-feat-output-path", str(texts)),
        ]
    )
    make_topk_predictions.main(
        ["--image-feats", str(images), "--text-feats", str(texts), "--top-k", "10", "--output", str(found)]
    )
    evaluation.main([str(standard), str(found), str(result)])
    scores: dict[str, float] = json.loads(result.read_text(encoding="utf-8"))["scoreJson"]
    return scores


def test_the_page_holds_everything_that_was_asked_for(
    tmp_path: Path, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = write_run(tmp_path / "runs" / HOSTILE.replace("/", "∕"))
    classes = write_classes(tmp_path / "test")
    picture = next(classes.rglob("*.png"))
    output = tmp_path / "report.html"
    arguments = [
        *(str(run), "--checkpoint", "Emoji-Tiny", "--num-threads", "1", "--output", str(output), "--json"),
        *("--data", str(dataset / "lmdb" / "valid"), "--top-k", "3"),
        *("--zeroshot", str(classes), "--labels", str(tmp_path / "labels.txt"), "--dataset", "emoji"),
        *("--picture", str(picture), "--text", HOSTILE, "时钟"),
    ]
    scores = recall_by_commands(dataset)
    capsys.readouterr()
    report.main(arguments)
    facts = json.loads(capsys.readouterr().out)
    written = output.read_bytes()
    assert (facts["report"], facts["bytes"]) == (str(output), len(written))
    assert facts["run"] == {
        **{"name": run.name, "source": "metrics.jsonl", "last_step": 30, "max_steps": None, "seconds": None},
        **{"last_loss": 2.0, "best_step": 20, "best_mean_recall": 0.375},
    }

    retrieval = facts["retrieval"]
    assert (retrieval["num_images"], retrieval["num_texts"]) == (NUM_PICTURES, NUM_PICTURES + 1)
    for name in ("r1", "r5", "r10", "mean_recall"):
        assert retrieval[f"text_to_image_{name}"] * 100 == pytest.approx(scores[name])
    assert [len(retrieval[group]) for group in ("best", "median", "worst")] == [8, 8, 8]
    ranks = [query["rank"] for group in ("best", "median") for query in retrieval[group]]
    assert ranks == sorted(ranks)
    assert ranks[-1] <= retrieval["worst"][-1]["rank"] <= retrieval["worst"][0]["rank"]
    assert 0 < facts["zeroshot"]["top1"] <= 1
    assert sum(one["count"] for one in facts["zeroshot"]["mistakes"]) == round(7 * (1 - facts["zeroshot"]["top1"]))
    assert [pair["text"] for pair in facts["pairs"]] == [HOSTILE, "时钟"]

    read = Reader(written.decode())
    assert [found["id"] for found in read.all("h2") if "id" in found] == ["run", "retrieval", "zeroshot", "pairs"]
    assert read.all("script") == []
    for value in (scores[name] for name in ("r1", "r5", "r10", "mean_recall")):
        assert f"{value:.2f}" in read.texts
    assert "37.5 %" in read.texts
    assert read.text.count(HOSTILE.split("&")[0]) >= 3  # setting, text of a pair, class
    articles = read.all("article", "query")
    assert len(articles) == 24
    own = sum(query["rank"] > 3 for group in ("best", "median", "worst") for query in retrieval[group])
    assert len(read.all("li", "shot")) == 24 * 3 + own
    assert len(read.all("li", "own")) == own
    assert len(read.all("li", "right")) == 24
    assert len(read.all("article", "pair")) == 2
    assert read.all("aside") == []


def test_the_page_fetches_nothing_and_is_the_same_every_time(tmp_path: Path, dataset: Path) -> None:
    pages = []
    for name in ("a.html", "b.html"):
        data = ["--data", str(dataset / "lmdb" / "valid"), "--checkpoint", "Emoji-Tiny", "--num-threads", "1"]
        report.main([*data, "--output", str(tmp_path / name)])
        pages.append((tmp_path / name).read_text(encoding="utf-8"))
    assert pages[0] == pages[1]
    read = Reader(pages[0])
    for _, attributes in read.elements:
        assert (attributes.get("src") or "data:").startswith("data:image/jpeg;base64,"[:5])
        assert (attributes.get("href") or "#").startswith("#")
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in pages[0]
    (policy,) = (found["content"] for found in read.all("meta") if "http-equiv" in found)
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:")
    assert all(found.get("alt") for found in read.all("img"))
    assert len(pages[0]) < 1_500_000
    flags = [text for text in read.texts if text.startswith("--") or text == "RUN"]
    assert flags == ["RUN", "--zeroshot FOLDER --labels FILE", "--picture FILE --text TEXT"]


TOLD = {
    "zh": ("报告：", "验证批内准确率 %（日志里没有召回率）", "训练（平滑）", "验证", "以文搜图", "以图搜文", "步"),
    "en": (
        *("report: ", "accuracy % inside validation batches (the log has no recall)"),
        *("train, smoothed", "valid", "text → image", "image → text", "step"),
    ),
}


@pytest.mark.parametrize("language", TOLD)
def test_a_run_alone_needs_no_model_and_is_told_in_the_language_of_the_reader(
    language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CN_CLIP_LANG", language)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "out_1.log").write_text(OLD_LOG, encoding="utf-8")
    output = tmp_path / "report.html"
    done = run_script("report/main.py", tmp_path / "run", "--output", output)
    assert done.returncode == 0, done.stderr
    beginning, accuracy, smoothed, valid, by_text, by_image, step = TOLD[language]
    assert done.stdout.startswith(f"{beginning}{output}")
    read = Reader(output.read_text(encoding="utf-8"))
    assert [found["id"] for found in read.all("h2") if "id" in found] == ["run"]
    assert read.all("html")[0]["lang"] == {"zh": "zh-CN", "en": "en"}[language]
    assert accuracy in read.text
    titles = [found["aria-label"] for found in read.all("svg")]
    assert titles[0] == f": 2.5 → 2.5; {smoothed}: 2.5 → 2.5; {valid}: 1.25 → 1.25"
    assert titles[1] == f"{by_text}: 42.5 → 42.5; {by_image}: 40 → 40"
    assert len(titles) == 4  # loss, accuracy, rate, speed
    assert "192" in read.texts  # samples a second: the median of 128 and 256
    assert read.texts.count(step) == len(titles)
    assert (language == "zh") == bool(re.search("[一-龥]", read.text))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "RUN: expected the folder of a run, or --checkpoint with --data"),
        (["--data", "x"], "RUN: expected the folder of a run, or --checkpoint"),
        (["run", "--checkpoint", "Emoji-Tiny"], "--checkpoint: nothing to do for it"),
        (["run", "--zeroshot", "x"], "--zeroshot and --labels: expected both or neither"),
        (["run", "--text", "x"], "--picture and --text: expected both or neither"),
        (["run", "--picture", "a", "b", "--text", "1", "2", "3"], "2 and 3; expected as many of both"),
        (["run", "--picture", "a", "--text", *"1234567890123"], "13 pairs; expected at most 12"),
        (["run", "--top-k", "11"], "--k: expected 1 to 10, got 11"),
        (["run", "--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
        (["run", "--templates", "x"], "--templates: nothing to do for it; add --zeroshot"),
        (["run", "--dataset", "emoji"], "--dataset: nothing to do for it; add --zeroshot"),
        (["run", "--k", "3"], "--k: nothing to do for it; add --data"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        report.main(arguments)
    assert stopped.value.code == 2
    assert said in re.sub(r"[\s│]+", " ", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere"], "nowhere: no such folder; expected the folder of a run"),
        (["{empty}"], "neither metrics.jsonl nor an out_*.log with a step is here"),
        (["{run}", "--data", "x"], "neither epoch_best.pt nor epoch_latest.pt is there; name a checkpoint"),
        (["--checkpoint", "hf:{empty}", "--data", "x"], "empty: only Chinese-CLIP is taken here"),
        (["{run}", "--checkpoint", "Emoji-Tiny", "--data", "{empty}"], "no built split is here"),
        (["{run}", "--output", "{empty}"], "is a folder; expected the path of a file to write"),
        (["{run}", "--output", "{run}/metrics.jsonl"], "metrics.jsonl, which it reads"),
        (["{run}", "--checkpoint", "Emoji-Tiny", "--picture", "nope.png", "--text", "猫"], "nope.png: no such file"),
        (["{run}", "--checkpoint", "Emoji-Tiny", "--data", "x", "--context-length", "5000"], "--context-length 5000"),
    ],
)
def test_what_is_missing_is_one_sentence(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, empty, output = write_run(tmp_path / "run"), tmp_path / "empty", tmp_path / "report.html"
    empty.mkdir()
    output.write_text("an earlier report", encoding="utf-8")
    given = [one.format(run=run, empty=empty) for one in arguments]
    with pytest.raises(SystemExit) as stopped:
        report.main(["--output", str(output), *given])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
    assert output.read_text(encoding="utf-8") == "an earlier report"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "report.html", "run"]


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("run/metrics.jsonl", "would overwrite"),
        ("run/curves.png", "would overwrite"),
        ("run/checkpoints/epoch_best.pt", "would overwrite"),
        ("run/checkpoints/epoch3.pt", "would overwrite"),
        ("run/tensorboard/events.out", "would overwrite"),
        ("lmdb/valid/pairs/data.mdb", "lies in"),
        ("lmdb/valid/new.html", "lies in"),
        ("test/000/1.png", "lies in"),
        ("link/000/1.png", "lies in"),
        ("test/new.html", "lies in"),
        ("folder/config.json", "lies in"),
        ("labels.txt", "would overwrite"),
    ],
)
def test_no_page_takes_the_place_of_what_is_read(
    place: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_run(Path("run"))
    for folder in ("run/checkpoints", "run/tensorboard", "lmdb/valid/pairs", "test/000", "folder"):
        Path(folder).mkdir(parents=True)
    Path("link").symlink_to("test")
    if Path(place).suffix != ".html":
        Path(place).write_text("kept", encoding="utf-8")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    inputs = ["--checkpoint", "folder", "--data", "lmdb/valid", "--zeroshot", "test", "--labels", "labels.txt"]
    with pytest.raises(SystemExit) as stopped:
        report.main(["run", *inputs, "--output", place])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert f"--output {place}: {said} " in error
    assert len(error.strip().splitlines()) == 1
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_page_in_the_folder_of_its_run_may_be_written_again(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for _ in range(2):
        report.main([str(run), "--output", str(run / "report.html")])
    assert "37.5 %" in (run / "report.html").read_text(encoding="utf-8")

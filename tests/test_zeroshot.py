"""Zero-shot classification: numbers worked by hand, the reference's result file, labels and folders, the script."""

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pipeline_weights
import pytest
import torch
import warm_python
from dataset_files import REPOSITORY, picture
from hypothesis import given
from hypothesis import strategies as st

from cn_clip import cli, zoo
from cn_clip.clip import scoring, templates
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.model import CLIP
from cn_clip.clip.tokenizer import ChineseTexts
from cn_clip.data.pictures import ClassFolders
from cn_clip.demo import emoji
from cn_clip.errors import DataError
from cn_clip.eval import zeroshot_evaluation
from cn_clip.evaluation import zeroshot

TINY = "RN-Tiny-64", "BERT-Tiny-chinese"
GOLDEN = json.loads((pipeline_weights.GOLDEN / "zeroshot.json").read_text())

# --- pure functions, by hand


class TextTable:
    """An encoder that knows the vectors of some texts."""

    texts = ChineseTexts(52)

    def __init__(self, rows: dict[str, list[float]]) -> None:
        self.rows = rows

    def encode_texts(self, texts: Sequence[str], *, batch_size: int, progress: bool) -> Any:
        return np.array([self.rows[text] for text in texts], dtype=np.float32)


def test_classifier_is_the_unit_mean_over_the_templates() -> None:
    table = TextTable({"猫 PHOTO": [1, 0], "画猫": [0, 1], "狗 PHOTO": [0.6, 0.8], "画狗": [0.6, 0.8]})
    classes = scoring.classifier(table, ["猫", "狗"], ["{} PHOTO", "画{}"])  # type: ignore[arg-type]
    np.testing.assert_allclose(classes, [[0.5**0.5, 0.5**0.5], [0.6, 0.8]], atol=1e-6)


def test_probabilities_are_the_softmax_of_100_cosines() -> None:
    images = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.6, 0.8, 0]], dtype=np.float32)
    classes = np.array([[1, 0, 0], [0.99, 0.0141, 0], [0, 1, 0]], dtype=np.float32)
    shares = scoring.probabilities(images, classes)
    e = np.e
    np.testing.assert_allclose(shares[0], [e / (1 + e), 1 / (1 + e), 0], atol=1e-6)  # logits 100, 99, 0
    np.testing.assert_allclose(shares[1], [0, 0, 1], atol=1e-6)
    np.testing.assert_allclose(shares[2], [1 / 3, 1 / 3, 1 / 3], atol=1e-6)
    assert shares[3].argmax() == 2  # 0.8 is more than 0.6
    np.testing.assert_allclose(shares.sum(axis=1), 1, atol=1e-6)


def test_accuracy_of_four_pictures_and_three_classes() -> None:
    shares = np.array([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.1, 0.8, 0.1], [0.3, 0.6, 0.1]], dtype=np.float32)
    result = zeroshot.accuracy(shares, np.array([0, 1, 1, 0]))
    assert result == zeroshot.Accuracy(top1=0.5, top5=None, per_class=[0.5, 0.5, None])


def test_top5_counts_the_five_best_of_more_classes() -> None:
    shares = np.arange(7, dtype=np.float32)[None].repeat(2, axis=0)  # the last class is the likeliest
    result = zeroshot.accuracy(shares, np.array([2, 1]))
    assert (result.top1, result.top5) == (0.0, 0.5)
    assert zeroshot.accuracy(shares[:, :5], np.array([2, 1])).top5 is None


def test_a_target_that_is_no_class_is_refused() -> None:
    with pytest.raises(DataError, match="class number 3"):
        zeroshot.accuracy(np.ones((1, 3), dtype=np.float32), np.array([3]))


# --- folders and labels


@pytest.mark.parametrize(
    ("folders", "num_labels", "numbers"),
    [
        (["000", "001", "002"], 3, [0, 1, 2]),
        (["猫", "狗"], 2, [0, 1]),  # by order
        (["001", "004"], 5, [1, 4]),  # labels without pictures
        (["0", "1", "10", "2", "3", "4", "5", "6", "7", "8", "9"], 11, [0, 1, 10, 2, 3, 4, 5, 6, 7, 8, 9]),
        (["²", "①"], 2, [0, 1]),  # no numbers: by order
    ],
)
def test_class_folders_belong_to_labels_by_number_or_by_order(
    folders: list[str], num_labels: int, numbers: list[int]
) -> None:
    assert zeroshot.class_numbers(folders, num_labels) == numbers


@pytest.mark.parametrize(
    ("folders", "num_labels"),
    [(["a", "b", "c"], 2), (["a", "b"], 3), (["000", "b"], 3), (["000", "003"], 3), (["01", "1"], 3), (["²", "0"], 9)],
)
def test_folders_that_fit_no_labels_are_refused(folders: list[str], num_labels: int) -> None:
    with pytest.raises(DataError, match=f"{len(folders)} class folders and {num_labels} labels"):
        zeroshot.class_numbers(folders, num_labels)


@pytest.mark.parametrize(
    ("folders", "faulty"),
    [
        (["1", "2", "3"], "'3'"),
        (["1", "10", *"23456789"], "'10'"),  # by order 10 would be the second
        (["001", "002"], "'002'"),
        (["1990", "2000"], "'1990'"),
        (["00", "000", "1"], "'00' and '000'"),
    ],
)
def test_numbers_that_are_not_those_of_the_labels_are_refused(folders: list[str], faulty: str) -> None:
    with pytest.raises(DataError, match=f"numbers start at 0 .*got {faulty}"):
        zeroshot.class_numbers(folders, len(folders))


@given(st.integers(1, 300))
def test_zero_padded_folders_are_the_labels_in_order(num_labels: int) -> None:
    assert zeroshot.class_numbers([f"{n:03d}" for n in range(num_labels)], num_labels) == list(range(num_labels))


def test_labels_are_read_without_byte_order_mark_and_trailing_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "label_cn.txt"
    path.write_bytes("\ufeff手风琴 \r\n飞\u2028机\r\n锚\r\n\r\n \n".encode())
    assert templates.read_labels(path) == ["手风琴", "飞\u2028机", "锚"]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("猫\n\n狗\n".encode(), "label_cn.txt:2: an empty line"),
        (b"\n\n", "no labels in it"),
        (b"", "no labels in it"),
        ("猫\n标签".encode("gbk"), "label_cn.txt:2: invalid UTF-8 at byte 0; save the file as UTF-8"),
        (None, "cannot be opened"),
    ],
)
def test_faulty_label_files_are_refused(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "label_cn.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=reason):
        templates.read_labels(path)


@pytest.mark.parametrize(
    "content",
    ["[0, 1", "{}", "[0, 3]", "[-1]", "[0.5]", "[true]", "[[0]]", "7", "[]", "[0, 1]", "[0, 1, 1]", "[0, 1, 2, 2]"],
)
def test_an_index_that_is_no_list_of_picture_numbers_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "index.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"index\.json: "):
        zeroshot.read_index(path, 3)


# --- the numbers of the reference


def test_the_result_file_and_the_accuracy_are_those_of_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline_weights.write_zeroshot(tmp_path)
    Path("mine.json").write_text(json.dumps(pipeline_weights.ZEROSHOT_TEMPLATES))
    save(Path("model.pt"), pipeline_weights.VISION, pipeline_weights.TEXT, pipeline_weights.state_dict)
    params = [line.split(": ", 1) for line in GOLDEN["printed"].splitlines() if line.startswith("  ")]
    flags = [f"--{name.strip()}={value}" for name, value in params]
    zeroshot_evaluation.main([*flags, "--templates=mine.json", "--device=cpu"])
    lines = capsys.readouterr().out.splitlines()
    expected = [line for line in GOLDEN["printed"].splitlines() if not line.startswith(("  ", "["))]
    for shown in ("Preparing zeroshot dataset.", "Use index to rearrange the logits...", "Finished."):
        assert shown in expected
        assert shown in lines
    result = [line for line in expected if line.startswith("zeroshot-top1")]
    assert result == [line for line in lines if line.startswith("zeroshot-top1")]
    theirs, ours = json.loads(GOLDEN["written"]), json.loads(Path("waves.json").read_text())
    # A cosine off by 1e-6 moves a probability by at most 100 * 1e-6 / 4.
    np.testing.assert_allclose(ours.pop("predictions"), theirs.pop("predictions"), atol=5e-5)
    assert list(ours.items()) == list(theirs.items())
    head = GOLDEN["written"].split("[[[")[0]
    assert Path("waves.json").read_text().startswith(head)


def save(path: Path, vision: str, text: str, make: Any = None) -> CLIP:
    """A checkpoint with the tensors of `make`, or random ones."""
    torch.manual_seed(5)
    with torch.device("meta" if make else "cpu"):
        model = CLIP.from_config(zoo.model_config(vision, text)).eval()
    state: dict[str, Any] = dict(model.state_dict())
    if make:
        shapes = [(name, tuple(value.shape)) for name, value in state.items()]
        state = {name: torch.from_numpy(value) for name, value in make(shapes).items()}
    named = {f"module.{name}": value for name, value in state.items()}
    torch.save({"epoch": 1, "step": 2, "name": "zeroshot", "state_dict": named}, path)
    return model


# --- the command and the script, on the emoji classes


@pytest.fixture(scope="module")
def emojis(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CLIP]:
    folder = tmp_path_factory.mktemp("zeroshot")
    few = {label: emoji.CLASSES[label] for label in ("时钟", "心", "猫脸", "圆", "正方形", "轮椅", "日文")}
    emoji.write_classification(folder / "datasets" / "emoji", few)
    return folder, save(folder / "tiny.pt", *TINY)


@pytest.fixture
def flags(emojis: tuple[Path, CLIP], tmp_path: Path) -> list[str]:
    folder = emojis[0] / "datasets" / "emoji"
    data = [f"--datapath={folder}/test", f"--label-file={folder}/label_cn.txt", "--dataset=emoji"]
    return [*data, f"--save-dir={tmp_path}", f"--resume={emojis[0]}/tiny.pt", "--num-workers=0", "--device=cpu"]


def pictures_of(folder: Path) -> list[Path]:
    return sorted((folder / "datasets" / "emoji" / "test").glob("*/*.png"))


def test_the_script_of_the_guide_writes_and_prints_the_result(emojis: tuple[Path, CLIP], tmp_path: Path) -> None:
    folder, model = emojis
    (tmp_path / "datasets").symlink_to(folder / "datasets")
    count = len(pictures_of(folder))
    (tmp_path / "index.json").write_text(json.dumps(list(range(count))[::-1]))
    script = ["bash", "run_scripts/zeroshot_eval.sh", "0", str(tmp_path), "emoji", *TINY, str(folder / "tiny.pt")]
    environment = {**os.environ, "PYTHON": warm_python.program()}
    done = subprocess.run(
        [*script, str(tmp_path / "index.json")], cwd=REPOSITORY, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    top1 = float(lines[lines.index("Result:") + 1].removeprefix("zeroshot-top1: "))
    assert lines[-1] == "Finished."
    content = json.loads((tmp_path / "save_predictions" / "emoji.json").read_text())
    shares = np.array(content.pop("predictions"))
    assert shares.shape == (1, count, 7)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert content == {
        "model_name": "CN-CLIP-RN-Tiny-64",
        "dataset_name": "emoji",
        "num_trainable_params": 0,
        "num_params": total,
        "num_visual_params": sum(parameter.numel() for parameter in model.visual.parameters()),
        "num_backbone_params": total,
        "n_shot": 0,
        "rnd_seeds": [123],
    }
    targets = np.array([int(path.parent.name) for path in pictures_of(folder)])
    assert top1 == pytest.approx((shares[0][::-1].argmax(axis=1) == targets).mean())


def test_the_script_without_arguments_shows_its_usage() -> None:
    done = subprocess.run(
        ["bash", "run_scripts/zeroshot_eval.sh"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "GPU DATAPATH DATASET VISION_MODEL TEXT_MODEL CHECKPOINT [INDEX_FILE]" in done.stderr


def test_json_has_top1_top5_and_each_class(
    flags: list[str], emojis: tuple[Path, CLIP], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["zeroshot", *flags, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert list(result) == ["zeroshot-top1", "zeroshot-top5", "per_class", "predictions"]
    shares = np.array(json.loads(Path(result["predictions"]).read_text())["predictions"][0])
    targets = np.array([int(path.parent.name) for path in pictures_of(emojis[0])])
    order = np.argsort(-shares, axis=1)
    assert result["zeroshot-top1"] == pytest.approx((order[:, 0] == targets).mean())
    assert result["zeroshot-top5"] == pytest.approx((order[:, :5] == targets[:, None]).any(axis=1).mean())
    assert [row["label"] for row in result["per_class"]] == ["时钟", "心", "猫脸", "圆", "正方形", "轮椅", "日文"]
    for number, row in enumerate(result["per_class"]):
        assert row["accuracy"] == pytest.approx((order[targets == number, 0] == number).mean())


def test_probabilities_are_those_of_the_encoder(flags: list[str], emojis: tuple[Path, CLIP], tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("一张{}的图\n{}\n", encoding="utf-8")
    zeroshot_evaluation.main([*flags, f"--templates={tmp_path}/mine.txt"])
    encoder = Encoder(emojis[1])
    labels = (emojis[0] / "datasets" / "emoji" / "label_cn.txt").read_text().split()
    texts = encoder.encode_texts([f"一张{label}的图" for label in labels]) + encoder.encode_texts(labels)
    classes = texts / np.linalg.norm(texts, axis=1, keepdims=True)
    logits = 100 * encoder.encode_images(pictures_of(emojis[0])) @ classes.T
    expected = torch.from_numpy(logits).softmax(dim=-1)
    written = json.loads((tmp_path / "emoji.json").read_text())["predictions"][0]
    np.testing.assert_allclose(written, expected, atol=5e-5)
    assert all(value == round(value, 6) for row in written for value in row)


def test_labels_may_come_twice_and_lack_pictures(
    tmp_path: Path, emojis: tuple[Path, CLIP], capsys: pytest.CaptureFixture[str]
) -> None:
    for number in (0, 2):
        (tmp_path / "test" / f"{number:03d}").mkdir(parents=True)
        (tmp_path / "test" / f"{number:03d}" / "a.png").write_bytes(picture((number * 90, 0, 0)))
    (tmp_path / "labels.txt").write_text("鹤\n飞机\n鹤\n", encoding="utf-8")
    data = [f"--datapath={tmp_path}/test", f"--label-file={tmp_path}/labels.txt", f"--save-dir={tmp_path}/new"]
    zeroshot_evaluation.main([*data, f"--resume={emojis[0]}/tiny.pt", "--num-workers=0", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert [row["label"] for row in result["per_class"]] == ["鹤", "飞机", "鹤"]
    assert result["per_class"][1]["accuracy"] is None
    assert result["zeroshot-top5"] is None
    assert (tmp_path / "new" / "imagenet.json").exists()


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--datapath=/nowhere", "/nowhere: no such folder"),
        ("--label-file=/nowhere.txt", "/nowhere.txt: cannot be opened"),
        ("--resume=/nowhere.pt", "Model /nowhere.pt not found"),
        ("--templates=/nowhere.json", "/nowhere.json: cannot be opened"),
        ("--index=/nowhere.json", "/nowhere.json: cannot be read"),
        (f"--save-dir={__file__}", "test_zeroshot.py is no folder"),
        (f"--save-dir={__file__}/below", "test_zeroshot.py is no folder"),
    ],
)
def test_wrong_paths_stop_with_status_1_and_write_nothing(
    flags: list[str], tmp_path: Path, flag: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        zeroshot_evaluation.main([*flags, flag])
    assert exit_info.value.code == 1
    assert reason in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("method", "named"), [("encode_image", "picture '"), ("encode_text", "label '")])
def test_no_accuracy_of_features_that_are_no_numbers(
    flags: list[str],
    tmp_path: Path,
    method: str,
    named: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    encode = getattr(CLIP, method)
    monkeypatch.setattr(CLIP, method, lambda self, inputs, **told: encode(self, inputs, **told) * np.nan)
    with pytest.raises(SystemExit):
        zeroshot_evaluation.main(flags)
    error = capsys.readouterr().err
    assert named in error
    assert "the model gives NaN or infinity; compute in fp32" in error
    assert not list(tmp_path.iterdir())


def test_hidden_folders_are_passed_over_and_linked_ones_count_once(tmp_path: Path) -> None:
    for name in ("a/x/1.png", "a/.trash/2.png", "a/3.png", "b/4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a" / "x" / "up").symlink_to(tmp_path / "a")
    (tmp_path / "a" / "y").symlink_to(tmp_path / "a" / "x")
    found = [(str(Path(path).relative_to(tmp_path)), label) for path, label in ClassFolders(tmp_path).samples]
    assert found == [("a/3.png", 0), ("a/x/1.png", 0), ("b/4.png", 1)]


def test_more_folders_than_labels_stop_with_both_paths_named(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "two.txt"
    path.write_text("猫\n狗\n", encoding="utf-8")
    with pytest.raises(SystemExit) as exit_info:
        zeroshot_evaluation.main([*flags, f"--label-file={path}"])
    assert exit_info.value.code == 1
    message = capsys.readouterr().err
    folder = next(flag.removeprefix("--datapath=") for flag in flags if flag.startswith("--datapath="))
    assert f"{folder} and {path}: 7 class folders and 2 labels" in message


@pytest.mark.parametrize(
    ("flag", "reason"),
    [
        ("--img-batch-size=0", "--img-batch-size: expected at least 1"),
        ("--num-workers=-1", "--num-workers: expected at least 0"),
        ("--context-length=2", "--context-length: expected at least 3"),
        ("--dataset=../x", "--dataset: expected a name"),
        ("--dataset=..", "--dataset: expected a name"),
    ],
)
def test_wrong_settings_stop_with_status_2(
    flags: list[str], flag: str, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        zeroshot_evaluation.main([*flags, flag])
    assert exit_info.value.code == 2
    assert reason in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_label_whose_texts_cancel_out_has_no_direction() -> None:
    features = np.array([[1, 0], [-1, 0], [0.6, 0.8], [0.6, 0.8]], dtype=np.float32)
    assert scoring.class_vectors(features, 2).tolist() == [[0, 0], pytest.approx([0.6, 0.8])]

"""Benchmarks by name: the data that ships, figures worked by hand, the command on small datasets."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_files import jsonl_line, picture, tsv_line, write_split
from hypothesis import given
from hypothesis import strategies as st
from tiny_families import write_family

from cn_clip import cli, zoo
from cn_clip.clip import Encoder, load_from_name
from cn_clip.clip.backends.pytorch import TorchBackend
from cn_clip.demo import emoji
from cn_clip.errors import DataError
from cn_clip.eval import compare, linear_probe
from cn_clip.eval import evaluate as evaluate_command
from cn_clip.evaluation import benchmark_sets as sets
from cn_clip.evaluation import classification, zeroshot
from cn_clip.evaluation.benchmark_sets import ClassName
from cn_clip.zoo_results import CHINESE_CLIP, README

NUM_PICTURES = 24

# --- the data that ships


def test_the_figures_are_those_of_the_published_tables() -> None:
    muge, flickr = sets.RETRIEVAL_SETS["muge"], sets.RETRIEVAL_SETS["flickr30k-cn"]
    assert [(known.split, known.queries) for known in (muge, flickr)] == [
        ("valid", ("text",)),
        ("test", ("text", "image")),
    ]
    assert [one[1:7] for one in muge.published("ViT-B-16")] == [
        ("text", "zero-shot", 52.1, 76.7, 84.4, 71.1),
        ("text", "fine-tuned", 58.4, 83.6, 90.0, 77.4),
    ]
    assert [one.recall_1 for one in flickr.published("ViT-H-14")] == [71.2, 83.8, 81.6, 95.3]
    assert [one.recall_1 for one in muge.published("QA-CLIP-RN50")] == [44.0]
    assert muge.published("Emoji-Tiny") == muge.published(None) == []
    best = {
        name: max(known.published.values()) for name, known in sets.classification_sets().items() if known.published
    }
    assert list(best.values()) == [96.0, 79.7, 51.2, 56.9, 55.1, 26.2, 49.9, 79.4, 63.5, 84.9]
    assert sets.classification_sets()["cifar-100"].published["ViT-B-16"] == 64.4
    for known in sets.classification_sets().values():
        sizes = ["RN50", "ViT-B-16", "ViT-L-14", "ViT-L-14-336", "ViT-H-14"]
        assert list(known.published) == ([] if known.title == "ImageNet-CN" else sizes)
    assert sets.classification_sets()["kitti-distance"].others == {"GIT": 22.1, "ALIGN": 41.2, "CLIP": 11.5}
    assert [one.split for one in (sets.RETRIEVAL_SETS["xtd-zh"], sets.RETRIEVAL_SETS["xm3600-zh"])] == ["test", "test"]


def test_class_names_are_as_many_as_the_classes_and_told_apart() -> None:
    counts = [10, 100, 47, 10, 7, 100, 4, 10, 2, 20, 1000]
    assert [len(sets.class_names(name)) for name in sets.classification_sets()] == counts
    for name in sets.classification_sets():
        for words in zip(*((one.original, one.chinese) for one in sets.class_names(name)), strict=True):
            assert len(set(words)) == len(words)
            assert all(word == word.strip() != "" for word in words)


@pytest.mark.parametrize(
    ("name", "number", "original", "chinese"),
    [
        ("cifar-10", 3, "cat", "猫"),
        ("cifar-100", 99, "worm", "蠕虫"),
        ("dtd", 12, "flecked", "带细小斑点的纹理"),
        ("eurosat_clip", 9, "SeaLake", "海洋或湖泊"),
        ("fer-2013", 4, "sad", "悲伤的表情"),
        ("fgvc-aircraft-2013b-variants102", 21, "A300B4", "空中客车A300B4"),
        ("kitti-distance", 3, "none", "没有汽车的道路"),
        ("mnist", 7, "7", "手写数字7"),
        ("patch-camelyon", 1, "tumor", "含有肿瘤转移的淋巴结组织切片"),
        ("voc-2007-classification", 14, "person", "人"),
    ],
)
def test_classes_stand_at_the_numbers_of_their_datasets(name: str, number: int, original: str, chinese: str) -> None:
    assert sets.class_names(name)[number] == ClassName(original, chinese)


@pytest.mark.parametrize("name", ["cifar-10", "cifar-100", "dtd", "eurosat_clip", "voc-2007-classification"])
def test_classes_of_alphabetical_datasets_are_in_that_order(name: str) -> None:
    originals = [one.original for one in sets.class_names(name)]
    assert originals == sorted(originals)


@pytest.mark.parametrize(
    ("model", "checkpoint", "name"),
    [
        ("ViT-B-16", None, "ViT-B-16"),
        ("ViT-B-16", "mine.pt", "ViT-B-16"),
        (None, "weights/clip_cn_vit-l-14-336.pt", "ViT-L-14-336"),
        (None, "mine.pt", None),
        ("hf:OFA-Sys/chinese-clip-vit-huge-patch14", None, "ViT-H-14"),
        ("QA-CLIP-ViT-B-16", None, "QA-CLIP-ViT-B-16"),
        (None, "QA-CLIP-base.pt", "QA-CLIP-ViT-B-16"),
        ("TencentARC/QA-CLIP", None, None),
        ("Emoji-Tiny", None, None),
        (None, None, None),
        ("weights/clip_cn_rn50.pt", None, "RN50"),
        (None, "hub/chinese-clip-vit-base-patch16", "ViT-B-16"),
        ("hf:hub/chinese-clip-vit-base-patch16/", None, "ViT-B-16"),
        # What merely bears a name is another model.
        (None, "runs/ViT-B-16", None),
        ("runs/ViT-B-16", None, None),
        ("hf:runs/ViT-B-16", None, None),
        ("open_clip:ViT-B-16@runs/ViT-B-16", None, None),
        ("open_clip:ViT-B-16@weights/clip_cn_vit-b-16.pt", None, None),
    ],
)
def test_a_model_stands_beside_the_figures_of_the_published_one(
    model: str | None, checkpoint: str | None, name: str | None
) -> None:
    assert sets.published_model(model, checkpoint) == name


# --- pure functions


def test_average_precision_of_a_ranking_worked_by_hand() -> None:
    # Ranked: yes, no, yes, no, no, yes. Precisions at the hits 1, 2/3, 1/2 and recalls 1/3, 2/3, 1:
    # recalls 0 to 0.3 have 1, 0.4 to 0.6 have 2/3, 0.7 to 1 have 1/2.
    scores = np.array([0.1, 0.9, 0.8, 0.7, 0.5, 0.6], dtype=np.float32)
    relevant = np.array([True, True, False, True, False, False])
    expected = (4 * 1 + 3 * 2 / 3 + 4 * 1 / 2) / 11
    assert zeroshot.average_precision_11_point(scores, relevant) == pytest.approx(expected)


def test_the_best_precision_of_a_deeper_cut_counts() -> None:
    # Ranked: no, yes, yes. The cut after two has precision 1/2, that after three 2/3 and every recall.
    relevant = np.array([False, True, True])
    scores = np.array([3, 2, 1], dtype=np.float32)
    assert zeroshot.average_precision_11_point(scores, relevant) == pytest.approx(2 / 3)


def test_a_recall_that_is_a_level_reaches_it() -> None:
    # Ten hits, after each of them a miss: the third hit reaches 0.3 exactly, with 3/5, not the fourth with 4/7.
    relevant = np.array([True, False] * 10)
    scores = np.linspace(1, 0, 20, dtype=np.float32)
    expected = (1 + sum(hit / (2 * hit - 1) for hit in range(1, 11))) / 11
    assert zeroshot.average_precision_11_point(scores, relevant) == pytest.approx(expected)


@given(st.lists(st.booleans(), min_size=1, max_size=30).filter(any))
def test_average_precision_is_1_for_hits_first_and_never_above(relevant: list[bool]) -> None:
    scores = np.linspace(1, 0, len(relevant), dtype=np.float32)
    assert 0 < zeroshot.average_precision_11_point(scores, np.array(relevant)) <= 1
    assert zeroshot.average_precision_11_point(scores, np.array(sorted(relevant, reverse=True))) == 1


@pytest.mark.parametrize("relevant", [[True, False, True], [True, True, False]])
def test_equal_scores_are_cut_together(relevant: list[bool]) -> None:
    # Cut after one: precision 1, recall 1/2; after all three, of which two are equal: 2/3 and 1.
    scores = np.array([3, 2, 2], dtype=np.float32)
    expected = (6 * 1 + 5 * 2 / 3) / 11
    assert zeroshot.average_precision_11_point(scores, np.array(relevant)) == pytest.approx(expected)


def test_scores_that_say_nothing_have_the_precision_of_chance() -> None:
    relevant = np.arange(40) // 10 == 0  # the first of four classes, in the order of the folders
    assert zeroshot.average_precision_11_point(np.ones(40, dtype=np.float32), relevant) == 0.25


def test_average_precision_needs_something_to_find() -> None:
    with pytest.raises(ValueError, match="at least one relevant item"):
        zeroshot.average_precision_11_point(np.ones(2, dtype=np.float32), np.zeros(2, dtype=np.bool_))


FEW = (ClassName("sea_lake", "海"), ClassName("Industrial", "工厂"), ClassName("crop", "农田"))


@pytest.mark.parametrize(
    ("folders", "numbers"),
    [
        (["0", "1", "2"], [0, 1, 2]),
        (["000", "002"], [0, 2]),
        (["Crop", "SeaLake", "industrial"], [2, 0, 1]),  # by name, in whatever order these are sorted
    ],
)
def test_folders_are_of_the_class_of_their_number_or_name(folders: list[str], numbers: list[int]) -> None:
    assert classification.own_numbers(folders, FEW) == numbers


@pytest.mark.parametrize(
    ("folders", "reason"),
    [
        (["0", "3"], "the folder '3' is no class of the 3"),
        (["0", "crop"], "the folder '0' is no class"),
        (["a", "b", "c"], "the folder 'a' is no class"),
        (["0", "00"], "two folders are of one class"),
    ],
)
def test_folders_of_no_class_are_refused(folders: list[str], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        classification.own_numbers(folders, FEW)


def test_numbers_of_eurosat_need_its_labels(tmp_path: Path) -> None:
    # Its archive's order of the classes is not the alphabetical one of its names.
    for folder in ("Forest", "River"):
        (tmp_path / "test" / folder).mkdir(parents=True)
        (tmp_path / "test" / folder / "1.png").write_bytes(picture((1, 2, 3)))
    assert classification.read_dataset(tmp_path, "eurosat_clip").numbers == [1, 8]
    (tmp_path / "test" / "Forest").rename(tmp_path / "test" / "001")
    (tmp_path / "test" / "River").rename(tmp_path / "test" / "008")
    with pytest.raises(DataError, match="the folder '001' is no class of the 10; expected names such as 'AnnualCrop'"):
        classification.read_dataset(tmp_path, "eurosat_clip")
    (tmp_path / "label_cn.txt").write_text("\n".join("甲乙丙丁戊己庚辛壬癸"), encoding="utf-8")
    assert classification.read_dataset(tmp_path, "eurosat_clip").numbers == [1, 8]


def test_imagenet_lies_in_folders_of_synsets(tmp_path: Path) -> None:
    for folder in ("n01440764", "n15075141"):
        (tmp_path / "val" / folder).mkdir(parents=True)
        (tmp_path / "val" / folder / "1.png").write_bytes(picture((1, 2, 3)))
    dataset = classification.read_dataset(tmp_path, "imagenet-cn")
    assert dataset.numbers == [0, 999]
    assert [dataset.labels[number] for number in dataset.numbers] == ["丁鱥", "卫生纸"]


# --- retrieval, end to end


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`flickr` and `raw`, which is not packed: two sentences a picture, one of them of two pictures."""
    folder = tmp_path_factory.mktemp("datasets")
    shown = emoji.load()[:NUM_PICTURES]
    images = [tsv_line(one.number, emoji.png(one)) for one in shown]
    texts = [jsonl_line(one.number, one.name, [one.number]) for one in shown]
    texts += [jsonl_line(100 + one.number, "、".join(one.tags), [one.number]) for one in shown]
    texts.append(jsonl_line(999, "笑脸", [shown[0].number, shown[1].number]))
    for name in ("flickr", "raw"):
        for split in ("valid", "test"):
            write_split(folder / name, images, texts, split=split)
    cli.main(["dataset", "build", "--data_dir", str(folder / "flickr"), "--splits", "valid,test"])
    return folder


def evaluated(*arguments: object, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    cli.main(["evaluate", *map(str, arguments), "--json", "--device", "cpu", "--num-workers", "0"])
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def test_recall_is_that_of_the_separate_commands(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = datasets / "flickr"
    result = evaluated("flickr30k-cn", "--data", data, "--model", "Emoji-Tiny", capsys=capsys)
    files = ["--image-feats", "i.jsonl", "--text-feats", "t.jsonl"]
    shutil.copy(data / "test_texts.jsonl", tmp_path / "a.jsonl")
    outputs = ["--image-feat-output-path", "i.jsonl", "--text-feat-output-path", "t.jsonl"]
    inputs = ["--image-data", str(data / "lmdb/test/imgs"), "--text-data", str(data / "test_texts.jsonl")]
    towers = ["--extract-image-feats", "--extract-text-feats", "--resume", "Emoji-Tiny", "--device", "cpu"]
    cli.main(["features", *towers, *inputs, *outputs])
    from cn_clip.eval import transform_ir_annotation_to_tr

    transform_ir_annotation_to_tr.main(["--input", "a.jsonl"])
    expected: dict[str, Mapping[str, float]] = {}
    for query, standard in (("text", "a.jsonl"), ("image", "a.tr.jsonl")):
        cli.main(["topk", *files, "--query", query, "--output", "p.jsonl"])
        cli.main(["recall", standard, "p.jsonl", "r.json", "--query", query])
        expected[query] = json.loads(Path("r.json").read_text())["scoreJson"]
        assert result["measured"][query] == {key: expected[query][key] for key in ("r1", "r5", "r10", "mean_recall")}
    assert 0 < expected["text"]["r1"] < expected["image"]["r1"] <= 100
    folder = Path("evaluations/flickr30k-cn-test-Emoji-Tiny")
    facts = {name: result[name] for name in ("benchmark", "split", "model", "checkpoint", "published", "output")}
    names = {"benchmark": "flickr30k-cn", "split": "test", "model": "Emoji-Tiny", "output": str(folder)}
    assert facts == {**names, "checkpoint": None, "published": None}
    assert json.loads((folder / "result.json").read_text()) == result
    compared = compare.read_result(folder / "result.json")
    assert len(compared) == 8
    assert compared["image→text R@1"] == expected["image"]["r1"]


def test_models_of_other_families_are_measured_too(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    write_family(tmp_path / "family", "clip")
    name = f"hf:{tmp_path}/family"
    result = evaluated("muge", "--data", datasets / "flickr", "--model", name, "--output", tmp_path, capsys=capsys)
    shown, encoder = emoji.load()[:NUM_PICTURES], Encoder(name, device="cpu")
    lines = (datasets / "flickr" / "valid_texts.jsonl").read_text(encoding="utf-8").splitlines()
    texts = [json.loads(line) for line in lines]
    images_ND = encoder.encode_images([emoji.png(one) for one in shown])
    found = (encoder.encode_texts([one["text"] for one in texts]) @ images_ND.T).argmax(axis=1)
    hits = [shown[best].number in one["image_ids"] for best, one in zip(found.tolist(), texts, strict=True)]
    assert result["measured"]["text"]["r1"] == pytest.approx(100 * np.mean(hits))
    assert (result["model"], result["published"]) == (name, None)


def test_the_table_has_the_published_rows_beside_the_measured(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = tmp_path / "clip_cn_vit-b-16.pt"
    state = {f"module.{name}": value for name, value in load_from_name("Emoji-Tiny")[0].state_dict().items()}
    torch.save({"epoch": 1, "step": 2, "name": "named alike", "state_dict": state}, named)
    flags = ["--data", str(datasets / "flickr"), "--checkpoint", str(named), "--num-workers", "0", "--device", "cpu"]
    cli.main(["evaluate", "Flickr30K_CN", *flags, "--output", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split()[-4:] for line in lines if line.startswith("  published") and " ViT-B-16  " in line]
    assert rows == [
        ["62.7", "86.9", "92.8", "—"],
        ["79.1", "94.8", "97.4", "—"],
        ["74.6", "93.5", "97.1", "—"],
        ["93.5", "99.0", "99.5", "—"],
    ]
    measured = json.loads((tmp_path / "out" / "result.json").read_text())
    shown = [line.split()[-4:] for line in lines if "measured: " in line]
    assert shown == [[f"{value:.1f}" for value in scores.values()] for scores in measured["measured"].values()]
    assert measured["published"]["fine-tuned"]["image"] == {
        "r1": 93.5,
        "r5": 99.0,
        "r10": 99.5,
        "mean_recall": None,
    }
    assert measured["others"]["Taiyi"] == {
        "zero-shot": {"text": {"r1": 60.8, "r5": 85.0, "r10": 91.0, "mean_recall": None}}
    }
    (taiyi,) = (line for line in lines if "Taiyi" in line)
    assert taiyi.split() == ["published,", "zero-shot:", "Taiyi", "60.8", "85.0", "91.0", "—"]
    assert [line.split()[-1] for line in lines if line.startswith("published figures")][:2] == [CHINESE_CLIP, README]
    cli.main(["evaluate", "muge", *flags, "--output", str(tmp_path / "out"), "--split", "test"])
    text = capsys.readouterr().out
    assert "the published figures are of valid only" in text
    assert "published, zero-shot" not in text
    assert "image → text" not in text


def test_features_that_are_there_are_kept_and_others_computed_again(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["muge", "--data", datasets / "flickr", "--model", "Emoji-Tiny", "--output", tmp_path, "--batch-size", 8]
    encode, calls = TorchBackend.encode_pixels, []

    def killed_once(self: TorchBackend, pixels: Any) -> Any:
        calls.append(len(pixels))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(self, pixels)

    monkeypatch.setattr(TorchBackend, "encode_pixels", killed_once)
    with pytest.raises(SystemExit) as exit_info:
        evaluated(*flags, capsys=capsys)
    assert exit_info.value.code == 130
    assert not (tmp_path / "result.json").exists()
    first = evaluated(*flags, capsys=capsys)
    assert calls == [8, 8, 8, 8]  # three batches, the last of them twice
    assert evaluated(*flags, capsys=capsys) == first
    assert len(calls) == 4
    cli.main(["evaluate", *map(str, flags), "--num-workers", "0", "--device", "cpu", "--batch-size", "12"])
    assert calls[4:] == [12, 12]
    assert "computing again" in capsys.readouterr().out


def remove(*names: str) -> Any:
    def change(folder: Path) -> None:
        for name in names:
            path = folder / name
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def without_answers(folder: Path) -> None:
    (folder / "test_texts.jsonl").write_bytes(b"".join(jsonl_line(n, "字", []) for n in range(12)))


def few_texts(folder: Path) -> None:
    (folder / "test_texts.jsonl").write_bytes(jsonl_line(1, "字", [1]))


def damaged_line(folder: Path) -> None:
    (folder / "test_texts.jsonl").write_bytes(jsonl_line(1, "字", [1]) + b"{\n")


def cut_short(folder: Path) -> None:
    (folder / "lmdb" / "test" / "imgs" / "data.mdb").write_bytes(b"x" * 100)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (remove("test_texts.jsonl"), "test_texts.jsonl is missing"),
        (remove("lmdb"), "cn-clip dataset build --data_dir"),
        (remove("lmdb", "test_imgs.tsv"), "neither lmdb/test/imgs nor test_imgs.tsv is there"),
        (without_answers, "no text has image_ids, so nothing can be scored"),
        (few_texts, "test has 1 texts; recall at 10 needs at least 10"),
        (damaged_line, "test_texts.jsonl:2: not valid JSON"),
        (cut_short, "lmdb/test/imgs"),
    ],
)
def test_what_a_dataset_lacks_is_told_in_one_sentence_before_any_work(
    datasets: Path, tmp_path: Path, change: Any, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    shutil.copytree(datasets / "flickr", data)
    change(data)
    output = tmp_path / "out"
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["evaluate", "coco-cn", "--data", str(data), "--model", "Emoji-Tiny", "--output", str(output)])
    assert exit_info.value.code == 1
    error = capsys.readouterr().err
    assert reason in error
    assert len(error.strip().splitlines()) == 1
    assert not output.exists()


# --- classification, end to end


@pytest.fixture(scope="module")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three classes of drawings in the layout of the archives, numbered 0, 1 and 2 as with ten classes or fewer."""
    folder = tmp_path_factory.mktemp("mnist") / "mnist"
    few = {label: emoji.CLASSES[label] for label in ("时钟", "心", "猫脸")}
    emoji.write_classification(folder, few)
    for path in sorted((folder / "test").iterdir()):
        path.rename(path.with_name(str(int(path.name))))
    return folder


def test_accuracy_and_probabilities_are_those_of_the_separate_command(
    mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "cifar-10"
    shutil.copytree(mnist, data)
    count = len(list((data / "test").glob("*/*")))
    (data / "index.json").write_text(json.dumps(list(range(count))[::-1]))
    flags = ["--data", data, "--model", "Emoji-Tiny", "--output", tmp_path / "out"]
    result = evaluated("cifar-10", *flags, capsys=capsys)
    asked = [f"--datapath={data}/test", f"--label-file={data}/label_cn.txt", "--dataset=cifar-10"]
    asked += [f"--index={data}/index.json", f"--save-dir={tmp_path}/separate", "--resume=Emoji-Tiny"]
    cli.main(["zeroshot", *asked, "--device=cpu", "--num-workers=0", "--json"])
    separate = json.loads(capsys.readouterr().out)
    assert result["measured"]["top1"] == pytest.approx(100 * separate["zeroshot-top1"])
    shares = [one["accuracy"] for one in separate["per_class"]]
    assert result["measured"]["mean_per_class"] == pytest.approx(100 * np.mean(shares))
    assert set(result["measured"]) == {"top1", "mean_per_class"}
    assert (result["own_labels"], result["num_pictures"]) == (False, count)
    assert compare.read_result(tmp_path / "out" / "result.json")["top-1"] == result["measured"]["top1"]
    assert Path(result["predictions"]).read_bytes() == (tmp_path / "separate" / "cifar-10.json").read_bytes()


def test_own_labels_are_used_and_the_published_figure_shown(
    mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "mnist"
    shutil.copytree(mnist / "test", data / "test")
    named = shutil.copy(zoo.BUNDLED["Emoji-Tiny"].path, tmp_path / "mine.safetensors")
    flags = ["--data", str(data), "--checkpoint", str(named), "--num-workers", "0", "--device", "cpu"]
    seen: list[list[str]] = []

    def shown(encoder: object, labels: list[str], templates: object, **_: object) -> Any:
        seen.append(labels)
        return np.eye(10, 256, dtype=np.float32)

    monkeypatch.setattr("cn_clip.clip.scoring.classifier", shown)
    monkeypatch.chdir(tmp_path)
    cli.main(["evaluate", "mnist", *flags])
    text = capsys.readouterr().out
    assert seen == [[f"手写数字{digit}" for digit in range(10)]]
    assert "no label_cn.txt there; using the Chinese class names of this package" in text
    assert "name it with --model to see published figures" in text
    assert json.loads(Path("evaluations/mnist-test-mine/result.json").read_text())["published"] is None
    assert (
        evaluate_command._published_model(
            evaluate_command.Options(benchmark="mnist", data="d", checkpoint="mine.pt", model="RN50")
        )
        == "RN50"
    )


def test_labels_of_another_number_are_not_compared_with_published_figures(
    mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate_command, "_published_model", lambda _: "RN50")
    flags = ["--data", str(mnist), "--model", "Emoji-Tiny", "--output", str(tmp_path / "out")]
    cli.main(["evaluate", "mnist", *flags, "--num-workers", "0", "--device", "cpu"])
    text = capsys.readouterr().out
    assert "there are 3 labels, but MNIST has 10 classes, so this is not compared with the published figures" in text
    assert "published figures: " not in text
    assert json.loads((tmp_path / "out" / "result.json").read_text())["published"] is None


def test_pictures_in_several_folders_of_voc_have_several_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "voc"
    # Picture a is of the classes 0 and 14, b of 14, c of 7.
    for number, colour in ((0, 0), (14, 0), (14, 100), (7, 200)):
        folder = data / "test" / f"{number:03d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{colour}.png").write_bytes(picture((colour, 0, 0)))
    # In the order of the folders: a as 0, c as 7, a as 14, b as 14.
    rows = np.zeros((4, 20), dtype=np.float32)
    rows[[0, 2], 14], rows[[0, 2], 0] = 0.6, 0.4  # a: 14 before 0
    rows[1, 7] = 1.0
    rows[3, 0], rows[3, 14] = 0.7, 0.3  # b is taken for 0
    monkeypatch.setattr("cn_clip.clip.scoring.probabilities", lambda images, classes: rows)
    flags = ["--data", data, "--model", "Emoji-Tiny", "--output", tmp_path / "out"]
    result = evaluated("voc-2007-classification", *flags, capsys=capsys)
    # top-1 counts a in each of its folders: right of a as 14 and c. Classes: 0 of 1, 1 of 1, 1 of 2.
    assert result["measured"]["top1"] == 50.0
    assert result["measured"]["mean_per_class"] == pytest.approx(100 * (0 + 1 + 0.5) / 3)
    # Class 0 ranks b before a: precision 1/2 at every recall. Classes 7 and 14 rank theirs first.
    assert result["measured"]["map_11_point"] == pytest.approx(100 * (0.5 + 1 + 1) / 3)


def no_test_folder(folder: Path) -> None:
    (folder / "test").rename(folder / "val")


def empty_class(folder: Path) -> None:
    (folder / "test" / "5").mkdir()


def text_for_picture(folder: Path) -> None:
    (folder / "test" / "0" / "0000.png").write_text("no picture")


def labels_of_two(folder: Path) -> None:
    (folder / "label_cn.txt").write_text("猫\n狗\n", encoding="utf-8")


def empty_label(folder: Path) -> None:
    (folder / "label_cn.txt").write_text("猫\n\n狗\n", encoding="utf-8")


def unknown_folder(folder: Path) -> None:
    (folder / "test" / "0").rename(folder / "test" / "zero")
    (folder / "label_cn.txt").unlink()


def short_index(folder: Path) -> None:
    (folder / "index.json").write_text("[0, 1]")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (shutil.rmtree, "no such folder; expected the folder of the dataset"),
        (no_test_folder, "test/ is missing"),
        (empty_class, "test/5: holds no picture"),
        (text_for_picture, "0000.png"),
        (labels_of_two, "test: 3 class folders and 2 labels"),
        (empty_label, "label_cn.txt:2: an empty line"),
        (unknown_folder, "test: the folder 'zero' is no class of the 10"),
        (short_index, "index.json: expected each of the numbers"),
    ],
)
def test_what_a_classification_set_lacks_is_told_in_one_sentence(
    mnist: Path, tmp_path: Path, change: Any, reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data, output = tmp_path / "mnist", tmp_path / "out"
    shutil.copytree(mnist, data)
    change(data)
    flags = ["--data", str(data), "--model", "Emoji-Tiny", "--output", str(output), "--num-workers", "0", "--json"]
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["evaluate", "mnist", *flags])
    assert exit_info.value.code == 1
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert reason in errors[0]
    assert not output.exists() or not list(output.iterdir())


# --- settings


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ({}, "ViT-B-16"),
        ({"checkpoint": "weights/mine.pt"}, "mine"),
        ({"checkpoint": "logs/a/checkpoints/epoch_best.pt"}, "a-epoch_best"),
        ({"checkpoint": "logs/b/checkpoints/../checkpoints/epoch_best.pt"}, "b-epoch_best"),
        ({"checkpoint": "checkpoints/epoch_best.pt"}, "here-epoch_best"),
        ({"model": "RN50", "checkpoint": "logs/a b/checkpoints/epoch3.pt"}, "a_b-epoch3"),
        ({"model": "hf:org/family", "precision": "bf16"}, "hf_org_family-bf16"),
        ({"precision": "amp"}, "ViT-B-16"),
        ({"backend": "openvino"}, "ViT-B-16-openvino"),
        ({"checkpoint": "mine.pt", "backend": "onnx", "precision": "int8"}, "mine-onnx-int8"),
    ],
)
def test_files_bear_the_names_of_run_checkpoint_and_arithmetic(
    given: dict[str, Any], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = evaluate_command.Options(benchmark="muge", data="d", **given)
    assert options.folder == Path(f"evaluations/muge-valid-{name}")
    probing = linear_probe.Options(train="t/train", test="t/test", **given)
    assert probing.cache_file(Path("t/train")) == tmp_path / "here" / "t" / f"train.{name}.npz"


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["flikr30k", "--data", "d"], "did you mean flickr30k-cn? expected one of: muge, flickr30k-cn, coco-cn"),
        (["imagenet-1k", "--data", "d"], "no benchmark 'imagenet-1k'"),
        (["muge"], "--data: expected the folder of the dataset"),
        (["mnist", "--data", "d", "--split", "valid"], "--split valid: mnist is measured on its test pictures"),
        (["muge", "--data", "d", "--batch-size", "0"], "--batch-size: expected at least 1"),
        (["muge", "--data", "d", "--output", ""], "--output: expected a folder"),
        (["muge", "--data", "d", "--model", "mine", "--checkpoint", "x.pt"], "--model mine: beside --checkpoint"),
        (["muge", "--data", "d", "--precision", "int8"], "int8"),
    ],
)
def test_wrong_settings_stop_with_status_2(
    arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["evaluate", *arguments])
    assert exit_info.value.code == 2
    assert reason in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_an_output_that_can_be_no_folder_is_told(
    datasets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["evaluate", "muge", "--data", str(datasets / "flickr"), "--output", str(tmp_path / "file")])
    assert exit_info.value.code == 1
    assert "file: cannot be made" in capsys.readouterr().err

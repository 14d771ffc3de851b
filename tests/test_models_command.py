"""`cn-clip models`: which models there are, how large, where, what is published of them."""

import json
import re
from pathlib import Path

import pytest

from cn_clip import cli, models, zoo
from cn_clip.progress import cells_of
from cn_clip.zoo_results import OTHERS, SPLITS, results_of

ROOT = Path(__file__).parents[1]


def printed(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    cli.main(["models", *args])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("vision", "text", "total"),
    [
        ("RN50", "RBT3-chinese", 76_989_537),
        ("ViT-B-16", "RoBERTa-wwm-ext-base-chinese", 188_262_913),
        ("ViT-B-32", "RoBERTa-wwm-ext-base-chinese", 189_919_489),
        ("ViT-L-14", "RoBERTa-wwm-ext-base-chinese", 406_233_089),
        ("ViT-L-14-336", "RoBERTa-wwm-ext-base-chinese", 406_560_769),
        ("ViT-H-14", "RoBERTa-wwm-ext-large-chinese", 957_598_209),
    ],
)
def test_parameters_are_those_of_the_published_models(vision: str, text: str, total: int) -> None:
    assert models.count_parameters(zoo.model_config(vision, text))[0] == total


def test_visual_parameters_of_vit_b_16() -> None:
    assert models.count_parameters(zoo.model_config("ViT-B-16", "RBT3-chinese"))[1] == 86_192_640


def test_the_table_tells_sizes_and_which_files_are_here(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clip_cn_rn50.pt").write_bytes(b"")
    out = printed(capsys, "--download-root", str(tmp_path)).splitlines()
    rows = dict(" ".join(line.split()).split(" ", 1) for line in out)
    assert rows["ViT-B-16"] == "224 188.3M 86.2M 753 MB clip_cn_vit-b-16.pt no"
    assert rows["RN50"] == "224 77.0M 38.3M 308 MB clip_cn_rn50.pt yes"
    assert rows["QA-CLIP-ViT-L-14-336"] == "336 406.6M 304.3M 2,445 MB QA-CLIP-large-336.pt no"
    assert rows["Emoji-Tiny"] == "64 11.3M 4.1M 23 MB emoji_tiny.safetensors bundled"
    assert f"folder: {tmp_path}" in out


def test_a_folder_whose_name_is_too_long_holds_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert "no" in printed(capsys, "--download-root", "x" * 300)


@pytest.mark.parametrize("args", [[], ["--results"]])
def test_what_is_printed_fits_a_terminal_of_100_columns(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    starts_of_paths = ("文件夹", "Emoji-Tiny:")
    lines = [line for line in printed(capsys, *args).splitlines() if not line.startswith(starts_of_paths)]
    assert len(lines) > 10
    assert max(map(cells_of, lines)) <= 100


def test_json_is_one_object_of_everything_known(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "clip_cn_rn50.pt").write_bytes(b"")
    listed = json.loads(printed(capsys, "--json", "--download-root", str(tmp_path)))
    by_name = {model["name"]: model for model in listed["models"]}
    assert list(by_name) == zoo.available_models()
    assert by_name["RN50"] == {
        "name": "RN50",
        "vision_model": "RN50",
        "text_model": "RBT3-chinese",
        "resolution": 224,
        "num_params": 76_989_537,
        "num_visual_params": 38_316_896,
        "repository": "OFA-Sys/chinese-clip-rn50",
        "modelscope": "AI-ModelScope/chinese-clip-rn50",
        "file": "clip_cn_rn50.pt",
        "num_bytes": 308_316_425,
        "sha256": "b196ee3ee528b70be1158ab1aafb1d2f1c801ad2d9ffb3bae31b0d305f82fc88",
        "path": str(tmp_path / "clip_cn_rn50.pt"),
        "bundled": False,
    }
    repositories = {(model["repository"], model["modelscope"]) for name, model in by_name.items() if "QA" in name}
    assert repositories == {("TencentARC/QA-CLIP", None)}
    assert by_name["Emoji-Tiny"]["num_bytes"] == zoo.BUNDLED["Emoji-Tiny"].path.stat().st_size


def test_files_are_one_each_and_hold_at_least_the_weights_at_half_precision() -> None:
    published = {**zoo.PUBLISHED, **zoo.QA_CLIP}
    assert len({entry.filename for entry in published.values()}) == len(published) == 9
    assert len({entry.sha256 for entry in published.values()}) == 9
    for entry in published.values():
        assert re.fullmatch("[0-9a-f]{64}", entry.sha256 or "")
        num_params = models.count_parameters(zoo.model_config(entry.vision, entry.text))[0]
        assert 2 * num_params < (entry.num_bytes or 0) < 12 * num_params


# --- results


def test_results_are_those_of_their_sources(capsys: pytest.CaptureFixture[str]) -> None:
    out = printed(capsys, "--results")
    tables = dict(zip(*[iter(re.split(r"^(.*?\(\w+\): .*)$", out, flags=re.MULTILINE)[1:])] * 2, strict=True))
    table = tables["MUGE (valid): text → image"].strip().splitlines()
    muge = dict(" ".join(line.split()).split(" ", 1) for line in table)
    assert muge["ViT-H-14"] == "63.0 84.1 89.2 78.8 68.9 88.7 93.1 83.6"
    assert muge["QA-CLIP-ViT-L-14"] == "57.4 81.0 87.7 – – – – –"
    coco = tables["COCO-CN (test): image → text"]
    assert "ViT-B-16              57.0  84.1  93.6  77.4  96.2  98.9\n" in coco
    assert "Wukong                55.2  81.0  90.6  73.3  94.0  98.0\n" in coco
    assert muge["R2D2-ViT-B"] == "– – – – 47.4 75.1 83.5 68.7"
    assert "ViT-B-16 (2022-06)    52.1  76.7  84.4  71.1  56.8  82.4  89.3  76.2" in table
    assert "Taiyi" not in coco, "whose results are of the other direction alone"
    first, classes = re.findall(r"ELEVATER \(test\): zero-shot classification\n(.*?)\n\n", out, flags=re.DOTALL)
    assert re.search(r"^ALIGN +94\.9 +76\.8 +66\.1 +52\.1 +50\.8$", first, flags=re.MULTILINE)
    assert re.search(r"^Wukong +95\.4 +77\.1 +40\.9 +50\.3 +–$", first, flags=re.MULTILINE)
    assert re.search(r"^ViT-H-14 +26\.2 +39\.1 +79\.4 +52\.4 +84\.9$", classes, flags=re.MULTILINE)
    assert re.search(r"^CLIP +33\.3 +11\.5 +79\.0 +62\.3 +84\.0$", classes, flags=re.MULTILINE)
    assert "Wukong" not in classes
    assert "https://github.com/OFA-Sys/Chinese-CLIP/blob/master/Results.md" in out
    assert "https://github.com/OFA-Sys/Chinese-CLIP/blob/master/README.md" in out


def test_json_holds_the_results_if_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    printed_object = json.loads(printed(capsys, "--json", "--results"))
    listed = printed_object["models"]
    counts = {model["name"]: len(model["results"]) for model in listed}
    assert counts == dict.fromkeys(zoo.PUBLISHED, 10) | dict.fromkeys(zoo.QA_CLIP, 6) | {"Emoji-Tiny": 0}
    (one,) = [
        one
        for one in listed[0]["results"]
        if (one["dataset"], one["query"], one["setup"]) == ("Flickr30K-CN", "image", "fine-tuned")
    ]
    assert (one["recall_1"], one["recall_5"], one["recall_10"], one["mean"]) == (93.5, 99.0, 99.5, None)
    assert listed[0]["accuracies"]["CIFAR-10"] == 92.0
    others = {one["name"]: (len(one["results"]), len(one["accuracies"])) for one in printed_object["others"]}
    assert others == {
        **{"Wukong": (10, 4), "Taiyi": (2, 0), "R2D2": (10, 0), "Wukong-ViT-B": (10, 0), "R2D2-ViT-B": (5, 0)},
        **{"ViT-B-16 (2022-06)": (10, 0), "GIT": (0, 10), "ALIGN": (0, 10), "CLIP": (0, 10)},
    }
    assert "others" not in json.loads(printed(capsys, "--json"))


def test_recall_grows_with_k_and_published_means_are_means() -> None:
    for name in (*zoo.available_models(), *OTHERS):
        for one in results_of(name):
            assert one.dataset in SPLITS
            assert 0 < one.recall_1 < one.recall_5 < one.recall_10 <= 100
            mean = (one.recall_1 + one.recall_5 + one.recall_10) / 3
            assert one.mean is None or abs(one.mean - mean) < 0.1


# --- the page on models


def test_the_page_on_models_holds_the_tables_of_the_package() -> None:
    lines = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    for name, entry in zoo.everything().items():
        facts = models.describe(name, entry, ROOT)
        bundled = "随包" if facts["bundled"] else "—"
        sizes = f"{facts['num_params']:,} | {facts['num_visual_params']:,} | {facts['resolution']}"
        where = f"{facts['repository'] or bundled} | {facts['modelscope'] or bundled}"
        assert f"| `{name}` | {sizes} | `{facts['file']}` | {facts['num_bytes']:,} | {where} |" in lines
        assert facts["bundled"] or f"| `{facts['file']}` | `{facts['sha256']}` |" in lines

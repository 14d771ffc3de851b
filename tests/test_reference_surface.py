"""The paths that programs and guides find this package by: short names, `src/`, the scripts of the Pokémon project."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from dataset_files import GOLDEN_LMDB, picture

from cn_clip import drop_in

ROOT = Path(__file__).parents[1]


def run(*args: object, path: str = "", folder: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    """Python in the checkout, whose `cn_clip` is installed, with another folder of it on the path as the guides say."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *([str(ROOT / path)] if path else [])])}
    command = [sys.executable, "-W", "error", *map(str, args)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


# --- short names


@pytest.mark.parametrize("path", ["cn_clip", "src"])
def test_guides_import_the_very_modules_by_short_names(path: str) -> None:
    program = """
import cn_clip.clip as clip
from clip import load_from_name, available_models, tokenize, image_transform
from clip.utils import available_models as same, create_model
from clip.model import CLIP, convert_weights
from training.main import convert_models_to_fp32, parse_args
from training.scheduler import cosine_lr
from training.params import get_default_params
from eval.data import get_eval_img_dataset, get_eval_txt_dataset, get_zeroshot_dataset, _preprocess_text
from eval.cvinw_zeroshot_templates import openai_templates
from deploy.benchmark_utils import print_timings
from preprocess import build_lmdb_dataset
import sys
short = ("clip", "training", "eval", "deploy", "preprocess")
for name in [name for name in sys.modules if name.split(".")[0] in short]:
    assert sys.modules[name] is sys.modules[f"cn_clip.{name}"], name
    assert sys.modules[name].__spec__.name == f"cn_clip.{name}", name
assert available_models is same is clip.available_models
import cn_clip.clip.model
assert CLIP is cn_clip.clip.model.CLIP
try:
    import eval.nothing
except ModuleNotFoundError as error:
    print(error)
"""
    done = run("-c", program, path=path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "No module named 'eval.nothing'\n"


def test_a_package_that_is_not_ours_keeps_its_name(tmp_path: Path) -> None:
    (tmp_path / "clip").mkdir()
    (tmp_path / "clip" / "__init__.py").write_text("mine = 1\n")
    (tmp_path / "clip" / "utils.py").write_text("")
    program = "import cn_clip.clip, clip, clip.utils; assert clip.mine and clip.utils.__name__ == 'clip.utils'"
    done = run("-c", program, folder=tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_name_that_is_handed_on_has_a_home() -> None:
    homes = [name for names in drop_in.HOMES.values() for name in names.split()]
    assert len(homes) == len(set(homes))
    assert {name for names in drop_in.NAMES.values() for name in names.split()} == set(homes)


def test_names_that_are_handed_on_cost_nothing_before_they_are_asked_for() -> None:
    modules = ", ".join(drop_in.NAMES.keys() - {"cn_clip.training.train"})
    done = run("-c", f"import sys, {modules}; print(sorted({{'torch', 'PIL', 'lmdb'}} & set(sys.modules)))")
    assert done.stdout == "[]\n", done.stderr


# --- the folder of the first guide


def test_commands_of_the_first_guide_run_from_src(tmp_path: Path) -> None:
    golden = ROOT / "tests" / "golden" / "eval"
    standard, predictions = golden / "valid_texts.jsonl", golden / "valid_predictions.jsonl"
    done = run("src/eval/evaluation.py", standard, predictions, tmp_path / "output.json", path="src")
    assert "The evaluation finished successfully." in done.stdout, done.stderr
    assert json.loads((tmp_path / "output.json").read_text()) == json.loads((golden / "result.json").read_text())
    build = run(
        *("src/preprocess/build_lmdb_dataset.py", "--data_dir", GOLDEN_LMDB, "--splits", "train"),
        *("--lmdb_dir", tmp_path / "lmdb"),
        path="src",
    )
    assert "done!" in build.stdout, build.stderr
    for script in ("training/main.py", "eval/extract_features.py", "eval/make_topk_predictions_tr.py"):
        assert run(f"src/{script}", "--help", path="src").returncode == 0


# --- the Pokémon project


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    (tmp_path / "imgs").mkdir()
    for number, name in enumerate(("妙蛙種子", "皮卡丘", "傑尼龜")):
        (tmp_path / "imgs" / f"{number + 1:04d}{name}.png").write_bytes(picture((50 * number, 0, 0)))
    return tmp_path


def texts(folder: Path) -> set[str]:
    lines = [line for file in folder.glob("*_texts.jsonl") for line in file.read_text("utf-8").splitlines()]
    return {json.loads(line)["text"] for line in lines}


def test_scripts_of_the_pokemon_project_make_its_dataset(pictures: Path) -> None:
    done = run(ROOT / "data_t2s.py", folder=pictures)
    assert done.returncode == 0, done.stderr
    assert texts(pictures / "datasets" / "pokemon") == {"妙蛙种子", "皮卡丘", "杰尼龟"}
    done = run(ROOT / "data_processing.py", "--output", "other", "--split_ratio", "1,0,0", folder=pictures)
    assert done.returncode == 0, done.stderr
    assert texts(pictures / "other") == {"妙蛙種子", "皮卡丘", "傑尼龜"}
    assert len((pictures / "other" / "train_imgs.tsv").read_text().splitlines()) == 3

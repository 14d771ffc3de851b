"""The shell scripts of Chinese-CLIP: their settings, that they train, and when they refuse to."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cn_clip import zoo
from cn_clip.clip.model import CLIP
from cn_clip.data.lmdb_store import Pair, SplitWriter
from cn_clip.demo import emoji
from tests.dataset_files import tsv_line

ROOT = Path(__file__).resolve().parents[1]
MUGE, FLICKR = (f"run_scripts/{name}_finetune_vit-b-16_rbt-base.sh" for name in ("muge", "flickr30k"))
NUM_PAIRS = 12
SMALL = {"vision_model": "ViT-Tiny-64", "text_model": "BERT-Tiny-chinese", "batch_size": "4", "valid_batch_size": "4"}
ALONE = ("--device=cpu", "--num-threads=1")
SETTINGS = {"PYTHON", "WORKER_CNT", "GPUS_PER_NODE", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "lr", "name"}


def bash(script: str, *args: object, **variables: str) -> "subprocess.CompletedProcess[str]":
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    environment = {**inherited, "PYTHON": sys.executable, **variables}
    command = ["bash", script, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def datapath(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a user: twelve emoji pictures under the name MUGE, a small model under the published name."""
    folder = tmp_path_factory.mktemp("data path")
    for split in ("train", "valid"):
        with SplitWriter(folder / "datasets" / "MUGE" / "lmdb" / split) as writer:
            for one in emoji.load()[:NUM_PAIRS]:
                writer.put_image(one.number, tsv_line(one.number, emoji.png(one)).split(b"\t")[1].strip())
                writer.put_pair(Pair(one.number, one.number, one.name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIP.from_config(zoo.model_config(SMALL["vision_model"], SMALL["text_model"]))
    (folder / "pretrained_weights").mkdir()
    torch.save({"state_dict": model.state_dict()}, folder / "pretrained_weights" / "clip_cn_vit-b-16.pt")
    return folder


@pytest.mark.parametrize("script", sorted((ROOT / "run_scripts").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_have_valid_syntax(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(("script", "dataset", "name"), [(MUGE, "MUGE", "muge"), (FLICKR, "Flickr30k-CN", "flickr30k")])
def test_settings_are_those_of_the_original_in_one_process(script: str, dataset: str, name: str) -> None:
    done = bash(script, "/data", "--grad-checkpointing", PYTHON="echo")
    assert done.returncode == 0, done.stderr
    program, *settings = done.stdout.removeprefix("-u ").split()
    assert program == str(ROOT / "cn_clip" / "training" / "main.py")
    assert settings == [
        f"--train-data=/data/datasets/{dataset}/lmdb/train",
        f"--val-data=/data/datasets/{dataset}/lmdb/valid",
        "--num-workers=4",
        "--valid-num-workers=1",
        "--resume=/data/pretrained_weights/clip_cn_vit-b-16.pt",
        "--reset-data-offset",
        "--reset-optimizer",
        "--logs=/data/experiments/",
        f"--name={name}_finetune_vit-b-16_roberta-base_bs128_1gpu",
        "--save-step-frequency=999999",
        "--save-epoch-frequency=1",
        "--log-interval=1",
        "--report-training-batch-acc",
        "--context-length=52",
        "--warmup=100",
        "--batch-size=128",
        "--valid-batch-size=128",
        "--valid-step-interval=150",
        "--valid-epoch-interval=1",
        "--lr=5e-5",
        "--wd=0.001",
        "--max-epochs=3",
        "--vision-model=ViT-B-16",
        "--text-model=RoBERTa-wwm-ext-base-chinese",
        "--grad-checkpointing",
    ]


def test_a_setting_made_empty_is_left_out() -> None:
    done = bash(MUGE, "/data", PYTHON="echo", resume="", reset_optimizer="", reset_data_offset="")
    assert "--valid-num-workers=1 --logs=/data/experiments/" in done.stdout


def test_the_muge_script_trains_from_the_checkpoint_and_goes_on(datapath: Path) -> None:
    quick = {**SMALL, "num_workers": "0", "valid_num_workers": "0"}
    first = bash(MUGE, datapath, *ALONE, **quick, max_epochs="1", valid_step_interval="2")
    assert first.returncode == 0, first.stderr
    folder = datapath / "experiments" / "muge_finetune_vit-b-16_roberta-base_bs4_1gpu"
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"epoch1.pt", "epoch_latest.pt"}
    loaded = datapath / "pretrained_weights" / "clip_cn_vit-b-16.pt"
    assert f"=> loaded checkpoint '{loaded}'" in first.stderr
    for text in ("Global Steps: 3/3", "Image2Text Acc", "(epoch 1 @ 2 steps)", "(epoch 1 @ 3 steps)", "Rank 0"):
        assert text in first.stderr, text
    goes_on = {"resume": "", "reset_optimizer": "", "reset_data_offset": "", "val_data": "None"}
    second = bash(MUGE, datapath, *ALONE, **quick, **goes_on, max_epochs="2")
    assert second.returncode == 0, second.stderr
    assert "Global Steps: 3/6" not in second.stderr
    assert "Global Steps: 4/6" in second.stderr
    assert "Validation" not in second.stderr


@pytest.mark.parametrize(("setting", "value"), [("WORKER_CNT", "2"), ("GPUS_PER_NODE", "8"), ("RANK", "1")])
def test_more_than_one_process_is_refused_in_one_sentence(setting: str, value: str, datapath: Path) -> None:
    done = bash(MUGE, datapath, **{setting: value})
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"错误 / error: {setting}={value}: ")
    assert done.stderr.count("\n") == 1


def test_without_a_folder_the_usage_is_told() -> None:
    done = bash(MUGE)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"usage: bash {MUGE} DATAPATH" in done.stderr

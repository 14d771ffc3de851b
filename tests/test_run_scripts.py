"""The shell scripts of Chinese-CLIP: their settings, how many processes they start, that they train."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import warm_python
from dataset_files import tsv_line

from cn_clip import command, zoo
from cn_clip.clip.model import CLIP
from cn_clip.data.lmdb_store import Pair, SplitWriter
from cn_clip.demo import emoji
from cn_clip.training.params import Options

ROOT = Path(__file__).resolve().parents[1]
MAIN = str(ROOT / "cn_clip" / "training" / "main.py")
DATASETS = {"muge": "MUGE", "flickr30k": "Flickr30k-CN", "coco-cn": "COCO-CN"}
VARIANTS = ("", "_flip", "_flashattn", "_distillation")
NUM_PAIRS = 12
SMALL = {"vision_model": "ViT-Tiny-64", "text_model": "BERT-Tiny-chinese", "batch_size": "4", "valid_batch_size": "4"}
ALONE = ("--device=cpu", "--num-threads=1")


def script_of(dataset: str, variant: str = "") -> str:
    return f"run_scripts/{dataset}_finetune_vit-b-16_rbt-base{variant}.sh"


MUGE = script_of("muge")
# Whoever tests may have some of these set for themselves.
SETTINGS = {"PYTHON", "WORKER_CNT", "GPUS_PER_NODE", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "lr", "name"}


def bash(script: str, *args: object, **variables: str) -> "subprocess.CompletedProcess[str]":
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    python = warm_python.program()
    # torchrun starts its workers with PYTHON_EXEC.
    environment = {**inherited, "PYTHON": python, "PYTHON_EXEC": python, **variables}
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
    (folder / "pretrained_weights").mkdir()
    write_weights(folder / "pretrained_weights" / "clip_cn_vit-b-16.pt")
    return folder


def write_weights(path: Path) -> None:
    """Random ones of the small pair."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIP.from_config(zoo.model_config(SMALL["vision_model"], SMALL["text_model"]))
    torch.save({"state_dict": model.state_dict()}, path)


@pytest.mark.parametrize("script", sorted((ROOT / "run_scripts").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_have_valid_syntax(script: Path) -> None:
    done = subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.fixture
def recorder(tmp_path: Path) -> str:
    """A python that does nothing but print its arguments, and RANK, as one JSON line."""
    path = tmp_path / "python"
    code = "import json, os, sys; print(json.dumps([os.environ.get('RANK'), *sys.argv[1:]]))"
    path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S -c "{code}" "$@"\n')
    path.chmod(0o755)
    return str(path)


def arguments(script: str, *args: str, recorder: str, **variables: str) -> list[str]:
    """What the script hands to python, after the settings of the environment; the first one is RANK."""
    done = bash(script, *args, PYTHON=recorder, **variables)
    assert done.returncode == 0, done.stderr
    recorded: list[str] = json.loads(done.stdout)
    return recorded


# The original's settings. In its own scripts all variants of a dataset share one name; here each has its own, because
# a run that finds the checkpoints of another would go on from them. --init begins as the original's --resume with the
# two reset flags does; the same command again goes on.
COMMON = {
    "--num-workers": "4",
    "--valid-num-workers": "1",
    "--init": "/data/pretrained_weights/clip_cn_vit-b-16.pt",
    "--logs": "/data/experiments/",
    "--save-step-frequency": "999999",
    "--save-epoch-frequency": "1",
    "--log-interval": "1",
    "--report-training-batch-acc": "",
    "--context-length": "52",
    "--warmup": "100",
    "--batch-size": "128",
    "--valid-batch-size": "128",
    "--valid-step-interval": "150",
    "--valid-epoch-interval": "1",
    "--accum-freq": "1",
    "--lr": "5e-5",
    "--wd": "0.001",
    "--max-epochs": "3",
    "--vision-model": "ViT-B-16",
    "--use-augment": "",
    "--no-freeze-bn": "",
    "--text-model": "RoBERTa-wwm-ext-base-chinese",
}
OF_DATASET = {
    "muge": {},
    "flickr30k": {},
    "coco-cn": {
        "--warmup": "6",
        "--batch-size": "1024",
        "--lr": "3e-5",
        "--max-epochs": "20",
        "--valid-step-interval": "999999",
        "--grad-checkpointing": "",
    },
}
OF_VARIANT = {
    "": {},
    "_flip": {"--mask-ratio": "0.5"},
    "_flashattn": {"--use-flash-attention": ""},
    "_distillation": {
        "--distillation": "",
        "--teacher-model-name": "damo/multi-modal_team-vit-large-patch14_multi-modal-similarity",
        "--kd_loss_weight": "0.5",
    },
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_settings_are_those_of_the_original(dataset: str, variant: str, recorder: str) -> None:
    _, unbuffered, program, *settings = arguments(script_of(dataset, variant), "/data", "--debug", recorder=recorder)
    assert (unbuffered, program) == ("-u", MAIN)
    given = dict(setting.partition("=")[::2] for setting in settings)
    assert len(given) == len(settings)
    expected = COMMON | OF_DATASET[dataset] | OF_VARIANT[variant]
    folder = f"/data/datasets/{DATASETS[dataset]}/lmdb"
    name = f"{dataset}_finetune_vit-b-16_roberta-base{variant}_bs{expected['--batch-size']}_1gpu"
    data = {"--train-data": f"{folder}/train", "--val-data": f"{folder}/valid", "--name": name}
    assert given == {**expected, **data, "--debug": ""}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_the_training_command_takes_what_the_scripts_give(dataset: str, variant: str, recorder: str) -> None:
    script = script_of(dataset, variant)
    options = command.parse(Options, arguments(script, "/data", "--lr=1e-6", recorder=recorder)[3:])
    assert options.train_data == f"/data/datasets/{DATASETS[dataset]}/lmdb/train"
    assert options.lr == 1e-6  # what is given to the script is given last, and wins
    assert (options.use_augment, options.mask_ratio > 0) == (True, variant == "_flip")
    assert (options.use_flash_attention, options.distillation) == (variant == "_flashattn", variant == "_distillation")


def test_settings_of_the_environment_win_and_spaces_survive(recorder: str) -> None:
    of_user = {"mask_ratio": "0.75", "batch_size": "32", "teacher_model_name": "my teacher.pt", "use_augment": ""}
    given = arguments(script_of("muge", "_flip"), "/my data", "--seed", "7", recorder=recorder, **of_user)
    assert {"--mask-ratio=0.75", "--batch-size=32", "--teacher-model-name=my teacher.pt"} < set(given)
    assert "--train-data=/my data/datasets/MUGE/lmdb/train" in given
    assert "--use-augment" not in given
    assert given[-2:] == ["--seed", "7"]


def test_a_setting_made_empty_is_left_out(recorder: str) -> None:
    nothing = {"init": "", "resume": "", "reset_optimizer": "", "reset_data_offset": ""}
    given = arguments(MUGE, "/data", recorder=recorder, **nothing)[1:]
    assert [word for word in given if word == "" or word.startswith(("--init", "--resume", "--reset"))] == []


@pytest.mark.parametrize("resets", [{}, {"reset_optimizer": "", "reset_data_offset": ""}])
def test_a_file_to_resume_from_takes_the_place_of_init(resets: dict[str, str], recorder: str) -> None:
    given = arguments(MUGE, "/data", recorder=recorder, resume="/my model.pt", **resets)[1:]
    where = [word for word in given if word.startswith(("--init", "--resume", "--reset"))]
    assert where == ["--resume=/my model.pt", *([] if resets else ["--reset-data-offset", "--reset-optimizer"])]


def test_more_than_one_process_is_started_by_torchrun(recorder: str) -> None:
    several = {"WORKER_CNT": "2", "GPUS_PER_NODE": "8", "RANK": "1", "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29501"}
    rank, *given = arguments(MUGE, "/data", recorder=recorder, **several)
    assert rank is None  # the number of the machine, which is no rank
    assert given[: given.index(MAIN)] == [
        *("-u", "-m", "torch.distributed.run"),
        *("--nproc_per_node=8", "--nnodes=2", "--node_rank=1", "--master_addr=10.0.0.7", "--master_port=29501", "--"),
    ]
    assert "--name=muge_finetune_vit-b-16_roberta-base_bs128_16gpu" in given


def test_several_processes_of_one_machine_need_no_address(recorder: str) -> None:
    given = arguments(MUGE, "/data", recorder=recorder, GPUS_PER_NODE="2")
    assert {"--nnodes=1", "--node_rank=0", "--master_addr=localhost", "--master_port=8514"} < set(given)


def test_torchrun_understands_how_it_is_called(tmp_path: Path) -> None:
    """Two processes with the environment that torchrun gives, in the place of the training command."""
    checkout = tmp_path / "checkout"
    (checkout / "cn_clip" / "training").mkdir(parents=True)
    (checkout / "run_scripts").symlink_to(ROOT / "run_scripts")
    facts = "*map(os.environ.get, ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_PORT'))"
    # Written at once, so that the other process does not come in between.
    program = f"import os\nos.write(1, ' '.join(['fact', {facts}]).encode() + b'\\n')\n"
    (checkout / "cn_clip" / "training" / "main.py").write_text(program)
    port = str(free_port())
    script = checkout / "run_scripts" / "muge_finetune_vit-b-16_rbt-base.sh"
    done = bash(str(script), "/data", GPUS_PER_NODE="2", MASTER_PORT=port, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"fact 0 0 2 {port}", f"fact 1 1 2 {port}"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.mark.long
@pytest.mark.usefixtures("full_towers")
def test_the_muge_script_killed_and_started_again_goes_on(datapath: Path, tmp_path: Path) -> None:
    loaded = tmp_path / "full.pt"  # the processes of this test know no shortcuts
    write_weights(loaded)
    quick = {**SMALL, "num_workers": "0", "valid_num_workers": "0", "valid_step_interval": "2", "init": str(loaded)}
    quick |= {"max_epochs": "2", "save_step_frequency": "1", "PYTHON": sys.executable}
    inherited = {name: value for name, value in os.environ.items() if name not in SETTINGS}
    lines = []
    with subprocess.Popen(
        ["bash", MUGE, datapath, *ALONE], cwd=ROOT, env={**inherited, **quick}, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if "Saved checkpoint" in line and "@ 4 steps" in line:
                process.kill()  # the script has become the training command: there is one process
    first = "".join(lines)
    assert process.returncode == -signal.SIGKILL, first
    folder = datapath / "experiments" / "muge_finetune_vit-b-16_roberta-base_bs4_1gpu"
    assert f"=> loaded checkpoint '{loaded}' (epoch 0 @ 0 steps)" in first
    for text in ("Global Steps: 3/6", "Image2Text Acc", "(epoch 1 @ 2 steps)", "(epoch 1 @ 3 steps)", "Rank 0"):
        assert text in first, text
    second = bash(MUGE, datapath, *ALONE, **quick)
    assert second.returncode == 0, second.stderr
    assert f"it goes on from {folder / 'checkpoints' / 'epoch_latest.pt'}" in second.stderr
    assert "Global Steps: 4/6" not in second.stderr
    assert "Global Steps: 6/6" in second.stderr
    assert {"epoch2.pt", "epoch_latest.pt"} <= {path.name for path in (folder / "checkpoints").iterdir()}
    again = bash(MUGE, datapath, *ALONE, **{**quick, "init": "", "resume": str(loaded)})
    assert again.returncode == 1
    assert f"would begin at step 0, but {folder / 'checkpoints' / 'epoch_latest.pt'} holds step 6" in again.stderr
    assert f"give --init {loaded}" in again.stderr


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"WORKER_CNT": "0"}, "WORKER_CNT=0: "),
        ({"GPUS_PER_NODE": "all"}, "GPUS_PER_NODE=all: "),
        ({"RANK": "1"}, "RANK=1: expected 0 to WORKER_CNT-1=0"),
        ({"RANK": "-1"}, "RANK=-1: "),
        ({"WORKER_CNT": "2"}, "MASTER_ADDR: "),
    ],
)
def test_machines_that_do_not_add_up_are_refused_in_one_sentence(settings: dict[str, str], words: str) -> None:
    for language, begins in (("en", "error: "), ("zh", "错误：")):
        done = bash(MUGE, "/data", **settings, CN_CLIP_LANG=language)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(begins + (words if language == "en" else words.partition(" ")[0]))
        assert done.stderr.count("\n") == 1


def test_without_a_folder_the_usage_is_told() -> None:
    done = bash(MUGE)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"usage: bash {MUGE} DATAPATH" in done.stderr

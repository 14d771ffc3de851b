"""Training as users start it: log lines, files, resuming, and the reasons it gives for stopping."""

import re
import subprocess
from pathlib import Path

import pytest
import torch
from training_runs import load, losses, small_lmdb, train

from cn_clip.clip.loading import open_model

# The recall of this run rises: it has a best checkpoint.
BETTER = ("--lr=1e-3", "--seed=3")


@pytest.fixture(scope="module")
def lmdb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_lmdb(tmp_path_factory.mktemp("emoji"))


@pytest.fixture(scope="module")
def finished(lmdb: Path, tmp_path_factory: pytest.TempPathFactory) -> "tuple[Path, subprocess.CompletedProcess[str]]":
    """Two epochs of three steps, validated, with a checkpoint in the middle of each epoch."""
    logs = tmp_path_factory.mktemp("logs")
    result = train(
        lmdb / "train",
        logs,
        f"--val-data={lmdb / 'valid'}",
        *("--batch-size=8", "--valid-batch-size=8", "--max-epochs=2", "--save-step-frequency=2", "--name=run"),
        *("--report-training-batch-acc", "--keep-checkpoints=-1", *BETTER),
    )
    assert result.returncode == 0, result.stderr
    return logs / "run", result


def test_log_lines_on_screen_and_in_the_file_are_those_of_the_guides(
    finished: "tuple[Path, subprocess.CompletedProcess[str]]",
) -> None:
    folder, result = finished
    (log,) = folder.glob("out_????-??-??-??-??-??.log")
    text = log.read_text(encoding="utf-8")
    step = (
        r"\d{4}-\d\d-\d\d,\d\d:\d\d:\d\d \| INFO \| Rank 0 \| Global Steps: 1/6 \| Train Epoch: 1 \[8/24 \(33%\)\] \| "
        r"Loss: \d+\.\d{6} \| Image2Text Acc: \d+\.\d\d \| Text2Image Acc: \d+\.\d\d \| Data Time: \d+\.\d{3}s \| "
        r"Batch Time: \d+\.\d{3}s \| LR: \d\.\d{6} \| logit_scale: 2\.\d{3} \| Global Batch Size: 8\n"
    )
    validation = (
        r"\d{4}-\d\d-\d\d,\d\d:\d\d:\d\d \| INFO \| Rank 0 \| Validation Result \(epoch 2 @ 6 steps\) \| "
        r"Valid Loss: \d+\.\d{6} \| Image2Text Acc: \d+\.\d\d \| Text2Image Acc: \d+\.\d\d \| logit_scale: 2\.\d{3} \| "
        r"Valid Batch Size: 8\n"
    )
    recall = r"Validation Recall \(epoch 2 @ 6 steps\) \| 24 images, 24 texts \| Text2Image R@1: \d+\.\d\d R@5: "
    for pattern in (step, validation, recall):
        assert re.search(pattern, text), pattern
        assert re.search(pattern, result.stderr), pattern
    assert len(losses(text)) == 6
    (params,) = folder.glob("params_*.txt")
    assert "batch_size: 8\n" in params.read_text(encoding="utf-8")


def test_checkpoints_have_the_keys_and_names_of_the_reference(
    finished: "tuple[Path, subprocess.CompletedProcess[str]]",
) -> None:
    folder = finished[0] / "checkpoints"
    names = {"epoch1.pt", "epoch2.pt", "epoch_1_2.pt", "epoch_2_4.pt", "epoch_2_6.pt"}
    names |= {"epoch_latest.pt", "epoch_best.pt"}
    assert {path.name for path in folder.iterdir()} == names
    content = load(folder / "epoch_latest.pt")
    assert (content["epoch"], content["step"], content["name"]) == (2, 6, "run")
    assert all(key.startswith("module.") for key in content["state_dict"])
    assert set(content["optimizer"]) == {"state", "param_groups"}
    middle = load(folder / "epoch_1_2.pt")
    assert (middle["epoch"], middle["step"]) == (1, 2)
    model, checkpoint = open_model(folder / "epoch_latest.pt")
    assert checkpoint.step == 6
    assert torch.equal(model.logit_scale, content["state_dict"]["module.logit_scale"])


@pytest.mark.parametrize("checkpoint", ["epoch_1_2.pt", "epoch1.pt"])
def test_a_resumed_run_ends_with_the_very_weights_of_an_uninterrupted_one(
    checkpoint: str, lmdb: Path, finished: "tuple[Path, subprocess.CompletedProcess[str]]", tmp_path: Path
) -> None:
    folder, whole = finished
    begin = folder / "checkpoints" / checkpoint
    flags = ("--batch-size=8", "--max-epochs=2", f"--resume={begin}", "--name=again", *BETTER)
    resumed = train(lmdb / "train", tmp_path, *flags)
    assert resumed.returncode == 0, resumed.stderr
    step = load(begin)["step"]
    assert losses(resumed.stderr) == losses(whole.stderr)[step:]
    ours, theirs = (load(path / "checkpoints" / "epoch_latest.pt") for path in (tmp_path / "again", folder))
    for key, value in theirs["state_dict"].items():
        assert torch.equal(ours["state_dict"][key], value), key
    assert ours["step"] == 6


def test_a_run_of_the_same_name_goes_on_from_its_latest_checkpoint(
    lmdb: Path, finished: "tuple[Path, subprocess.CompletedProcess[str]]", tmp_path: Path
) -> None:
    args = ("--batch-size=8", "--name=twice")
    assert train(lmdb / "train", tmp_path, *args, "--max-epochs=1").returncode == 0
    result = train(lmdb / "train", tmp_path, *args, "--max-epochs=2")
    assert "=> loaded checkpoint" in result.stderr
    assert "Global Steps: 3/" not in result.stderr
    assert "Global Steps: 4/6" in result.stderr


def test_weights_alone_are_taken_with_the_reset_flags(
    lmdb: Path, finished: "tuple[Path, subprocess.CompletedProcess[str]]", tmp_path: Path
) -> None:
    begin = finished[0] / "checkpoints" / "epoch2.pt"
    flags = ("--reset-optimizer", "--reset-data-offset", "--max-steps=1", "--batch-size=8", "--name=fine")
    result = train(lmdb / "train", tmp_path, f"--resume={begin}", *flags)
    assert result.returncode == 0, result.stderr
    assert "optimizer state is restored" not in result.stderr
    assert "Global Steps: 1/1 | Train Epoch: 1 [8/24 (33%)]" in result.stderr
    content = load(tmp_path / "fine" / "checkpoints" / "epoch_latest.pt")
    assert {state["step"].item() for state in content["optimizer"]["state"].values()} == {1.0}


@pytest.mark.parametrize(
    ("args", "status", "message"),
    [
        (
            ["--resume=no/such.pt"],
            1,
            "--resume no/such.pt: no such file; training stops rather than start from scratch",
        ),
        (
            ["--resume=weights/clip_cn_vit-b-16.pt"],
            1,
            "no such file; fetch it with: cn-clip download ViT-B-16 --download-root weights; training stops",
        ),
        (
            ["--resume=Emoji-Tiny", "--reset-optimizer"],
            1,
            "is it another architecture? It holds RN-Small-64 @ BERT-Tiny-chinese: "
            "give --vision-model RN-Small-64 --text-model BERT-Tiny-chinese",
        ),
        (["--batch-size=25"], 1, "--batch-size 25: larger than the 24 pairs of the data"),
        (["--bach-size=8"], 2, "--bach-size"),
        (["--precision=fp16"], 1, "--precision fp16: needs CUDA"),
        (["--accum-freq=4"], 1, "--accum-freq 4: an epoch has 3 batches, too few for one update"),
        (["--fsdp"], 1, "--fsdp: splits a model over several processes, there is one; start it with torchrun"),
        (["--vision-model=ViT-X"], 2, "ViT-X"),
        (["--device=cuda:7"], 1, "cuda:7 was asked for"),
    ],
)
def test_a_run_that_cannot_be_stops_at_once_with_the_reason(
    args: list[str], status: int, message: str, lmdb: Path, tmp_path: Path
) -> None:
    if "cuda" in " ".join(args) and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    result = train(lmdb / "train", tmp_path, "--batch-size=8", "--max-steps=1", *args)
    assert result.returncode == status, result.stderr
    assert message in result.stderr
    assert not list(tmp_path.rglob("*.pt"))


def test_missing_data_is_named(tmp_path: Path) -> None:
    result = train(tmp_path / "nothing", tmp_path, "--max-steps=1")
    assert result.returncode == 1
    assert str(tmp_path / "nothing") in result.stderr
    assert "Traceback" not in result.stderr


def test_another_batch_size_in_the_middle_of_an_epoch_asks_for_reset_data_offset(
    lmdb: Path, finished: "tuple[Path, subprocess.CompletedProcess[str]]", tmp_path: Path
) -> None:
    begin = finished[0] / "checkpoints" / "epoch_1_2.pt"
    result = train(lmdb / "train", tmp_path, "--batch-size=4", "--max-epochs=2", f"--resume={begin}")
    assert result.returncode == 1
    assert "num_batches was 3, is 6; batch_size was 8, is 4; global_batch was 8, is 4" in result.stderr
    assert "--reset-data-offset" in result.stderr


def test_a_frozen_picture_tower_keeps_every_weight_and_statistic(lmdb: Path, tmp_path: Path) -> None:
    first = train(lmdb / "train", tmp_path, "--vision-model=RN-Tiny-64", "--batch-size=8", "--max-steps=1", "--name=a")
    assert first.returncode == 0, first.stderr
    begin = tmp_path / "a" / "checkpoints" / "epoch_latest.pt"
    flags = ("--freeze-vision", "--reset-optimizer", "--reset-data-offset", "--batch-size=8", "--max-steps=2")
    second = train(lmdb / "train", tmp_path, "--vision-model=RN-Tiny-64", f"--resume={begin}", *flags, "--name=b")
    assert second.returncode == 0, second.stderr
    before, after = load(begin)["state_dict"], load(tmp_path / "b/checkpoints/epoch_latest.pt")["state_dict"]
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed
    assert not [key for key in changed if key.startswith("module.visual.")]

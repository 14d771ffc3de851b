"""Runs killed, told to stop or meeting a full disk: nothing finished is lost, and the rest is as if nothing was."""

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import warm_python
from test_distributed import torchrun
from training_runs import ROOT, TINY, load, losses, small_lmdb, train

# All that draws random numbers: dropout, patch masks, augmentation in a worker, shuffling; and joined batches.
FLAGS = ["--batch-size=4", "--accum-freq=2", "--max-epochs=4", "--valid-batch-size=8", "--mask-ratio=0.5"]
FLAGS += ["--use-augment", "--num-workers=1", "--save-step-frequency=1", "--name=run"]
FLAGS += ["--save-epoch-frequency=-1", "--keep-checkpoints=2", "--valid-step-interval=5"]
NUM_STEPS = 12


WITH_LITTLE_ROOM = """
import resource, sys
from cn_clip.training.main import main
resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def lmdb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_lmdb(tmp_path_factory.mktemp("emoji"))


@pytest.fixture(scope="module")
def whole(lmdb: Path, tmp_path_factory: pytest.TempPathFactory) -> "tuple[Path, subprocess.CompletedProcess[str]]":
    """A run nothing happens to."""
    logs = tmp_path_factory.mktemp("whole")
    result = train(lmdb / "train", logs, f"--val-data={lmdb / 'valid'}", *FLAGS)
    assert result.returncode == 0, result.stderr
    return logs / "run" / "checkpoints", result


def stopped_after(step: int, number: signal.Signals, lmdb: Path, logs: Path, *more: str) -> tuple[int, str]:
    """Exit status and log of a run whose processes all get a signal once it has logged this step."""
    command = [
        warm_python.program(),
        "cn_clip/training/main.py",
        f"--train-data={lmdb / 'train'}",
        f"--logs={logs}",
        *TINY,
    ]
    command += [f"--val-data={lmdb / 'valid'}", *FLAGS, *more]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    lines = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if f"Global Steps: {step}/" in line:
                os.killpg(process.pid, number)
    return process.returncode, "".join(lines)


def assert_same_run(ours: Path, theirs: Path) -> None:
    """Weights, optimizer state and random state are equal to the last bit."""
    first, second = load(ours / "epoch_latest.pt"), load(theirs / "epoch_latest.pt")
    assert first["step"] == second["step"] == NUM_STEPS

    def compare(a: Any, b: Any, where: str) -> None:
        assert type(a) is type(b), where
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), where
        elif isinstance(a, dict):
            assert a.keys() == b.keys(), where
            for key in a:
                compare(a[key], b[key], f"{where}.{key}")
        elif isinstance(a, list):
            assert len(a) == len(b), where
            for number, (left, right) in enumerate(zip(a, b, strict=True)):
                compare(left, right, f"{where}[{number}]")
        else:
            assert a == b, where

    compare(first, second, "checkpoint")


def test_a_run_killed_at_any_moment_goes_on_to_the_very_weights_of_an_uninterrupted_one(
    lmdb: Path, whole: "tuple[Path, subprocess.CompletedProcess[str]]", tmp_path: Path
) -> None:
    status, _ = stopped_after(5, signal.SIGKILL, lmdb, tmp_path)
    assert status == -signal.SIGKILL
    result = train(lmdb / "train", tmp_path, f"--val-data={lmdb / 'valid'}", *FLAGS)
    assert result.returncode == 0, result.stderr
    again = losses(result.stderr)
    assert 0 < len(again) < NUM_STEPS
    assert again == losses(whole[1].stderr)[-len(again) :]
    assert_same_run(tmp_path / "run" / "checkpoints", whole[0])


def test_sigterm_saves_first_and_the_same_command_goes_on(
    lmdb: Path, whole: "tuple[Path, subprocess.CompletedProcess[str]]", tmp_path: Path
) -> None:
    status, log = stopped_after(4, signal.SIGTERM, lmdb, tmp_path, "--save-step-frequency=-1")
    assert status == 128 + signal.SIGTERM
    assert "Stopped by SIGTERM; the same command goes on from here." in log
    latest = load(tmp_path / "run" / "checkpoints" / "epoch_latest.pt")
    assert 4 <= latest["step"] < NUM_STEPS  # a busy machine may deliver the signal late
    result = train(lmdb / "train", tmp_path, f"--val-data={lmdb / 'valid'}", *FLAGS)
    assert result.returncode == 0, result.stderr
    assert len(losses(result.stderr)) == NUM_STEPS - latest["step"]
    assert_same_run(tmp_path / "run" / "checkpoints", whole[0])


def test_a_torn_latest_file_gives_way_to_the_last_good_one(
    lmdb: Path, whole: "tuple[Path, subprocess.CompletedProcess[str]]", tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    good = whole[0] / "epoch_4_12.pt"
    (folder / "epoch_4_12.pt").write_bytes(good.read_bytes())
    (folder / "epoch_latest.pt").write_bytes(good.read_bytes()[:100_000])
    result = train(lmdb / "train", tmp_path, *FLAGS)
    assert result.returncode == 0, result.stderr
    assert "epoch_latest.pt: is cut off, or damaged" in result.stderr
    assert f"=> loaded checkpoint '{folder / 'epoch_4_12.pt'}' (epoch 4 @ 12 steps)" in result.stderr


def test_only_the_newest_files_are_kept_besides_the_latest_and_the_best(
    whole: "tuple[Path, subprocess.CompletedProcess[str]]",
) -> None:
    kept = {path.name for path in whole[0].iterdir()}
    assert kept == {"epoch_4_12.pt", "epoch4.pt", "epoch_latest.pt", "epoch_best.pt"}


def test_a_full_disk_leaves_the_earlier_file_and_says_what_helps(
    lmdb: Path, whole: "tuple[Path, subprocess.CompletedProcess[str]]", tmp_path: Path
) -> None:
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    before = (whole[0] / "epoch_4_12.pt").read_bytes()
    (folder / "epoch_latest.pt").write_bytes(before)
    flags = [f"--train-data={lmdb / 'train'}", f"--logs={tmp_path}", *TINY, *FLAGS, "--max-epochs=5"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    limited = [warm_python.program(), "-c", WITH_LITTLE_ROOM, *flags]
    result = subprocess.run(limited, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1, result.stderr
    assert "could not be written" in result.stderr
    assert "--keep-checkpoints N deletes old ones" in result.stderr
    assert "Traceback" not in result.stderr
    assert (folder / "epoch_latest.pt").read_bytes() == before
    assert [path.name for path in folder.iterdir()] == ["epoch_latest.pt"]


def test_a_loss_that_is_not_finite_stops_with_step_and_batch_and_saves_nothing(lmdb: Path, tmp_path: Path) -> None:
    flags = ["--batch-size=8", "--max-steps=6", "--save-step-frequency=1", "--lr=1e30", "--warmup=0", "--name=run"]
    result = train(lmdb / "train", tmp_path, *flags)
    assert result.returncode == 1
    assert "the loss is nan, logit_scale" in result.stderr
    listed = re.search(r"\(image id, text id\) of the batch: ((?:\(\d+, \d+\)(?:, )?)+); the last", result.stderr)
    assert listed is not None
    assert listed[1].count("(") == 8
    for path in (tmp_path / "run" / "checkpoints").iterdir():
        assert all(torch.isfinite(value).all() for value in load(path)["state_dict"].values() if value.ndim < 2)


def test_validation_begins_before_the_first_step_and_early_stop_ends_a_run_that_does_not_improve(
    lmdb: Path, tmp_path: Path, drawn: None
) -> None:
    flags = ["--batch-size=8", "--valid-batch-size=8", "--lr=1e-12", "--valid-step-interval=1", "--early-stop=2"]
    result = train(lmdb / "train", tmp_path, f"--val-data={lmdb / 'valid'}", *flags, "--name=run")
    assert result.returncode == 0, result.stderr
    assert result.stderr.index("Validation Recall (epoch 0 @ 0 steps)") < result.stderr.index("Global Steps: 1/")
    assert len(losses(result.stderr)) == 2
    assert "Stopping training: 2 validations without a better mean recall than" in result.stderr
    folder = tmp_path / "run"
    assert {"metrics.jsonl", "curves.png"} <= {path.name for path in folder.iterdir()}
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["epoch_latest.pt"]  # the epoch is not done
    assert "samples/s | Peak Memory: " in result.stderr


@pytest.mark.long
def test_checkpoints_of_two_processes_split_or_not_go_on_in_one(lmdb: Path, tmp_path: Path) -> None:
    common = [f"--train-data={lmdb / 'train'}", f"--logs={tmp_path}", *TINY, "--batch-size=4", "--max-epochs=1"]
    for name, flags in (("ddp", []), ("fsdp", ["--fsdp"])):
        result = torchrun(
            "cn_clip/training/main.py",
            *common,
            *flags,
            f"--name={name}",
            f"--val-data={lmdb / 'valid'}",
            "--valid-batch-size=4",
        )
        assert result.returncode == 0, result.stderr
        assert "Train Epoch: 1 [24/24 (100%)]" in result.stderr
        assert "Global Batch Size: 8" in result.stderr
        assert "Rank 1" not in result.stderr
    split, copied = (load(tmp_path / name / "checkpoints" / "epoch_latest.pt") for name in ("fsdp", "ddp"))
    for key, value in copied["state_dict"].items():
        # Adam divides by the root of tiny squares: rounding differences of a gradient near 0 move a weight visibly.
        assert (split["state_dict"][key] - value).abs().float().median() < 1e-6, key
    assert split["optimizer"]["state"].keys() == copied["optimizer"]["state"].keys()
    resume = f"--resume={tmp_path / 'fsdp' / 'checkpoints' / 'epoch_latest.pt'}"
    flags = ["--batch-size=8", "--max-epochs=2", resume, "--name=one"]
    changed = train(lmdb / "train", tmp_path, *flags)
    assert changed.returncode == 1
    assert "world_size was 2, is 1" in changed.stderr
    assert "--reset-data-offset" in changed.stderr
    alone = train(lmdb / "train", tmp_path, *flags, "--reset-data-offset")
    assert alone.returncode == 0, alone.stderr
    assert "optimizer state is restored" in alone.stderr
    together = torchrun(
        "cn_clip/training/main.py", *common, "--fsdp", resume.replace("fsdp", "ddp"), "--max-epochs=2", "--name=two"
    )
    assert together.returncode == 0, together.stderr
    assert "Global Steps: 6/6" in together.stderr

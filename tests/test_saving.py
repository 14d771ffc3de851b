"""Checkpoints written while training goes on: they hold what was true when they were begun, and none is lost."""

import logging
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import warm_python
from faults.small_towers import TEXT, VISION, shrink
from in_process_runs import build, checkpoint, emoji_split, run
from training_runs import ROOT, TINY

from cn_clip import zoo
from cn_clip.errors import CheckpointError
from cn_clip.training import adapt, saving, state
from cn_clip.training.saving import Writer, in_host_memory
from cn_clip.training.trainer import Trainer

PER_EPOCH = 3  # twelve pairs, four a batch
SMALL: dict[str, Any] = {"vision_model": VISION, "text_model": TEXT}
QUIET: dict[str, Any] = {"valid_epoch_interval": -1, "val_data": None, **SMALL}


@pytest.fixture(autouse=True, scope="module")
def small_towers() -> Iterator[None]:
    """Files of 2 MB instead of 100: nothing here depends on what the towers are."""
    configs = (zoo.vision_config(VISION), zoo.text_config(TEXT))
    before = [dict(vars(config)) for config in configs]
    shrink()
    yield
    for config, values in zip(configs, before, strict=True):
        for name, value in values.items():
            object.__setattr__(config, name, value)


@pytest.fixture
def split(tmp_path: Path) -> Path:
    return emoji_split(tmp_path / "split")


@pytest.fixture
def in_background(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(saving, "is_worth_a_copy", lambda _: True)


def assert_same(ours: Any, theirs: Any, where: str = "checkpoint") -> None:
    assert type(ours) is type(theirs), where
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key, value in ours.items():
            assert_same(value, theirs[key], f"{where}.{key}")
    elif isinstance(ours, list):
        assert len(ours) == len(theirs), where
        for number, value in enumerate(ours):
            assert_same(value, theirs[number], f"{where}[{number}]")
    else:
        assert ours == theirs, where


# --- copies


def test_a_copy_in_host_memory_keeps_its_values_whatever_training_does_next() -> None:
    weight, step = torch.tensor([1.0, 2.0]), torch.tensor(3.0)
    content = {"state_dict": {"w": weight}, "optimizer": {"state": {0: {"step": step}}, "groups": [{"lr": 0.5}]}}
    copy, same = in_host_memory(content, own=True), in_host_memory(content)
    weight += 1
    step += 1
    assert copy["state_dict"]["w"].tolist() == [1.0, 2.0]
    assert copy["optimizer"] == {"state": {0: {"step": torch.tensor(3.0)}}, "groups": [{"lr": 0.5}]}
    assert same["state_dict"]["w"] is not copy["state_dict"]["w"]
    assert same["state_dict"]["w"].tolist() == [2.0, 3.0]  # on the CPU already: not copied unless asked for


def test_a_tensor_of_two_files_is_copied_once() -> None:
    weight = torch.ones(4)
    first, second = in_host_memory([{"w": weight}, {"w": weight}], own=True)
    assert first["w"] is second["w"]
    assert first["w"].data_ptr() != weight.data_ptr()


def test_only_a_device_other_than_the_cpu_is_worth_a_copy() -> None:
    answers = {kind: saving.is_worth_a_copy(torch.device(kind)) for kind in ("cpu", "cuda", "mps")}
    assert answers == {"cpu": False, "cuda": True, "mps": True}


# --- the writer


def test_a_writer_goes_on_at_once_and_writes_one_after_the_other() -> None:
    go_on, done = threading.Event(), []

    def slowly(content: list[torch.Tensor]) -> None:
        assert go_on.wait(60)
        done.append(content[0].item())

    with Writer(in_background=True) as writer:
        value = torch.tensor(1.0)
        writer.write([value], slowly)
        value += 1
        assert done == []
        go_on.set()
        writer.write([value], slowly)
        value += 1
    assert done == [1.0, 2.0]


def test_a_writer_in_the_foreground_is_done_when_it_returns_and_copies_nothing() -> None:
    value, got = torch.ones(2), []
    Writer(in_background=False).write([value], lambda content: got.append((content[0], threading.current_thread())))
    assert got == [(value, threading.main_thread())]
    assert got[0][0] is value


def test_nothing_is_written_after_a_failure(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: str) -> None:
        raise CheckpointError("the disk is full")

    monkeypatch.setattr(saving.logger, "propagate", True)
    done: list[str] = []
    writer = Writer(in_background=True)

    def train() -> None:
        with writer:
            writer.write("first", fail)
            writer.write("second", done.append)
            raise ValueError("of the run")

    with pytest.raises(ValueError, match="of the run"):
        train()
    assert (str(writer.wait()), done) == ("the disk is full", [])
    assert [record.getMessage() for record in caplog.records] == ["the disk is full"]  # both are said


# --- runs


def test_a_run_in_the_background_leaves_the_files_of_one_in_the_foreground(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_epochs": 3, "save_step_frequency": 2, "valid_step_interval": 2, "keep_checkpoints": 3, **SMALL}
    run(split, tmp_path / "foreground", **settings)
    monkeypatch.setattr(saving, "is_worth_a_copy", lambda _: True)
    log = run(split, tmp_path / "background", **settings)
    ours, theirs = (
        {path.name: torch.load(path, weights_only=True) for path in (tmp_path / name / "x/checkpoints").iterdir()}
        for name in ("background", "foreground")
    )
    assert_same(ours, theirs)
    assert "epoch_latest.pt" in ours
    assert len(ours) >= 4
    assert "Deleted old checkpoint" in log


def test_a_file_holds_the_weights_of_its_step_though_steps_were_done_while_it_was_written(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: None
) -> None:
    third_step, save, step = threading.Event(), state.save, Trainer._step

    def late(content: dict[str, Any], paths: list[Path]) -> None:
        assert content["step"] > 1 or third_step.wait(60)
        save(content, paths)

    def told(self: Trainer, number: int, batches: Any) -> Any:
        scores = step(self, number, batches)
        if number == 2:
            third_step.set()
        return scores

    monkeypatch.setattr(state, "save", late)
    monkeypatch.setattr(Trainer, "_step", told)
    settings = {"max_steps": 3, **QUIET}

    def save_first(self: Trainer, *_: Any, **__: Any) -> None:
        if self.position.step == 1:
            self._save(["epoch_1_1.pt", state.LATEST])

    monkeypatch.setattr(Trainer, "_leave_if_asked", save_first)
    run(split, tmp_path, **settings)
    first = checkpoint(tmp_path, file="epoch_1_1.pt")
    monkeypatch.undo()
    run(split, tmp_path, name="alone", max_steps=3, save_step_frequency=1, keep_checkpoints=-1, **QUIET)
    alone = checkpoint(tmp_path, "alone", "epoch_1_1.pt")
    for key in ("state_dict", "optimizer", "step"):
        assert_same(first[key], alone[key], key)
    assert checkpoint(tmp_path)["step"] == 3


def test_a_disk_that_fills_up_meanwhile_ends_the_run_at_its_next_step_and_leaves_the_file_before(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: None
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    run(split, tmp_path, max_steps=1, **QUIET)
    before = (tmp_path / "x/checkpoints/epoch_latest.pt").read_bytes()
    monkeypatch.setattr(torch, "save", full)
    message = r"could not be written \(.*No space left on device.*\); the checkpoints written before are intact"
    with pytest.raises(CheckpointError, match=message):
        run(split, tmp_path, max_epochs=100, save_step_frequency=1, **QUIET)
    assert (tmp_path / "x/checkpoints/epoch_latest.pt").read_bytes() == before
    assert not list((tmp_path / "x/checkpoints").glob(".*"))


def test_a_run_that_is_told_to_stop_waits_for_the_file_that_is_being_written(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: None
) -> None:
    save, step, begun = state.save, Trainer._step, threading.Event()

    def slowly(content: dict[str, Any], paths: list[Path]) -> None:
        begun.set()
        time.sleep(0.2)
        save(content, paths)

    def ask(self: Trainer, *arguments: Any) -> Any:
        self.stop_request.number = signal.SIGTERM
        return step(self, *arguments)

    monkeypatch.setattr(state, "save", slowly)
    monkeypatch.setattr(Trainer, "_step", ask)
    with pytest.raises(SystemExit) as left:
        run(split, tmp_path, max_epochs=1, **QUIET)
    assert left.value.code == 128 + signal.SIGTERM
    assert begun.is_set()
    assert checkpoint(tmp_path)["step"] == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]


def test_an_error_in_a_step_leaves_the_file_that_was_being_written_whole(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: None
) -> None:
    save = state.save

    def slowly(content: dict[str, Any], paths: list[Path]) -> None:
        time.sleep(0.2)
        save(content, paths)

    monkeypatch.setattr(state, "save", slowly)
    trainer = build(split, tmp_path, max_steps=3, save_step_frequency=1, **QUIET)
    step = Trainer._step

    def spoil(self: Trainer, number: int, batches: Any) -> Any:
        if number == 1:
            raise RuntimeError("a fault")
        return step(self, number, batches)

    monkeypatch.setattr(Trainer, "_step", spoil)
    with pytest.raises(RuntimeError, match="a fault"):
        trainer.train()
    saved = torch.load(tmp_path / "epoch_latest.pt", weights_only=True)
    assert saved["step"] == 1
    assert_same(
        saved["state_dict"], {f"module.{k}": v for k, v in adapt.file_names(trainer.model.state_dict()).items()}
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="workers are not forked here")
def test_loading_processes_start_and_end_while_a_file_is_written(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_background: None
) -> None:
    save, started, epochs = state.save, threading.Event(), []
    updates = Trainer._updates

    def until_workers_run(content: dict[str, Any], paths: list[Path]) -> None:
        logging.getLogger("cn_clip").debug("begins")
        assert content["step"] > PER_EPOCH or started.wait(60)
        save(content, paths)

    def told(self: Trainer, epoch: int) -> Iterator[Any]:
        for number, batches in enumerate(updates(self, epoch)):
            if epoch == 1 and number == 0:  # the workers of the second epoch have given their first batch
                epochs.append(epoch)
                started.set()
            yield batches

    monkeypatch.setattr(state, "save", until_workers_run)
    monkeypatch.setattr(Trainer, "_updates", told)
    run(split, tmp_path, max_epochs=2, num_workers=2, **QUIET)
    assert epochs == [1]
    assert checkpoint(tmp_path)["step"] == 2 * PER_EPOCH


# --- how many are kept, and what they take


def epoch_names(logs: Path) -> list[str]:
    return sorted(path.name for path in (logs / "x/checkpoints").glob("epoch?.pt"))


def test_a_run_keeps_its_two_newest_files_unless_it_is_told_otherwise(split: Path, tmp_path: Path) -> None:
    run(split, tmp_path, max_epochs=4, **QUIET)
    assert epoch_names(tmp_path) == ["epoch3.pt", "epoch4.pt"]
    run(split, tmp_path / "all", max_epochs=4, keep_checkpoints=-1, **QUIET)
    assert epoch_names(tmp_path / "all") == ["epoch1.pt", "epoch2.pt", "epoch3.pt", "epoch4.pt"]


def test_files_of_a_run_that_kept_all_stay_unless_a_number_is_given(split: Path, tmp_path: Path) -> None:
    run(split, tmp_path, max_epochs=4, keep_checkpoints=-1, **QUIET)
    log = run(split, tmp_path, max_epochs=7, **QUIET)
    assert epoch_names(tmp_path) == [f"epoch{number}.pt" for number in (1, 2, 3, 4, 6, 7)]
    assert "4 checkpoints of runs before are kept; --keep-checkpoints 2 would delete the old ones" in log
    run(split, tmp_path, max_epochs=8, keep_checkpoints=2, **QUIET)
    assert epoch_names(tmp_path) == ["epoch7.pt", "epoch8.pt"]


def test_few_files_of_a_run_that_kept_all_stay_too_however_often_it_goes_on(split: Path, tmp_path: Path) -> None:
    run(split, tmp_path, max_epochs=2, keep_checkpoints=-1, **QUIET)
    for epochs in (5, 6):
        run(split, tmp_path, max_epochs=epochs, **QUIET)
        assert epoch_names(tmp_path) == [f"epoch{number}.pt" for number in (1, 2, epochs - 1, epochs)]


def test_the_disk_that_checkpoints_take_is_said_at_the_start(split: Path, tmp_path: Path) -> None:
    trainer = build(split, tmp_path, max_epochs=9, **SMALL)
    log = run(split, tmp_path, max_epochs=9, **SMALL)
    saved = checkpoint(tmp_path)
    weights = sum(value.nbytes for value in saved["state_dict"].values())
    moments = sum(
        entry[name].nbytes for entry in saved["optimizer"]["state"].values() for name in entry if name != "step"
    )
    plan = trainer.disk_plan()
    assert plan == state.DiskPlan(weights + moments, 3, weights)
    assert plan.most_bytes == 5 * (weights + moments) + 2 * weights
    words = f"each checkpoint takes {(weights + moments) / 1e6:.2f} MB, at most 3 are kept (--keep-checkpoints 2, and "
    assert words in log
    assert f"GB are free in {tmp_path}/x/checkpoints" in log
    assert "The disk may fill up" not in log


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"keep_checkpoints": -1}, 1 + 9),
        ({"keep_checkpoints": -1, "save_step_frequency": 2}, 1 + 9 + 13),  # 27 steps
        ({"keep_checkpoints": 4, "save_epoch_frequency": 4}, 1 + 3),  # epochs 4, 8, and the last
        ({"save_epoch_frequency": -1}, 1 + 1),
    ],
)
def test_the_disk_plan_counts_the_files_that_there_can_be(
    settings: dict[str, int], kept: int, split: Path, tmp_path: Path
) -> None:
    assert build(split, tmp_path, max_epochs=9, **QUIET, **settings).disk_plan().num_kept == kept


def test_a_disk_that_is_too_small_is_warned_of_at_the_start(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = state.DiskPlan(file_bytes=100, num_kept=3, best_bytes=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=400))
    assert not plan.fits(tmp_path, 2)  # 5 x 100 and 2 x 10
    (tmp_path / "epoch_latest.pt").write_bytes(bytes(60))  # will be replaced
    old = tmp_path / "epoch1.pt"
    old.write_bytes(bytes(60))  # will go, as two new ones come
    assert plan.fits(tmp_path, 2)
    assert not plan.fits(tmp_path, 2, spared=[old])
    assert not plan.fits(tmp_path, -1)
    assert not plan.fits(tmp_path, 3)  # it stays beside the two new ones
    log = run(split, tmp_path, max_steps=1, **QUIET)
    assert "The disk may fill up, and the run would then stop: free some space, or lower --keep-checkpoints" in log


# --- kills


def started(python: str, split: Path, logs: Path) -> "subprocess.Popen[str]":
    flags = [f"--train-data={split}", f"--logs={logs}", "--name=x", *TINY, "--batch-size=4", "--max-epochs=6"]
    flags += [f"--vision-model={VISION}", f"--text-model={TEXT}", "--save-step-frequency=1"]
    words = [python, "tests/background_run.py", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(words, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("seed", range(2))
def test_a_kill_while_a_file_is_written_leaves_the_old_or_the_new_one(seed: int, split: Path, tmp_path: Path) -> None:
    rng, folder = random.Random(seed), tmp_path / "x/checkpoints"
    with started(warm_python.program(), split, tmp_path) as process:
        while not (folder / "epoch_latest.pt").exists():
            assert process.poll() is None, process.stderr
            time.sleep(0.01)
        while not list(folder.glob(".epoch*.tmp")):  # a file is being written just now
            assert process.poll() is None
        time.sleep(rng.uniform(0, 0.12))
        process.kill()
        assert process.stderr is not None
        last = max([int(line.split("Global Steps: ")[1].split("/")[0]) for line in process.stderr if "Steps" in line])
    files = {path.name: torch.load(path, weights_only=True)["step"] for path in folder.glob("*.pt")}
    assert last - 2 <= files["epoch_latest.pt"] <= last + 1
    with started(warm_python.program(), split, tmp_path) as process:
        assert process.stderr is not None
        log = process.stderr.read()
    assert process.returncode == 0, log
    assert f"@ {files['epoch_latest.pt']} steps)" in log
    run(split, tmp_path / "whole", max_epochs=6, warmup=2, lr=None, **QUIET)
    ours, whole = checkpoint(tmp_path), checkpoint(tmp_path / "whole")
    assert_same(ours["state_dict"], whole["state_dict"])
    assert not list(folder.glob(".epoch*.tmp"))

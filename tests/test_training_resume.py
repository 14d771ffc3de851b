"""What a run that was stopped at an awkward moment does next; inside the process of the test."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process_runs import build, checkpoint, emoji_split, run

from cn_clip.clip.loading import open_model
from cn_clip.training.stopping import StopRequest
from cn_clip.training.trainer import Trainer

PER_EPOCH = 3  # twelve pairs, four a batch


class Killed(BaseException):
    """Stands for SIGKILL: nothing of the run gets to clean up."""


@pytest.fixture
def split(tmp_path: Path) -> Path:
    return emoji_split(tmp_path / "split")


def killed_in(method: str, step: int, split: Path, logs: Path, **settings: Any) -> None:
    """A run that ends where `method` begins after this step."""

    def kill(self: Trainer, *arguments: Any, **keywords: Any) -> Any:
        if self.position.step == step:
            raise Killed
        return original(self, *arguments, **keywords)

    original = getattr(Trainer, method)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, method, kill)
        with pytest.raises(Killed):
            run(split, logs, **settings)


def test_a_run_killed_after_its_last_step_is_validated_and_closed_when_it_starts_again(
    split: Path, tmp_path: Path
) -> None:
    settings = {"max_epochs": 1, "save_step_frequency": 1, "valid_epoch_interval": 1}
    killed_in("validate", PER_EPOCH, split, tmp_path, **settings)
    log = run(split, tmp_path, **settings)
    assert "Global Steps" not in log
    assert f"Validation Recall (epoch 1 @ {PER_EPOCH} steps)" in log
    assert (tmp_path / "x" / "checkpoints" / "epoch1.pt").exists()
    again = run(split, tmp_path, **settings)
    assert "Validation Recall" not in again
    assert "Saved checkpoint" not in again


def test_a_validation_that_was_counted_is_not_counted_again(split: Path, tmp_path: Path) -> None:
    settings = {"max_epochs": 4, "save_step_frequency": PER_EPOCH, "valid_step_interval": PER_EPOCH, "lr": 1e-12}
    settings |= {"early_stop": 2}
    whole = run(split, tmp_path / "whole", **settings)
    killed_in("_save_epoch", PER_EPOCH, split, tmp_path, **settings)
    log = run(split, tmp_path, **settings)
    for text in (whole, log):
        assert "Stopping training: 2 validations without a better mean recall" in text
        assert f"Validation Recall (epoch 2 @ {2 * PER_EPOCH} steps)" in text
    assert f"@ {PER_EPOCH} steps" not in log.split("Start epoch", 1)[1].split("Saved checkpoint")[0]


def test_a_run_that_validates_at_all_validates_at_its_end(split: Path, tmp_path: Path) -> None:
    log = run(split, tmp_path, max_steps=2, valid_step_interval=100, valid_epoch_interval=-1)
    assert "Validation Recall (epoch 0 @ 0 steps)" in log
    assert "Validation Recall (epoch 1 @ 2 steps)" in log
    none = run(split, tmp_path / "none", max_steps=2, valid_step_interval=-1, valid_epoch_interval=-1)
    assert "Validation Recall" not in none


@pytest.mark.parametrize("fine_tunes", [False, True])
def test_what_is_said_at_a_stop_is_what_goes_on(fine_tunes: bool, split: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_epochs": 1, "valid_epoch_interval": -1}
    if fine_tunes:
        run(split, tmp_path / "first", **settings)
        first = tmp_path / "first" / "x" / "checkpoints" / "epoch_latest.pt"
        settings |= {"resume": str(first), "reset_optimizer": True, "reset_data_offset": True}

    def ask(self: Trainer, *arguments: Any) -> Any:
        self.stop_request.number = signal.SIGTERM
        return original(self, *arguments)

    original = Trainer._step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", ask)
        with pytest.raises(SystemExit) as left:
            run(split, tmp_path, **settings)
    assert left.value.code == 128 + signal.SIGTERM
    latest = tmp_path / "x" / "checkpoints" / "epoch_latest.pt"
    (log,) = (tmp_path / "x").glob("out_*.log")
    said = log.read_text(encoding="utf-8")
    assert (f"--resume {latest}, without --reset-optimizer and --reset-data-offset, goes on" in said) is fine_tunes
    assert ("the same command goes on from here" in said) is not fine_tunes
    if fine_tunes:
        settings |= {"resume": str(latest), "reset_optimizer": False, "reset_data_offset": False}
    assert "Global Steps: 2/3" in run(split, tmp_path, **settings)
    assert checkpoint(tmp_path)["step"] == PER_EPOCH


def test_a_file_that_does_not_say_where_in_the_data_it_stands_goes_on_with_the_next_epoch(
    split: Path, tmp_path: Path
) -> None:
    run(split, tmp_path, max_epochs=1, valid_epoch_interval=-1)
    content = checkpoint(tmp_path)
    content["resume"] = {"epoch": 0, "batch": 2, "num_batches": PER_EPOCH}
    torch.save(content, tmp_path / "x" / "checkpoints" / "epoch_latest.pt")
    log = run(split, tmp_path, max_epochs=2, valid_epoch_interval=-1)
    assert f"Global Steps: {PER_EPOCH + 1}/{2 * PER_EPOCH} | Train Epoch: 2 [4/12 (33%)]" in log


def test_a_run_may_start_from_a_model_by_its_name(split: Path, tmp_path: Path) -> None:
    towers = {"vision_model": "RN-Small-64", "text_model": "BERT-Tiny-chinese", "resume": "Emoji-Tiny"}
    trainer = build(split, tmp_path, **towers, reset_optimizer=True, reset_data_offset=True)
    expected, _ = open_model("Emoji-Tiny")
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, expected.state_dict()[name]), name


def test_a_second_sigterm_does_not_end_a_run_that_is_saving() -> None:
    request = StopRequest()
    before = signal.getsignal(signal.SIGTERM)
    with request.noted():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert request.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_ctrl_c_ends_a_run_at_once() -> None:
    request = StopRequest()
    with request.noted():
        os.kill(os.getpid(), signal.SIGINT)
        assert request.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_what_a_killed_save_left_half_written_is_cleared_away(split: Path, tmp_path: Path) -> None:
    remains = tmp_path / "x" / "checkpoints" / ".epoch_latest.pt.123.tmp"
    remains.parent.mkdir(parents=True)
    remains.write_bytes(b"half")
    run(split, tmp_path, max_steps=1, valid_epoch_interval=-1)
    assert not remains.exists()

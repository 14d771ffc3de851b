"""What a run that was stopped at an awkward moment does next; inside the process of the test."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process_runs import build, checkpoint, emoji_split, options, run
from test_distributed import torchrun
from training_runs import TINY

from cn_clip.checkpoints import convert
from cn_clip.clip.loading import open_model
from cn_clip.errors import CheckpointError, ConfigError, DataError
from cn_clip.stopping import StopRequest
from cn_clip.training import main as training
from cn_clip.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
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


@pytest.mark.long
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
    flags = f" without --resume {settings.get('resume')} --reset-optimizer --reset-data-offset" if fine_tunes else ""
    assert f"the same command{flags} goes on from here" in said
    assert latest.is_file()
    if fine_tunes:
        settings |= {"resume": None, "reset_optimizer": False, "reset_data_offset": False}
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
    # Raised in this thread: one for the process may come in another, and after the block.
    with request.noted():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert request.number == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_ctrl_c_ends_a_run_at_once() -> None:
    request = StopRequest()
    with request.noted():
        signal.raise_signal(signal.SIGINT)
        assert request.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_what_a_killed_save_left_half_written_is_cleared_away(split: Path, tmp_path: Path) -> None:
    remains = tmp_path / "x" / "checkpoints" / ".epoch_latest.pt.123.tmp"
    remains.parent.mkdir(parents=True)
    remains.write_bytes(b"half")
    run(split, tmp_path, max_steps=1, valid_epoch_interval=-1)
    assert not remains.exists()


# --- two runs of one name ---------------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from cn_clip.files import alone
Path(sys.argv[1], "checkpoints", ".epoch_latest.pt.abcdefgh.tmp").mkdir(parents=True)
with alone(Path(sys.argv[1], ".lock"), "busy"):
    print(flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def other_run(tmp_path: Path) -> Iterator["subprocess.Popen[str]"]:
    """A process that trains in the folder of the run, and has a checkpoint half written."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "x")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def test_a_second_run_of_the_same_name_is_refused_and_takes_nothing_from_the_first(
    split: Path, tmp_path: Path, other_run: "subprocess.Popen[str]"
) -> None:
    busy = rf"^--name x: another process is training in {tmp_path}/x \(pid {other_run.pid} on .*, since 2"
    with pytest.raises(ConfigError, match=busy):
        training.run(options(split, tmp_path, max_steps=1))
    remains = tmp_path / "x" / "checkpoints" / ".epoch_latest.pt.abcdefgh.tmp"
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [".lock", "checkpoints"]
    assert remains.exists()
    other_run.kill()
    other_run.wait()
    run(split, tmp_path, max_steps=1, valid_epoch_interval=-1)
    assert not remains.exists()
    assert not (tmp_path / "x" / ".lock").exists()


def test_of_several_processes_all_are_refused_and_none_waits(
    split: Path, tmp_path: Path, other_run: "subprocess.Popen[str]"
) -> None:
    words = [str(ROOT / "cn_clip" / "training" / "main.py"), f"--train-data={split}", f"--logs={tmp_path}", "--name=x"]
    done = torchrun(*words, *TINY, "--batch-size=2", "--num-workers=0", "--device=cpu")
    assert done.returncode != 0
    assert f"another process is training in {tmp_path}/x (pid {other_run.pid} on" in done.stderr
    assert done.stderr.count("Traceback") == 1  # that of torchrun, which says that its processes failed


def test_a_log_that_cannot_be_written_is_said_once_and_the_run_goes_on(
    split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(logging.FileHandler, "flush", full)
    run(split, tmp_path, max_steps=2, valid_epoch_interval=-1)
    said = [line for line in capsys.readouterr().err.splitlines() if "No space left" in line or "Traceback" in line]
    assert len(said) == 1
    assert said[0].endswith("cannot be written (No space left on device); the run goes on without this log")
    assert checkpoint(tmp_path)["step"] == 2


# --- the same command again -------------------------------------------------------------------------------------------

TRIPLE = {"reset_optimizer": True, "reset_data_offset": True}
QUIET: dict[str, Any] = {"valid_epoch_interval": -1, "val_data": None}


@pytest.fixture
def pretrained(split: Path, tmp_path: Path) -> str:
    """A checkpoint of another run, with the state of its optimizer."""
    run(split, tmp_path, name="pretrained", max_epochs=1, seed=7, **QUIET)
    return str(tmp_path / "pretrained" / "checkpoints" / "epoch_latest.pt")


def files(logs: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (logs / "x" / "checkpoints").iterdir()}


def test_init_gives_the_first_weights_and_the_same_command_goes_on_after_a_kill(
    pretrained: str, split: Path, tmp_path: Path
) -> None:
    settings = {"init": pretrained, "max_epochs": 2, "save_step_frequency": 1, **QUIET}
    trainer = build(split, tmp_path / "nothing", **settings)
    begun = torch.load(pretrained, weights_only=True)["state_dict"]
    assert all(torch.equal(begun[f"module.{name}"], value) for name, value in trainer.model.state_dict().items())
    assert (trainer.position.step, trainer.optimizer.state) == (0, {})

    run(split, tmp_path / "whole", **settings)
    killed_in("_step", 2, split, tmp_path, **settings)
    log = run(split, tmp_path, **settings)
    assert f"--init {pretrained} gave this run its first weights; it goes on from " in log
    assert "Global Steps: 2/6" not in log
    assert "Global Steps: 3/6" in log
    ours, whole = checkpoint(tmp_path), checkpoint(tmp_path / "whole")
    assert all(torch.equal(ours["state_dict"][name], value) for name, value in whole["state_dict"].items())
    records = [json.loads(line)["step"] for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()]
    assert records == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("resets", [{}, TRIPLE])
def test_a_resume_that_would_lose_progress_is_refused_and_says_what_goes_on(
    resets: dict[str, bool], pretrained: str, split: Path, tmp_path: Path
) -> None:
    settings = {"resume": pretrained, "max_epochs": 3, "save_step_frequency": 1, "seed": 7, **resets, **QUIET}
    begin = 0 if resets else PER_EPOCH
    killed_in("_step", begin + 2, split, tmp_path, **settings)
    before = files(tmp_path)
    message = f"holds step {begin + 2} of this run.* --init {pretrained} .*--overwrite; .*another --name"
    with pytest.raises(ConfigError, match=message):
        run(split, tmp_path, **settings)
    assert files(tmp_path) == before
    goes_on = {"init": pretrained, "max_epochs": 3, "seed": 7, **QUIET}
    assert f"Global Steps: {begin + 3}/9" in run(split, tmp_path, **goes_on)


def test_a_run_may_be_resumed_from_its_own_newest_file_and_its_data_begun_again(split: Path, tmp_path: Path) -> None:
    run(split, tmp_path, max_epochs=1, **QUIET)
    newest = str(tmp_path / "x" / "checkpoints" / "epoch_latest.pt")
    log = run(split, tmp_path, max_epochs=1, resume=newest, **TRIPLE, **QUIET)
    assert "Global Steps: 1/3" in log
    assert "Global Steps: 1/3" in run(split, tmp_path, max_epochs=1, reset_data_offset=True, **QUIET)


def test_overwrite_replaces_all_of_the_old_run_but_only_once_the_new_one_can_train(
    pretrained: str, split: Path, tmp_path: Path
) -> None:
    run(split, tmp_path, max_epochs=2, valid_step_interval=1)
    before = files(tmp_path)
    assert {"epoch1.pt", "epoch2.pt", "epoch_latest.pt"} < before.keys() | {"epoch_best.pt"}
    again = {"init": pretrained, "overwrite": True, "max_steps": 1}
    with pytest.raises(DataError):
        run(split, tmp_path, **{**again, "val_data": str(tmp_path / "nothing")})
    assert files(tmp_path) == before
    log = run(split, tmp_path, **again, **QUIET)
    assert "Global Steps: 1/1" in log
    assert "of the run before (--overwrite)" in log
    assert files(tmp_path).keys() == {"epoch1.pt", "epoch_latest.pt"}
    assert checkpoint(tmp_path, file="epoch1.pt")["step"] == 1
    records = [json.loads(line) for line in (tmp_path / "x" / "metrics.jsonl").read_text().splitlines()]
    assert [(record["step"], record["kind"]) for record in records] == [(1, "train")]


def test_overwrite_goes_back_to_an_earlier_file_of_the_run_and_keeps_it(split: Path, tmp_path: Path) -> None:
    run(split, tmp_path, max_epochs=2, **QUIET)
    earlier = str(tmp_path / "x" / "checkpoints" / "epoch1.pt")
    settings = {"resume": earlier, "max_steps": PER_EPOCH + 1, **QUIET}
    with pytest.raises(ConfigError, match=f"would begin at step {PER_EPOCH}, but .* holds step {2 * PER_EPOCH}"):
        run(split, tmp_path, **settings)
    run(split, tmp_path, overwrite=True, **settings)
    assert (checkpoint(tmp_path, file="epoch1.pt")["step"], checkpoint(tmp_path)["step"]) == (PER_EPOCH, PER_EPOCH + 1)


def test_other_first_weights_than_those_of_the_run_are_refused(pretrained: str, split: Path, tmp_path: Path) -> None:
    run(split, tmp_path, init=pretrained, max_epochs=1, **QUIET)
    run(split, tmp_path, name="scratch", max_epochs=1, **QUIET)
    other = tmp_path / "other.pt"
    other.write_bytes(Path(pretrained).read_bytes())
    with pytest.raises(ConfigError, match=f"began with {pretrained}.* give --init {pretrained}; .*--overwrite"):
        run(split, tmp_path, init=str(other), max_epochs=2, **QUIET)
    with pytest.raises(ConfigError, match=r"began with random weights\. .* leave --init out"):
        run(split, tmp_path, name="scratch", init=str(other), max_epochs=2, **QUIET)
    relative = os.path.relpath(pretrained)
    assert "Global Steps: 4/6" in run(split, tmp_path, init=relative, max_epochs=2, **QUIET)


def test_adapters_are_merged_into_the_first_weights(split: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    run(split, tmp_path, name="lora", lora_rank=2, max_epochs=1, **QUIET)
    adapted = tmp_path / "lora" / "checkpoints" / "epoch_latest.pt"
    merged, _ = open_model(adapted)
    plain = build(split, tmp_path, init=str(adapted)).model.state_dict()
    fresh = build(split, tmp_path, init=str(adapted), lora_rank=4).model.state_dict()
    for name, value in merged.state_dict().items():
        assert torch.equal(plain[name], value), name
    layer = "bert.encoder.layer.0.attention.self.query"
    assert torch.equal(fresh[f"{layer}.base_layer.weight"], plain[f"{layer}.weight"])
    adapters = [value for name, value in fresh.items() if "lora_B" in name]
    assert adapters
    assert not any(value.any() for value in adapters)


def test_a_transformers_folder_or_a_models_name_gives_the_first_weights(
    pretrained: str, split: Path, tmp_path: Path
) -> None:
    folder = str(tmp_path / "folder")
    convert.run(convert.Options(source=pretrained, target=folder))
    for init, vision in ((folder, "ViT-Tiny-64"), ("Emoji-Tiny", "RN-Small-64")):
        trainer = build(split, tmp_path, vision_model=vision, init=init)
        expected = open_model(init)[0].state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in trainer.model.state_dict().items())
    with pytest.raises(CheckpointError, match=r"--init no/such\.pt: no such file"):
        build(split, tmp_path, init="no/such.pt")


@pytest.mark.long
def test_two_processes_agree_on_where_to_begin_and_on_what_is_wrong(
    pretrained: str, split: Path, tmp_path: Path
) -> None:
    script = "cn_clip/training/main.py"
    common = [f"--train-data={split}", f"--logs={tmp_path}", *TINY, "--batch-size=3", "--name=two"]
    settings = [f"--init={pretrained}", "--save-step-frequency=1"]
    first = torchrun(script, *common, *settings, "--max-steps=1")
    assert first.returncode == 0, first.stderr
    second = torchrun(script, *common, *settings, "--max-epochs=1")
    assert second.returncode == 0, second.stderr
    assert "Global Steps: 1/2" not in second.stderr
    assert "Global Steps: 2/2" in second.stderr
    flags = [f"--resume={pretrained}", "--reset-optimizer", "--reset-data-offset", "--max-epochs=1"]
    refused = torchrun(script, *common, *flags)
    assert refused.returncode == 1
    assert refused.stderr.count("error: --resume") == 2  # each process ends with the reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [("x", "Not a directory; a part of the path is a file; choose another"), ("n" * 300, "File name too long")],
)
def test_a_folder_that_cannot_be_made_is_told_in_one_sentence(
    name: str, reason: str, split: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"")
    logs = file if name == "x" else tmp_path
    with pytest.raises(SystemExit) as stopped:
        training.main([f"--train-data={split}", f"--logs={logs}", f"--name={name}", "--device=cpu"])
    assert stopped.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {logs / name}")
    assert reason in line


def test_missing_validation_data_are_named(split: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{tmp_path / 'nothing'}"):
        run(split, tmp_path, val_data=str(tmp_path / "nothing"), max_steps=1)
    assert not list(tmp_path.rglob("*.pt"))


def test_every_checkpoint_is_a_file_of_its_own(split: Path, tmp_path: Path) -> None:
    run(split, tmp_path, max_epochs=1, **QUIET)
    folder = tmp_path / "x" / "checkpoints"
    first, latest = folder / "epoch1.pt", folder / "epoch_latest.pt"
    before = latest.read_bytes()
    assert first.read_bytes() == before
    first.write_bytes(b"edited")
    assert latest.read_bytes() == before

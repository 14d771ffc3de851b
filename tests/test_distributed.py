"""Two processes give the losses, gradients, weights and checkpoints of one process with the same global batch."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import warm_python
from distributed_worker import MODES, batches_of, update

from cn_clip import command, terminal
from cn_clip.errors import CheckpointError, ConfigError
from cn_clip.training import distributed
from cn_clip.training import main as training
from cn_clip.training.distributed import process_group

ROOT = Path(__file__).resolve().parent.parent
EXACT = ["with_grad", "accumulated", "siglip", "siglip_accumulated", "multi_positive", "distillation"]
EXACT += ["matryoshka_accumulated"]
LOCAL = [mode for mode in MODES if mode.startswith("local")]
SPLIT = ["fsdp", "fsdp_accumulated"]


def torchrun(*args: str, cwd: Path = ROOT, worker_python: str = "") -> "subprocess.CompletedProcess[str]":
    paths = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
    python = warm_python.program()
    # torchrun starts its workers with PYTHON_EXEC.
    environment = {**os.environ, "PYTHON_EXEC": worker_python or python, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    # Without "--", torchrun takes the script's --logs for an abbreviation of its own options.
    command = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--", *args]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def two(device: torch.device, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What two processes got, by mode; on GPUs it is compared with one process on the CPU."""
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    folder = tmp_path_factory.mktemp("two")
    result = torchrun(str(ROOT / "tests" / "distributed_worker.py"), str(folder), device.type, *MODES)
    assert result.returncode == 0, result.stderr
    return {mode: torch.load(folder / f"{mode}.pt", weights_only=True) for mode in MODES}


def assert_same_gradients(ours: dict[str, Any], theirs: dict[str, Any], factor: float = 1.0) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        own = 1.0 if name == "logit_scale" else factor
        torch.testing.assert_close(ours[name], value * own, atol=2e-6, rtol=2e-4, msg=f"{name}: another gradient")


@pytest.mark.parametrize("mode", EXACT + LOCAL + SPLIT)
def test_gather_with_grad_gives_losses_gradients_and_weights_of_one_process(
    mode: str, two: dict[str, dict[str, Any]]
) -> None:
    alone = update(mode)
    for losses in two[mode]["all_losses"]:
        assert losses == pytest.approx(alone["losses"], rel=1e-5)
    assert_same_gradients(two[mode]["gradients"], alone["gradients"])
    for name, value in alone["weights"].items():
        # Adam divides by the root of tiny squares: rounding differences of a gradient near 0 move a weight visibly.
        assert (two[mode]["weights"][name] - value).abs().median() < 1e-6, name
        torch.testing.assert_close(two[mode]["weights"][name], value, atol=2.5e-3, rtol=0)


@pytest.mark.parametrize("mode", ["fsdp_bf16", "fsdp_bf16_accumulated"])
def test_weights_gathered_in_bfloat16_train_as_the_mixed_precision_of_one_process(
    mode: str, two: dict[str, dict[str, Any]]
) -> None:
    alone, exact = update(mode), update("with_grad")
    assert (two[mode]["computed_with"], alone["computed_with"]) == (["torch.bfloat16"], ["torch.float32"])
    assert two[mode]["all_losses"][0] == two[mode]["all_losses"][1]
    assert two[mode]["all_losses"][0] == pytest.approx(alone["losses"], rel=5e-3)
    assert {value.dtype for part in ("weights", "gradients") for value in two[mode][part].values()} == {torch.float32}
    assert {entry["exp_avg"].dtype for entry in two[mode]["optimizer"]["state"].values()} == {torch.float32}
    ours, theirs, full = (
        torch.cat([one["gradients"][name].flatten() for name in exact["gradients"]])
        for one in (two[mode], alone, exact)
    )
    # As near to float32 as mixed precision is, whose roundings are others.
    assert (ours - full).norm() < 1.5 * (theirs - full).norm()


@pytest.mark.parametrize("mode", ["default", "distillation_default"])
def test_the_default_gather_gives_the_loss_of_one_process_and_its_gradients_divided_by_the_processes(
    mode: str, two: dict[str, dict[str, Any]]
) -> None:
    """As in Chinese-CLIP: each process passes gradients to its own rows alone, and DDP takes the mean."""
    alone = update(mode, steps=1)
    for losses in two[mode]["all_losses"]:
        assert losses[0] == pytest.approx(alone["losses"][0], rel=1e-5)
    assert_same_gradients(two[mode]["gradients"], alone["gradients"], factor=0.5)


def test_without_gather_the_gradient_is_the_mean_over_the_processes_batches(two: dict[str, dict[str, Any]]) -> None:
    import distributed_worker

    halves = []
    for rank in range(2):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(distributed_worker, "batches_of", lambda *_, rank=rank: batches_of(rank, 2, 1))
            halves.append(update("skip", steps=1))
    for rank in range(2):
        assert two["skip"]["all_losses"][rank][0] == pytest.approx(halves[rank]["losses"][0], rel=1e-5)
    mean = {name: (halves[0]["gradients"][name] + value) / 2 for name, value in halves[1]["gradients"].items()}
    assert_same_gradients(two["skip"]["gradients"], mean)


@pytest.mark.parametrize("mode", ["with_grad", *SPLIT])
def test_optimizer_states_are_whole_and_come_back_as_they_were(mode: str, two: dict[str, dict[str, Any]]) -> None:
    alone = update(mode)["optimizer"]
    state, again = two[mode]["optimizer"], two[mode]["again"]
    assert [group["params"] for group in state["param_groups"]] == [g["params"] for g in alone["param_groups"]]
    assert state["state"].keys() == alone["state"].keys() == again["state"].keys()
    for index, entry in alone["state"].items():
        for name, value in entry.items():
            torch.testing.assert_close(state["state"][index][name], value, atol=1e-6, rtol=1e-3)
            assert torch.equal(state["state"][index][name], again["state"][index][name])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_no_thread_of_a_group_outlives_it(tmp_path: Path) -> None:
    # Not the warm one, which has imported already what would keep a group.
    worker = str(ROOT / "tests" / "distributed_worker.py")
    result = torchrun(worker, str(tmp_path), "cpu", "with_grad", worker_python=sys.executable)
    assert result.returncode == 0, result.stderr
    for rank in (0, 1):
        assert "gloo" not in (tmp_path / f"threads-{rank}").read_text()


def test_one_of_many_processes_ends_at_once_whatever_threads_fsdp_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[int] = []
    monkeypatch.setattr(command, "execute", lambda *_: None)
    monkeypatch.setattr(terminal, "leave", left.append)
    training.main([])
    assert left == []
    monkeypatch.setenv("WORLD_SIZE", "2")
    training.main([])
    assert left == [0]


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            NotADirectoryError(20, "Not a directory", "logs/run"),
            "logs/run: Not a directory; a part of the path is a file",
        ),
        (CheckpointError("is cut short", at="a.pt"), "a.pt: is cut short"),
        (KeyError("x"), "unexpected error"),
    ],
)
def test_an_error_of_one_of_many_gpus_is_said_as_the_command_says_it(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def leave(status: int) -> NoReturn:
        raise SystemExit(status)

    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1"), ("MASTER_ADDR", "x")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda _: None)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    monkeypatch.setattr(terminal, "leave", leave)
    monkeypatch.setattr(distributed.logger, "propagate", True)
    with caplog.at_level("ERROR"), pytest.raises(SystemExit), process_group(torch.device("cuda", 1)):
        raise error
    (record,) = caplog.records
    assert record.getMessage().startswith(said)
    assert (record.exc_info is not None) == (said == "unexpected error")


def test_a_world_size_without_torchrun_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with (
        pytest.raises(ConfigError, match="RANK, LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set; use torchrun"),
        process_group(torch.device("cpu")),
    ):
        pass

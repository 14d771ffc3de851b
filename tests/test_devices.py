"""Which device everything runs on, without a GPU: a CUDA that is only said to be there."""

import ast
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from in_process_runs import options
from tiny_models import tiny_model
from torch import nn

from cn_clip import ranks
from cn_clip.clip import load_from_name
from cn_clip.clip.backends.opening import open_backend
from cn_clip.clip.backends.pytorch import TorchBackend
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.loading import load
from cn_clip.errors import ConfigError
from cn_clip.training import building, distributed

PACKAGE = Path(ranks.__file__).parent


class Cuda:
    """Says that there are `count` GPUs, and keeps every device that a model is moved to or that is made current."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.current = 1, 0
        self.moved: list[torch.device] = []
        self.made_current: list[torch.device] = []
        monkeypatch.setattr(torch.cuda, "is_available", lambda: self.count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: self.count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "set_device", self._set_device)
        monkeypatch.setattr(ranks, "gpu_has_bf16", lambda device: True)
        monkeypatch.setattr(nn.Module, "to", self._recording(nn.Module.to))
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    def _set_device(self, device: torch.device) -> None:
        # As PyTorch does, before it asks any driver.
        if device.index is None:
            raise ValueError(f"Expected a torch.device with a specified index or an integer, but got:{device}")
        self.made_current.append(device)

    def _recording(self, to: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
        def record(module: nn.Module, *args: Any, **settings: Any) -> nn.Module:
            if not args or not isinstance(args[0], torch.device):
                return to(module, *args, **settings)
            self.moved.append(args[0])
            return module

        return record


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return Cuda(monkeypatch)


@pytest.mark.parametrize("device", ["auto", "cuda", None, torch.device("cuda"), "cuda:0", torch.device("cuda", 0)])
def test_a_device_of_cuda_always_has_its_index(device: "str | torch.device | None", cuda: Cuda) -> None:
    assert ranks.choose_device(device) == torch.device("cuda", 0)
    assert ranks.own_device(str(device or "auto")) == torch.device("cuda", 0)


def test_cuda_without_an_index_is_the_device_that_a_program_has_made_current(cuda: Cuda) -> None:
    cuda.count, cuda.current = 3, 2
    assert ranks.choose_device("cuda") == ranks.choose_device(None) == torch.device("cuda", 2)
    assert ranks.choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="device: cuda:3 was asked for, but there are 3 GPUs; the first is cuda:0"):
        ranks.choose_device("cuda:3")


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:-1", ""])
def test_what_is_not_a_device_is_refused(device: str, cuda: Cuda) -> None:
    with pytest.raises(ConfigError, match=f"device: expected auto, cpu, cuda, cuda:N or mps, got '{device}'"):
        ranks.choose_device(device)


def test_without_cuda_the_cpu_is_chosen_and_cuda_is_refused(cuda: Cuda) -> None:
    cuda.count = 0
    assert ranks.choose_device() == ranks.choose_device(None) == torch.device("cpu")
    for device in ("cuda", torch.device("cuda"), "cuda:0", "mps"):
        with pytest.raises(ConfigError, match="was asked for, but PyTorch finds none here; use --device cpu"):
            ranks.choose_device(device)


def test_mps_is_taken_for_auto_but_not_for_the_default(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.count = 0
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert ranks.choose_device("auto") == torch.device("mps")
    assert ranks.choose_device(None) == torch.device("cpu")


# Every way into the package that puts a model somewhere, with what it takes for a device.
OPENERS: dict[str, Callable[[Any], object]] = {
    "load_from_name": lambda device: load_from_name("Emoji-Tiny", device=device),
    "load": lambda device: load(tiny_model(), device),
    "Encoder of a name": lambda device: Encoder("Emoji-Tiny", device=device),
    "Encoder of a model": lambda device: Encoder(tiny_model(), device=device),
    "open_backend": lambda device: open_backend("Emoji-Tiny", device=device),
    "TorchBackend": lambda device: TorchBackend(tiny_model(), device=device),
}


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda"), "cuda:1", None])
@pytest.mark.parametrize("opener", OPENERS)
def test_every_opener_moves_its_model_to_a_device_with_an_index(
    opener: str, device: "str | torch.device | None", cuda: Cuda
) -> None:
    cuda.count, cuda.current = 2, 1
    OPENERS[opener](device)
    assert cuda.moved == [torch.device("cuda", 1)]


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize(("processes", "number"), [(1, 0), (2, 0), (2, 1)])
def test_training_makes_the_device_of_its_process_current(
    device: str, processes: int, number: int, cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.count, begun = 2, []
    for name, value in (("WORLD_SIZE", processes), ("RANK", number), ("LOCAL_RANK", number)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend: None)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    monkeypatch.setattr(distributed, "every_object", lambda value: [value])
    monkeypatch.setattr(distributed, "wait_for_all", lambda: None)
    monkeypatch.setattr(building, "train_in_group", lambda settings, device, *rest: begun.append(device))
    building.run(options(tmp_path, tmp_path / "logs", device=device))
    assert cuda.made_current == begun == [torch.device("cuda", number)]


def test_a_numbered_gpu_for_several_processes_is_refused(
    cuda: Cuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda.count = 2
    assert ranks.own_device("cuda:1") == torch.device("cuda", 1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="--device cuda:1: names one GPU for 2 processes; use --device cuda"):
        building.run(options(tmp_path, tmp_path / "logs", device="cuda:1"))
    assert ranks.own_device("cpu") == torch.device("cpu")


def test_more_processes_than_gpus_are_refused_without_touching_the_first_gpu(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("takes memory of the first GPU"))
    for device in ("auto", "cuda"):
        with pytest.raises(ConfigError, match="LOCAL_RANK is 1, but this process sees 1 GPUs; start no more processes"):
            ranks.own_device(device)
    cuda.count = 2
    assert ranks.own_device("auto") == torch.device("cuda", 1)


# Where else CUDA may be asked for, and why.
OTHERS_THAT_ASK = {
    "ranks.py",
}


def test_no_other_place_chooses_a_device() -> None:
    """A second chooser is what forgot the index: nothing but `ranks` asks for CUDA, or names it without an index."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.unparse(node) if isinstance(node, ast.Call) else ""
            asks = text.startswith(
                ("torch.cuda.is_available(", "torch.cuda.current_device(", "torch.cuda.device_count(")
            )
            names = text in ("torch.device('cuda')", "choose('cuda')") or text.endswith((".cuda()", ".to('cuda')"))
            if asks or names:
                found.add(path.relative_to(PACKAGE).as_posix())
    assert found == OTHERS_THAT_ASK

"""Runs a module of the reference (cn_clip 1.6.0), which asks for CUDA, on the CPU instead:

REFERENCE/bin/python benchmarks/reference_run.py cn_clip.eval.extract_features --help
"""

import functools
import runpy
import sys
from typing import Any

import lmdb
import reference_shim  # noqa: F401  (before anything that imports torchvision)
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def stay_on_cpu() -> None:
    """Turns every move to CUDA into nothing, and NCCL into gloo."""
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.cuda.set_device = lambda *_, **__: None
    torch.Tensor.to = _without_device_numbers(torch.Tensor.to)  # type: ignore[method-assign]
    start = dist.init_process_group
    dist.init_process_group = lambda backend=None, **options: start("gloo", **options)
    wrap = DistributedDataParallel.__init__

    def on_cpu(self: Any, module: Any, device_ids: Any = None, **options: Any) -> None:
        wrap(self, module, **options)

    DistributedDataParallel.__init__ = on_cpu  # type: ignore[method-assign]


def _without_device_numbers(move: Any) -> Any:
    """`tensor.to(0)`, the first CUDA device, leaves the tensor where it is."""
    return lambda self, *args, **options: self if args and type(args[0]) is int else move(self, *args, **options)


def trust_own_files() -> None:
    """Reads checkpoints as PyTorch before 2.6 did: those of the reference hold numpy numbers, which it refuses now."""
    torch.load = functools.partial(torch.load, weights_only=False)


class Shared:
    """An open LMDB folder that several datasets use: none of them closes it."""

    def __init__(self, environment: Any) -> None:
        self._environment = environment

    def __getattr__(self, name: str) -> Any:
        return getattr(self._environment, name)

    def close(self) -> None:
        """Stays open until the process ends."""


def share_open_folders() -> None:
    """Opens an LMDB folder once: the reference opens it again for every epoch, which lmdb no longer allows."""
    open_folder: Any = lmdb.open
    opened: dict[str, Any] = {}

    def shared(path: str, **options: Any) -> Any:
        if not options.get("readonly"):
            return open_folder(path, **options)
        if path not in opened:
            opened[path] = Shared(open_folder(path, **options))
        return opened[path]

    lmdb.open = shared


def main() -> None:
    stay_on_cpu()
    trust_own_files()
    share_open_folders()
    _, module, *arguments = sys.argv
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")


if __name__ == "__main__":
    main()

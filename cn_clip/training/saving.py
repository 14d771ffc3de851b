"""Writes checkpoints while training goes on: their copy in host memory, and the thread that writes them one by one."""

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from cn_clip.training.logger import logger

ContentT = TypeVar("ContentT")


def is_worth_a_copy(device: torch.device) -> bool:
    """Whether a run on `device` writes its checkpoints in a thread, from a copy in host memory.

    A device has its weights copied for a file anyway. On a CPU the copy takes half as long as the writing (3.5 s beside
    5.9 s a GB on the machine where it was tried) and makes weights and optimizer state twice as large in memory, for
    seconds of an epoch of minutes; so a run on the CPU writes from its own tensors, and waits.
    """
    return device.type != "cpu"


def in_host_memory(content: ContentT, *, own: bool = False) -> ContentT:
    """A nested structure of dictionaries, lists and tuples with its tensors on the CPU; waits once for the device.

    own: tensors that lie on the CPU are copied too, so that training may change them at once; but not those in pinned
    memory, which are copies already. A tensor that is there twice is copied once.
    """
    devices: set[torch.device] = set()
    copies: dict[int, Tensor] = {}

    def copied(item: Any) -> Any:
        if isinstance(item, Tensor):
            if id(item) not in copies:
                copies[id(item)] = _on_host(item.detach(), devices, own=own)
            return copies[id(item)]
        if isinstance(item, dict):
            return type(item)((key, copied(value)) for key, value in item.items())
        if isinstance(item, list | tuple):
            return type(item)(map(copied, item))
        return item

    result: ContentT = copied(content)
    for device in devices:
        torch.cuda.current_stream(device).synchronize()
    return result


def _on_host(value: Tensor, devices: set[torch.device], *, own: bool) -> Tensor:
    """The tensor on the CPU; a copy from CUDA is only begun, and its device added to `devices`."""
    if value.device.type == "cuda":
        # For a copy beside training only: pinned memory stays the process's own, rounded up.
        target = pinned_like(value) if own else None
        if target is None:
            return value.cpu()
        devices.add(value.device)
        return target.copy_(value, non_blocking=True)
    if value.device.type == "cpu":
        return value.clone() if own and not value.is_pinned() else value
    return value.cpu()


def pinned_like(value: Tensor) -> Tensor | None:
    """Memory for a copy of a tensor, which the device writes without a detour; None if the system gives no more."""
    try:
        return torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    except RuntimeError:
        return None


class Writer:
    """Does one piece of writing after the other; a context manager that waits for the last one, however it is left.

    in_background: in a thread, from copies of what is written, so that the caller goes on meanwhile. error: what a
    piece of writing has raised; nothing is written after it.

    The thread holds no lock that a child of a fork would ask for: loading processes may start while it writes.
    """

    def __init__(self, *, in_background: bool) -> None:
        self.in_background = in_background
        self.error: Exception | None = None
        self._thread: threading.Thread | None = None

    def write(self, content: ContentT, do: Callable[[ContentT], object]) -> None:
        """Calls `do(content)` once what was begun before is done, unless that has failed.

        In the background `content` is copied before this returns, and only then, so that no two copies are there at a
        time.
        """
        if self.wait() is not None:
            return
        if not self.in_background:
            self._do(content, do)
            return
        copy = in_host_memory(content, own=True)
        # Not a daemon: an interpreter that ends would stop it in the middle of native code, and may abort.
        self._thread = threading.Thread(target=self._do, args=(copy, do), name="checkpoint")
        self._thread.start()

    def wait(self) -> Exception | None:
        """Returns when nothing is being written any more: what has failed, if anything has."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return self.error

    def _do(self, content: ContentT, do: Callable[[ContentT], object]) -> None:
        try:
            do(content)
        except Exception as error:
            self.error = error

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, _: type[BaseException] | None, raised: BaseException | None, __: TracebackType | None) -> None:
        error = self.wait()
        if error is not None and raised is not None and raised is not error:
            logger.error("%s", error)

"""Tensors to a device, beside what it computes."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor


def on_device(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on `device`, for what the current stream computes from now on.

    On CUDA they are copied from pinned memory by a stream of their own: nobody waits for a copy, and as this process is
    ahead of the device, a batch is copied while the one before is computed.
    """
    if device.type != "cuda":
        return [tensor.to(device, non_blocking=True) for tensor in tensors]
    own, current = _copy_stream(device), torch.cuda.current_stream(device)
    whole = [tensor.contiguous() for tensor in tensors]  # else the copy would go through memory that is not pinned
    with torch.cuda.stream(own):
        pinned = [tensor if tensor.is_pinned() else tensor.pin_memory() for tensor in whole]
        copies = [tensor.to(device, non_blocking=True) for tensor in pinned]
    current.wait_stream(own)
    for copy in copies:
        copy.record_stream(current)  # its memory is free for a later copy when it was used, not before
    return copies


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

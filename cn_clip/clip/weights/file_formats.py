"""Reads the file of a checkpoint in whatever format, without running code in it; `checkpoint` makes sense of it."""

import ctypes
import mmap
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cn_clip.clip.weights import torchscript
from cn_clip.clip.weights.file_kinds import check_unpacked, is_safetensors, is_zip, what_it_is
from cn_clip.errors import CheckpointError, reading

_AGAIN = "download or copy it again"


def read_content(path: Path, *, mapped: bool = False) -> Any:
    """What a file holds, on the CPU; raises CheckpointError when it is no weight file, or reading it would run code.

    mapped: the tensors stay in the file where its format allows. They change when the file is written, and reading
    them ends the process (SIGBUS) once it is shorter: `owned` copies those that are kept.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, also for a name that is too long
        raise CheckpointError("no such file; give the path of a checkpoint or a model's name", at=path)
    with reading(path, CheckpointError, step=_AGAIN, look=what_it_is):
        if path.suffix == ".safetensors" or is_safetensors(path):
            tensors = _read_safetensors(path)
            return tensors if mapped else owned(tensors, give_back=True)
        is_packed = is_zip(path)
        if is_packed:
            check_unpacked(path, CheckpointError)
        if is_torchscript(path):
            return torchscript.read_state_dict(path)
        return _torch_load(path, mapped=mapped and is_packed)


def owned(
    tensors: Mapping[str, Tensor], *, floating: torch.dtype | None = None, give_back: bool = False
) -> dict[str, Tensor]:
    """The tensors, each contiguous, in memory that belongs to it and to no file; as few copies as that takes.

    floating: the type to turn floats into. give_back: for tensors in a mapped file that nobody writes to: once copied,
    the system may have their memory back, so that a model is never in memory twice.
    """
    result: dict[str, Tensor] = {}
    taken: set[int] = set()
    for name, value in tensors.items():
        own = value.detach()
        if floating is not None and own.is_floating_point():
            own = own.to(floating)
        if not _is_whole(own) or own.data_ptr() in taken:
            own = own.clone(memory_format=torch.contiguous_format)
        taken.add(own.data_ptr())
        result[name] = own
        if give_back and not value.untyped_storage().resizable():
            _give_back(value.untyped_storage())
    return result


def _is_whole(value: Tensor) -> bool:
    """Whether torch allocated the memory, as it did not for a mapped file, and for this tensor only."""
    storage = value.untyped_storage()
    return storage.resizable() and storage.nbytes() == value.numel() * value.element_size() and value.is_contiguous()


def _give_back(storage: torch.UntypedStorage) -> None:
    """Takes the pages of a mapped file out of this process; they are read again when they are used again."""
    if sys.platform != "linux":  # elsewhere the system takes them when memory runs short
        return
    begin = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)


def only_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a dictionary; raises CheckpointError without any, and for one that is not stored in full."""
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(key): value for key, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError("holds no tensors; expected a checkpoint with a `state_dict`", at=path)
    for name, value in tensors.items():
        if _stored_bytes(value) < value.numel() * value.element_size():
            shape = tuple(value.shape)
            raise CheckpointError(f"{name} holds fewer values than its shape {shape}; expected each of them", at=path)
    return tensors


def _stored_bytes(value: Tensor) -> int:
    """An expanded tensor has less than its shape says: a file of a kilobyte could ask for terabytes."""
    try:
        return 0 if value.is_meta else value.untyped_storage().nbytes()
    except NotImplementedError:  # sparse
        return 0


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    with reading(path, CheckpointError, what="not a safetensors file", step=_AGAIN, look=what_it_is):
        return load_file(path)


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of TorchScript, as OpenAI publishes them."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # not a zip file, or a damaged one: torch.load will say so
        return False


def _torch_load(path: Path, *, mapped: bool) -> Any:
    what = "not a PyTorch checkpoint, or damaged"
    with (
        reading(path, CheckpointError, what=what, step=_AGAIN, look=what_it_is),
        warnings.catch_warnings(),
        torch.serialization.safe_globals(_numpy_scalar_globals()),
    ):
        # Warnings are about pickles that are then refused, or read all the same.
        warnings.simplefilter("ignore")
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            found = re.search(r"GLOBAL ([\w.]+)", str(error))
            if found is None:
                known = what_it_is(path) or "not a PyTorch checkpoint; expected a file written by torch.save"
                raise CheckpointError(known, at=path) from error
            raise CheckpointError(
                f"refused, because loading it would run code ({found[1]}); expected tensors and plain values "
                "only: where it was made, save torch.save(model.state_dict(), path)",
                at=path,
            ) from error


def _numpy_scalar_globals() -> list[Any]:
    """Optimizer states of Chinese-CLIP hold the learning rate as a numpy float: data, not code."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
    names = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]
    return [np.dtype, *dtypes, *[(scalar, name) for name in names]]

"""Reads the file of a checkpoint in whatever format, without running code in it; `checkpoint` makes sense of it."""

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cn_clip.clip import torchscript
from cn_clip.errors import CheckpointError


def read_content(path: Path) -> Any:
    """What a file holds, on the CPU; raises CheckpointError when it is no weight file, or reading it would run code."""
    if not os.path.isfile(path):  # unlike Path.is_file, also for a name that is too long
        raise CheckpointError(f"{path}: no such file; give the path of a checkpoint or a model's name")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if is_torchscript(path):
        return torchscript.read_state_dict(path)
    return _torch_load(path)


def only_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a dictionary; raises CheckpointError without any, and for one that is not stored in full."""
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(key): value for key, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"{path}: holds no tensors; expected a checkpoint with a `state_dict`")
    for name, value in tensors.items():
        if _stored_bytes(value) < value.numel() * value.element_size():
            shape = tuple(value.shape)
            raise CheckpointError(f"{path}: {name} holds fewer values than its shape {shape}; expected each of them")
    return tensors


def _stored_bytes(value: Tensor) -> int:
    """An expanded tensor has less than its shape says: a file of a kilobyte could ask for terabytes."""
    try:
        return 0 if value.is_meta else value.untyped_storage().nbytes()
    except NotImplementedError:  # sparse
        return 0


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file ({error})") from error


def is_torchscript(path: Path) -> bool:
    """Whether a file is an archive of TorchScript, as OpenAI publishes them."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/constants.pkl") for name in archive.namelist())
    except Exception:  # not a zip file, or a damaged one: torch.load will say so
        return False


def _torch_load(path: Path) -> Any:
    try:
        with open(path, "rb") as stream:
            is_zip = stream.read(4) == b"PK\x03\x04"
        with warnings.catch_warnings(), torch.serialization.safe_globals(_numpy_scalar_globals()):
            # Warnings are about pickles that are then refused, or read all the same.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_refusal(str(error))}") from error
    except Exception as error:  # whatever a damaged pickle makes its reader stumble over
        raise CheckpointError(f"{path}: not a PyTorch checkpoint, or damaged ({first_sentence(error)})") from error


def first_sentence(error: Exception) -> str:
    """The message of an error, to its first full stop; its type when it has none."""
    return re.split(r"\.?\n|\. |\.$", str(error), maxsplit=1)[0] or type(error).__name__


def _refusal(message: str) -> str:
    found = re.search(r"GLOBAL ([\w.]+)", message)
    if found:
        return f"refused, because loading it would run code ({found[1]}); expected tensors and plain values only"
    return "not a PyTorch checkpoint; expected a file written by torch.save"


def _numpy_scalar_globals() -> list[Any]:
    """Optimizer states of Chinese-CLIP hold the learning rate as a numpy float: data, not code."""
    import numpy as np

    scalar = np.float64(0).__reduce__()[0]
    dtypes = [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64)]
    names = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]
    return [np.dtype, *dtypes, *[(scalar, name) for name in names]]

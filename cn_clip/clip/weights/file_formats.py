"""Reads the file of a checkpoint in whatever format, without running code in it; `checkpoint` makes sense of it."""

import ctypes
import io
import math
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

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from cn_clip.clip.weights.file_kinds import check_unpacked, is_safetensors, is_zip, most_bytes, what_it_is
from cn_clip.errors import CheckpointError, reading

_AGAIN = "download or copy it again"
# Optimizer states of Chinese-CLIP hold the learning rate as a numpy float: data, not code.
_NUMPY_SCALARS: list[Any] = [
    *(np.dtype, *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64))),
    *((np.float64(0).__reduce__()[0], f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
]


def read_content(path: Path, *, mapped: bool = False) -> Any:
    """What a file holds, on the CPU; raises CheckpointError when it is no weight file, or reading it would run code.

    mapped: the tensors stay in the file where its format allows. They change when the file is written, and reading
    them ends the process (SIGBUS) once it is shorter: `owned` copies those that are kept.
    """
    if not os.path.isfile(path):  # unlike Path.is_file, also for a name that is too long
        raise CheckpointError("no such file; give the path of a checkpoint or a model's name", at=path)
    with reading(path, CheckpointError, step=_AGAIN, look=what_it_is):
        if path.suffix == ".safetensors" or is_safetensors(path):
            with reading(path, CheckpointError, what="not a safetensors file", step=_AGAIN, look=what_it_is):
                tensors = load_file(path)
            return tensors if mapped else owned(tensors, give_back=True)
        is_packed = is_zip(path)
        if is_packed:
            check_unpacked(path, CheckpointError)
        if is_torchscript(path):
            return read_torchscript(path)
        return _torch_load(path, mapped=mapped and is_packed)


def metadata_of(path: Path) -> dict[str, str]:
    """What a safetensors file that was read says of itself; of other files nothing."""
    if not (path.suffix == ".safetensors" or is_safetensors(path)):
        return {}
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata() or {})


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
        # Torch allocated the memory, as it did not for a mapped file, and for this tensor only.
        memory, size = own.untyped_storage(), own.numel() * own.element_size()
        is_whole = memory.resizable() and memory.nbytes() == size and own.is_contiguous()
        if not is_whole or own.data_ptr() in taken:
            own = own.clone(memory_format=torch.contiguous_format)
        taken.add(own.data_ptr())
        result[name] = own
        if give_back and sys.platform == "linux" and not value.untyped_storage().resizable():
            # The pages leave this process and are read again when they are used again; other systems take them
            # when memory runs short.
            mapped, page = value.untyped_storage(), mmap.PAGESIZE
            begin = -(-mapped.data_ptr() // page) * page
            end = (mapped.data_ptr() + mapped.nbytes()) // page * page
            if begin < end:
                ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), mmap.MADV_DONTNEED)
    return result


def only_tensors(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a dictionary; raises CheckpointError without any, and for one that is not stored in full."""
    items = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(key): value for key, value in items if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError("holds no tensors; expected a checkpoint with a `state_dict`", at=path)
    for name, value in tensors.items():
        try:
            num_bytes = 0 if value.is_meta else value.untyped_storage().nbytes()
        except NotImplementedError:  # sparse
            num_bytes = 0
        # An expanded tensor has less than its shape says: a file of a kilobyte could ask for terabytes.
        if num_bytes < value.numel() * value.element_size():
            shape = tuple(value.shape)
            raise CheckpointError(f"{name} holds fewer values than its shape {shape}; expected each of them", at=path)
    return tensors


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
        torch.serialization.safe_globals(_NUMPY_SCALARS),
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


# --- archives of TorchScript, as OpenAI publishes CLIP, read without running any of their code

STORAGE_DTYPES = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
}


# A class in an archive's source text, and the lists of names that say which attributes are weights.
_CLASS = re.compile(r"^class (\w+)\(Module\):\n((?:  .*\n|\n)*)", re.MULTILINE)
_WEIGHT_NAMES = re.compile(r"^  __(?:parameters|buffers)__ = \[(.*)\]$", re.MULTILINE)


class _Module:
    """Stands for any scripted module: only its attributes are kept. `kind` is its dotted class name."""

    kind = ""

    def __init__(self, *_: Any) -> None:
        self.attributes: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def _rebuild_parameter(tensor: Tensor, *_: Any) -> Tensor:
    return tensor


class _Unpickler(pickle.Unpickler):
    """Admits tensors, containers and scripted modules (as `_Module`); refuses every other name.

    The tensors together may take `most_bytes` of the file: a few bytes can ask for a tensor of any size, many times.
    """

    def __init__(self, archive: zipfile.ZipFile, root: str, path: Path) -> None:
        super().__init__(io.BytesIO(archive.read(f"{root}/data.pkl")))
        self._archive, self._root, self._path = archive, root, path
        self._storages: dict[str, Tensor] = {}
        self._bytes_left = most_bytes(path)

    def find_class(self, module: str, name: str) -> Any:
        if module.startswith("__torch__"):
            return type("_ScriptedModule", (_Module,), {"kind": f"{module}.{name}"})
        if module == "torch" and name in STORAGE_DTYPES:
            return name
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return self._rebuild_tensor
        if module == "torch._utils" and name == "_rebuild_parameter":
            return _rebuild_parameter
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise CheckpointError(f"refused, because loading it would run code ({module}.{name})", at=self._path)

    def persistent_load(self, pid: Any) -> Tensor:
        _, storage_type, key, _, numel = pid
        if key not in self._storages:
            content = bytearray(self._archive.read(f"{self._root}/data/{key}"))
            self._storages[key] = torch.frombuffer(content, dtype=STORAGE_DTYPES[storage_type], count=int(numel))
        return self._storages[key]

    def _rebuild_tensor(
        self, storage: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any
    ) -> Tensor:
        self._bytes_left -= math.prod(size) * storage.element_size()
        if self._bytes_left < 0:
            raise ValueError("its tensors would take far more memory than the file has bytes")
        return torch.as_strided(storage, size, stride, offset).clone()


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of an archive under their dotted names; raises CheckpointError when it is damaged."""
    explained = reading(path, CheckpointError, what="a damaged TorchScript archive", step=_AGAIN)
    with explained, zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("/data.pkl")
        module = _Unpickler(archive, root, path).load()
        # For each class, which attributes are parameters or buffers: others, like masks, are no part of a state dict.
        names: dict[str, set[str]] = {}
        sources = [one for one in archive.namelist() if one.startswith(f"{root}/code/") and one.endswith(".py")]
        for source in sources:
            package = source.removeprefix(f"{root}/code/").removesuffix(".py").replace("/", ".")
            for kind, body in _CLASS.findall(archive.read(source).decode()):
                lists = _WEIGHT_NAMES.findall(body)
                names[f"{package}.{kind}"] = set(re.findall(r'"([^"]+)"', " ".join(lists)))
        tensors: dict[str, Tensor] = {}
        _collect(module, "", tensors, names)
        return tensors


def _collect(module: _Module, prefix: str, tensors: dict[str, Tensor], weight_names: dict[str, set[str]]) -> None:
    for name, value in module.attributes.items():
        if isinstance(value, Tensor) and name in weight_names.get(module.kind, module.attributes):
            tensors[prefix + name] = value
        elif isinstance(value, _Module):
            _collect(value, f"{prefix}{name}.", tensors, weight_names)

"""Reads the tensors of a TorchScript archive, as OpenAI publishes CLIP, without running any of its code."""

import io
import math
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cn_clip.clip.weights.file_kinds import most_bytes
from cn_clip.errors import CheckpointError, reading

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


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Parameters and buffers of the archive under their dotted names; raises CheckpointError when it is damaged."""
    explained = reading(path, CheckpointError, what="a damaged TorchScript archive", step="download or copy it again")
    with explained, zipfile.ZipFile(path) as archive:
        root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("/data.pkl")
        module = _Unpickler(archive, root, path).load()
        tensors: dict[str, Tensor] = {}
        _collect(module, "", tensors, _weight_names(archive, root))
        return tensors


def _weight_names(archive: zipfile.ZipFile, root: str) -> dict[str, set[str]]:
    """For each class, which attributes are parameters or buffers: others, like masks, are no part of a state dict."""
    names: dict[str, set[str]] = {}
    sources = [name for name in archive.namelist() if name.startswith(f"{root}/code/") and name.endswith(".py")]
    for source in sources:
        package = source.removeprefix(f"{root}/code/").removesuffix(".py").replace("/", ".")
        for kind, body in _CLASS.findall(archive.read(source).decode()):
            lists = _WEIGHT_NAMES.findall(body)
            names[f"{package}.{kind}"] = set(re.findall(r'"([^"]+)"', " ".join(lists)))
    return names


def _collect(module: _Module, prefix: str, tensors: dict[str, Tensor], weight_names: dict[str, set[str]]) -> None:
    for name, value in module.attributes.items():
        if isinstance(value, Tensor) and name in weight_names.get(module.kind, module.attributes):
            tensors[prefix + name] = value
        elif isinstance(value, _Module):
            _collect(value, f"{prefix}{name}.", tensors, weight_names)

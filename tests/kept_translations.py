"""A tower is translated to ONNX once a test run: all processes keep in one folder what `torch.onnx.export` returned.

Only the translation by PyTorch is kept, which takes seconds; what is made of it and measured on it is done anew. The
tests' own process installs it (conftest.py), and so do the commands that they start with warm_python.
"""

import functools
import hashlib
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The folder; processes that the tests start inherit it.
VARIABLE = "CN_CLIP_KEPT_TRANSLATIONS"


def key(model: Any, arguments: "tuple[Any, ...]", settings: "dict[str, Any]") -> str:
    """Of the weights, the layers with their settings, and what they are called with."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().data)
    facts = [(name, plain(one), plain(getattr(one, "config", None))) for name, one in model.named_modules()]
    shapes = [(tuple(one.shape), one.dtype) for one in arguments]
    digest.update(repr((model, facts, shapes, sorted(settings.items()))).encode())
    return digest.hexdigest()


def plain(thing: object) -> "dict[str, object]":
    """The attributes that are numbers, texts, tuples of them, or functions by their names."""
    attributes = {name: getattr(value, "__qualname__", value) for name, value in getattr(thing, "__dict__", {}).items()}
    return {name: value for name, value in attributes.items() if isinstance(value, int | float | str | tuple)}


def keeping(export: "Callable[..., Any]", folder: Path) -> "Callable[..., Any]":
    """`torch.onnx.export` that looks into the folder first."""
    from torch.onnx import ONNXProgram

    @functools.wraps(export)
    def kept(model: Any, arguments: "tuple[Any, ...]", **settings: Any) -> Any:
        import onnx
        import onnx_ir

        path = folder / f"{key(model, arguments, settings)}.onnx"
        if not path.exists():
            program = export(model, arguments, **settings)
            folder.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                file.write(program.model_proto.SerializeToString())
            os.replace(file.name, path)
        return ONNXProgram(onnx_ir.from_proto(onnx.load(path)), None)

    return kept


def install() -> None:
    """In this process, if it is one of a test run."""
    if VARIABLE in os.environ:
        import torch.onnx

        torch.onnx.export = keeping(torch.onnx.export, Path(os.environ[VARIABLE]))

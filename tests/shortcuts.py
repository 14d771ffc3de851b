"""What the processes of a test run do not do twice, or not at all, because it takes seconds and other tests see to it.

- A tower is translated to ONNX once a run: all processes keep in one folder what `torch.onnx.export` returned. What is
  made of it and measured on it is done anew.
- Matplotlib writes blank pictures: a run draws its curves after every validation. The fixture `drawn` has them drawn.
- The pair ViT-Tiny-64 and BERT-Tiny-chinese, which tests train, has a sixth of its parameters: a checkpoint of 109 MB,
  of which a run writes two an epoch, has 18 MB. The fixture `full_towers` has them as they are.

The tests' own process takes these (conftest.py), and so do the commands that they start with warm_python, if a variable
of their environment says so.
"""

import contextlib
import functools
import hashlib
import importlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

TRANSLATIONS, BLANK = "CN_CLIP_TEST_TRANSLATIONS", "CN_CLIP_TEST_BLANK_PICTURES"
# The value names pairs: `tiny` in all tests, `base` in those of documents.
SMALL = "CN_CLIP_TEST_SMALL_TOWERS"
PAIRS = {"tiny": ("ViT-Tiny-64", "BERT-Tiny-chinese"), "base": ("ViT-B-16", "RoBERTa-wwm-ext-base-chinese")}


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


def blank(figure: Any, stream: Any, **_: Any) -> None:
    """In the stead of `Figure.savefig`."""
    from PIL import Image

    Image.new("L", (1, 1)).save(stream, "PNG")


def undrawn(figure: Any, series: Any) -> None:
    """In the stead of `curves.fill`: axes and lines alone take half a second."""


def smaller(model_config: "Callable[[str, str], Any]", pairs: str) -> "Callable[[str, str], Any]":
    """`zoo.model_config` with fewer numbers in the named pairs."""

    @functools.wraps(model_config)
    def chosen(vision: str, text: str) -> Any:
        config = model_config(vision, text)
        if (vision, text) not in [PAIRS[name] for name in pairs.split()]:
            return config
        pictures = {"vision_layers": 2, "vision_width": 64}
        pictures |= {"embed_dim": 64} if config.vision.embed_dim < 512 else {}
        texts = {"text_hidden_size": 64, "text_intermediate_size": 128, "text_num_attention_heads": 1}
        texts |= {"text_num_hidden_layers": 2}
        return replace(config, vision=replace(config.vision, **pictures), text=replace(config.text, **texts))

    return chosen


def forgo(_: Any) -> None:
    """In the stead of `os.fsync`: what a process wrote outlives its death, and no test cuts the power."""


def install() -> None:
    """In a process that a test has started, as its environment says; it never waits for the disk."""
    os.fsync = forgo
    if TRANSLATIONS in os.environ:
        import torch.onnx

        torch.onnx.export = keeping(torch.onnx.export, Path(os.environ[TRANSLATIONS]))
    if BLANK in os.environ:
        from matplotlib.figure import Figure

        Figure.savefig = blank
        with contextlib.suppress(ModuleNotFoundError):  # the package is a stand-in
            curves = importlib.import_module("cn_clip.training.curves")
            curves.fill = undrawn
    if SMALL in os.environ:
        zoo = importlib.import_module("cn_clip.zoo")
        zoo.model_config = smaller(zoo.model_config, os.environ[SMALL])

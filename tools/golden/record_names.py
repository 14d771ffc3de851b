"""Records tests/golden/names.json, every name of every module of cn_clip 1.6.0, its arguments and options:

REFERENCE/bin/python tools/golden/record_names.py
"""

import argparse
import contextlib
import importlib
import inspect
import json
import pkgutil
import sys
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import reference_shim  # noqa: E402, F401
import timm  # noqa: E402, F401  (before the packages that are not there: torchvision asks for onnx)

import cn_clip  # noqa: E402
import cn_clip.training.data  # noqa: E402

# Packages that only some modules need; what they define does not depend on them.
for name in ("tensorrt", "tensorrt.tensorrt", "onnx", "onnxmltools", "onnxmltools.utils", "coremltools", "onnxruntime"):
    sys.modules.setdefault(name, mock.MagicMock(name=name, __spec__=None))


def default_of(value: Any) -> Any:
    """A default as JSON; what JSON has no form for by the name of its type."""
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, str) and Path(value).is_absolute():
        return {"type": "path"}
    return value if isinstance(value, (str, int, float, bool, type(None))) else {"type": type(value).__name__}


def parameters(function: Any) -> list[list[Any]]:
    """Of each parameter its name, kind and, if it has one, default."""
    return [
        [one.name, one.kind.name, *([] if one.default is one.empty else [default_of(one.default)])]
        for one in inspect.signature(function).parameters.values()
    ]


def methods(cls: type) -> dict[str, list[list[Any]]]:
    """Of this class and of those it builds on in the package."""
    found = {}
    for base in reversed(cls.__mro__):
        if base.__module__.startswith("cn_clip"):
            for name, value in vars(base).items():
                function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
                is_public = not name.startswith("_") or name in ("__init__", "__call__", "__getitem__", "__len__")
                if is_public and isinstance(function, FunctionType):
                    found[name] = parameters(getattr(cls, name))
    return found


def options(parse_args: Any) -> dict[str, Any]:
    """What a command takes: of each option its default, type, choices, and whether it must be given."""
    seen: list[argparse.ArgumentParser] = []

    def keep(parser: argparse.ArgumentParser, *_: Any) -> argparse.Namespace:
        seen.append(parser)
        raise KeyboardInterrupt

    with mock.patch.object(argparse.ArgumentParser, "parse_args", keep), contextlib.suppress(KeyboardInterrupt):
        parse_args()
    return {
        action.option_strings[0]: {
            "dest": action.dest,
            "default": action.default,
            "type": "flag" if action.nargs == 0 else getattr(action.type, "__name__", "str"),
            "choices": list(action.choices) if action.choices else None,
            "required": action.required,
        }
        for action in seen[0]._actions
        if action.dest != "help"
    }


def constant(value: Any) -> dict[str, Any]:
    entry: dict[str, Any] = {"constant": type(value).__name__}
    if isinstance(value, dict):
        entry["keys"] = sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        entry |= {"length": len(value), "items": sorted({type(item).__name__ for item in value})}
    return entry


def entry_of(module: ModuleType, name: str, value: Any) -> dict[str, Any] | None:
    """None for what the module merely imports from other packages."""
    if isinstance(value, (ModuleType, mock.NonCallableMock)):
        return None
    value = inspect.unwrap(value) if callable(value) else value  # a function that is cached
    home = getattr(value, "__module__", None)
    if isinstance(value, (type, FunctionType)):
        home = {"clip.utils": "cn_clip.clip.utils", "tensorrt_utils": "cn_clip.deploy.tensorrt_utils"}.get(home, home)
        if not home.startswith("cn_clip"):
            return None
        if home != module.__name__:
            return {"from": home}
        if isinstance(value, type):
            entry: dict[str, Any] = {"class": methods(value)}
            return entry | (
                {"fields": list(value.__dataclass_fields__)} if hasattr(value, "__dataclass_fields__") else {}
            )
        return {"function": parameters(value)} | ({"options": options(value)} if name == "parse_args" else {})
    if home is not None and not home.startswith("cn_clip") and not isinstance(value, (dict, list)):
        return None  # a constant of typing, an instance of another package's class
    return constant(value)


def surface(module: ModuleType) -> dict[str, Any]:
    names = {name: value for name, value in vars(module).items() if not name.startswith("__")}
    entries = {name: entry_of(module, name, value) for name, value in sorted(names.items())}
    return {name: entry for name, entry in entries.items() if entry is not None}


def one_a_line(entries: dict[str, Any]) -> str:
    """A name a line, so that a difference between two records can be read."""
    return ",\n".join(
        f" {json.dumps(name)}: {json.dumps(entry, ensure_ascii=False)}" for name, entry in entries.items()
    )


def main() -> None:
    (folder,) = cn_clip.__path__
    sys.path += [folder, str(Path(folder) / "deploy")]  # pytorch_to_onnx imports `clip`, onnx_to_tensorrt its neighbour
    found = {}
    for module in pkgutil.walk_packages([folder], "cn_clip."):
        found[module.name] = surface(importlib.import_module(module.name))
    lines = [
        f"{json.dumps(name)}: {{\n{entries}\n}}" for name, entries in ((m, one_a_line(e)) for m, e in found.items())
    ]
    (ROOT / "tests" / "golden" / "names.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    print(len(found), "modules,", sum(map(len, found.values())), "names")


if __name__ == "__main__":
    main()

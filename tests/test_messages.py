"""The options that messages name: the commands that print a message have them, or the message names the command."""

import ast
import dataclasses
import importlib
import re
from functools import cache
from pathlib import Path

import pytest

import cn_clip
from cn_clip.cli import COMMANDS
from cn_clip.command import spellings

ROOT = Path(cn_clip.__file__).parent
FLAG = re.compile(r"(?<![\w-])--[a-z][a-z0-9]*(?:-[a-z0-9]+)*(?![\w-])")
NAMED = re.compile("cn-clip (" + "|".join(sorted(COMMANDS, key=len, reverse=True)) + r")\b")
TENSORRT = {"export tensorrt"}
# Options that the modules which all commands share name, and the commands whose settings lead to that message.
RAISED_BY: dict[tuple[str, str], set[str]] = {
    **{
        ("clip/backends/tensor_rt.py", flag): TENSORRT
        for flag in ("--fp16", "--model-arch", "--batch-size", "--context-length")
    },
    ("clip/backends/tensor_rt.py", "--precisions"): {"export onnx"},
    ("clip/backends/onnx_runtime.py", "--device"): {"features", "zeroshot", "evaluate", "linear-probe", "index build"}
    | {"index add", "index check", "search", "serve", "bench"},
    **{("clip/choice.py", flag): {"features", "zeroshot"} for flag in ("--model", "--resume")},
    **{
        ("clip/choice.py", flag): {"features", "zeroshot", "evaluate", "linear-probe", "index build"}
        | {"index add", "index check", "search", "serve"}
        for flag in ("--num-threads", "--strict-fp32", "--backend", "--precision", "--min-cosine", "--merge-tokens")
    },
    **{
        ("clip/opening.py", flag): {"features", "zeroshot", "evaluate", "linear-probe"}
        for flag in ("--strict-fp32", "--precision")
    },
    ("clip/opening.py", "--context-length"): {"features", "zeroshot", "evaluate", "report"},
    ("clip/families/st_models.py", "--trust-remote-code"): {"features", "zeroshot", "evaluate", "linear-probe"}
    | {"index build", "index add", "index check", "search", "serve"},
    ("clip/weights/hub.py", "--offline"): {"download"},
    ("clip/weights/writing.py", "--output"): {"checkpoint strip", "checkpoint average", "checkpoint export"},
    ("data/checks.py", "--decode"): {"train", "features", "zeroshot", "evaluate", "linear-probe"},
    ("data/building.py", "--json"): {"dataset build", "dataset from-folder"},
    ("data/building.py", "--num-shards"): {"dataset shards"},
    ("data/building.py", "--output"): {"dataset shards"},
    ("data/building.py", "--overwrite"): {"dataset shards"},
    **{
        ("data/captions.py", flag): {"dataset from-folder"}
        for flag in ("--folder", "--ids", "--output", "--image-column", "--text-column", "--text-from", "--table")
    },
    **{("data/review.py", flag): {"dataset from-folder"} for flag in ("--clean-names", "--text-from", "--table")},
    ("data/checks.py", "--on-error"): {"dataset build", "dataset from-folder"},
    ("data/datasets.py", "--num-workers"): {"train"},
    ("data/shards.py", "--on-error"): {"train", "features"},
    ("ranks.py", "--device"): {"train", "features", "topk", "report", "zeroshot", "evaluate", "linear-probe", "wise-ft"}
    | {"index build", "index add", "index check", "search", "serve", "bench"},
    ("retrieval/remote.py", "--thumbnail-size"): {"index build", "index add"},
    ("retrieval/remote.py", "--engine"): {"index build"},
    ("retrieval/store.py", "--model"): {"index build", "index add", "index check", "search", "serve"},
}
SHARED = ("integrations", "clip", "data", "retrieval")
# An alias of the address of an index, which help leaves out.
STORE = ("--store",)
# Not options of ours: of docker, of pip, of torchrun, of style sheets.
OTHERS = {
    ("data/datasets.py", "--ipc"),
    ("data/datasets.py", "--shm-size"),
    ("ranks.py", "--nproc-per-node"),
    ("training/building.py", "--upgrade"),
    ("training/main.py", "--local-rank"),
    ("deploy/towers.py", "--pytorch-ckpt"),
}


@cache
def options_of(command: str) -> frozenset[str]:
    named = spellings(importlib.import_module(COMMANDS[command].module).Options)
    return frozenset({*named, *(STORE if command.startswith(("index ", "search")) else ())})


def messages(path: Path) -> list[str]:
    """The texts of a module that are not docstrings, the parts of an f-string joined."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.JoinedStr):
            parts = [one.value if isinstance(one, ast.Constant) else "…" for one in node.values]
            skipped |= {id(one) for one in node.values}
            found.append("".join(map(str, parts)))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
    return found


def faults(name: str, text: str, own: frozenset[str]) -> list[str]:
    """The options a message of a module names that its reader may not have. own: options of the module's commands."""
    found = []
    for flag in FLAG.finditer(text):
        command = [one[1] for one in NAMED.finditer(text[: flag.start()])]
        if command and flag[0] in options_of(command[-1]):
            continue
        raised_by = RAISED_BY.get((name, flag[0]), set())
        lacking = [one for one in raised_by if flag[0] not in options_of(one)]
        if lacking or not (raised_by or flag[0] in own or (name, flag[0]) in OTHERS):
            found.append(f"{name}: {flag[0]} in {text!r}{f', not of {lacking}' if lacking else ''}")
    return found


def options_of_package(name: str) -> frozenset[str]:
    """Of the commands and scripts in the folder of a module (of evaluation/: in eval/); none for what all share."""
    folder = name.partition("/")[0].replace("evaluation", "eval")
    if "/" not in name or folder in SHARED:
        return frozenset()
    found: set[str] = set(STORE if folder == "index" else ())
    for path in (ROOT / folder).glob("*.py"):
        module = importlib.import_module(f"cn_clip.{folder}.{path.stem}")
        for kind in vars(module).values():
            if isinstance(kind, type) and dataclasses.is_dataclass(kind):
                found |= {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(kind)}
                found |= set(spellings(kind)) if kind.__name__ == "Options" else set()
    return frozenset(found)


FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))
LIGHT = [name for name in FILES if not name.startswith("demo/")]


@pytest.mark.parametrize("folder", sorted({name.rpartition("/")[0] or "." for name in LIGHT}))
def test_messages_name_options_that_the_commands_have(folder: str) -> None:
    names = [name for name in LIGHT if (name.rpartition("/")[0] or ".") == folder and name not in ("cli.py",)]
    own = options_of_package(names[0]) | {"--help", "--version"}
    assert [fault for name in names for text in messages(ROOT / name) for fault in faults(name, text, own)] == []


def test_an_option_of_another_command_would_be_found() -> None:
    assert faults("clip/weights/hub.py", "pass --hub modelscope", frozenset())
    assert not faults("clip/weights/hub.py", "run `cn-clip download ViT-B-16 --hub modelscope`", frozenset())

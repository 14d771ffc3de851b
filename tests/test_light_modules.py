"""What `--help` loads: the module of a command imports nothing heavy, and its help shows without it.

That models exported to ONNX or OpenVINO run without PyTorch is tested in test_backends.py and test_extract_backends.py.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cn_clip import cli

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "numpy", "PIL", "onnx", "onnxruntime", "openvino", "transformers", "tokenizers", "fastapi")
HEAVY += ("pyarrow", "matplotlib", "lmdb", "usearch", "safetensors", "huggingface_hub", "opencc")

# A fork for each command, of a process that has imported what all of them do: each sees what its own import brings.
EACH_COMMAND = """
import contextlib, importlib, io, json, os, sys
from cn_clip import cli, command

def heavy():
    return sorted(set(HEAVY) & set(sys.modules))

print(json.dumps(["", heavy(), [], "", 0]), flush=True)
for name, entry in cli.COMMANDS.items():
    if os.fork():
        os.wait()
        continue
    importlib.import_module(entry.module)
    imported, status = heavy(), 0
    sys.argv = ["cn-clip", *name.split(), "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as shown:
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code or 0
    print(json.dumps([name, imported, heavy(), shown.getvalue(), status]), flush=True)
    os._exit(0)
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, dict[str, Any]]:
    """Command -> what importing its module loaded, what its help loaded, that help, the status; "" is the table."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    code = f"HEAVY = {HEAVY!r}\n{EACH_COMMAND}"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    rows = map(json.loads, done.stdout.splitlines())
    found = {row[0]: dict(zip(("imported", "by_help", "help", "status"), row[1:], strict=True)) for row in rows}
    assert found.keys() == {"", *cli.COMMANDS}, done.stderr  # a child that fails prints no row
    return found


@pytest.mark.parametrize("name", ["", *cli.COMMANDS])
def test_the_module_of_a_command_imports_nothing_heavy(loaded: dict[str, dict[str, Any]], name: str) -> None:
    assert loaded[name]["imported"] == []


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_names_the_command_and_loads_nothing_heavy(loaded: dict[str, dict[str, Any]], name: str) -> None:
    assert loaded[name]["status"] == 0
    assert f"usage: cn-clip {name} " in loaded[name]["help"]
    assert loaded[name]["by_help"] == []

"""`cn-clip`: the table of commands, its help and refusals, the list of models, and how fast all that answers."""

import importlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import warm_python
from hypothesis import given
from hypothesis import strategies as st

from cn_clip import __version__, cli, command, models, terminal
from cn_clip.progress import cells_of

ROOT = Path(__file__).parents[1]


def run_python(*args: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "100"}
    return subprocess.run([python, *args], cwd=ROOT, env=env, capture_output=True, text=True)


def cn_clip(*args: str) -> subprocess.CompletedProcess[str]:
    return run_python("-m", "cn_clip", *args, python=warm_python.program())


# --- the table


@pytest.mark.parametrize("args", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_command(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(args)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[1] for line in lines if line.startswith("  ")] == list(cli.COMMANDS)


def test_help_columns_stand_under_each_other_on_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    pairs = zip(rows, cli.COMMANDS.values(), strict=True)
    starts = {cells_of(row[: row.index(known.english)]) for row, known in pairs}
    assert len(starts) == 1


def test_help_of_a_family_lists_its_commands_only(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["dataset", "--help"])
    out = capsys.readouterr().out
    assert "dataset from-folder" in out
    assert "recall" not in out


@pytest.mark.parametrize("name", ["models", "dataset check"])
def test_help_takes_the_name_of_a_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["help", *name.split()])
    assert stopped.value.code in (0, None)
    assert f"usage: cn-clip {name} " in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_version_is_the_package_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([flag])
    assert capsys.readouterr().out == f"cn-clip {__version__}\n"


@pytest.mark.parametrize(
    ("args", "line"),
    [
        (["recal", "a.jsonl"], "no command 'recal'; did you mean `cn-clip recall`?"),
        (
            ["dataset", "biuld"],
            "no command 'dataset biuld'; did you mean `cn-clip dataset build`?",
        ),
        (["bild"], "no command 'bild'; did you mean `cn-clip dataset build`?"),
        (
            ["dataset", "x"],
            "no command 'dataset x'; "
            "expected one of: dataset build, dataset from-folder, dataset check, dataset shards",
        ),
        (
            ["dataset"],
            "incomplete command 'dataset'; "
            "expected one of: dataset build, dataset from-folder, dataset check, dataset shards",
        ),
        (["--json"], f"no command '--json'; expected one of: {', '.join(cli.COMMANDS)}"),
    ],
)
def test_unknown_command_is_refused_in_one_line_with_the_nearest(
    args: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2
    assert capsys.readouterr().err == f"error: {line}\n"


def test_command_gets_the_rest_of_the_arguments_and_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    monkeypatch.setattr(models, "main", lambda args: seen.append((sys.argv[0], args)))
    monkeypatch.setitem(cli.COMMANDS, "dataset list", cli.Command("cn_clip.models", "", ""))
    monkeypatch.setattr(sys, "argv", ["/usr/bin/cn-clip", "dataset", "list", "--json"])
    cli.main()
    cli.main(["models", "list"])
    assert seen == [("cn-clip dataset list", ["--json"]), ("cn-clip models", ["list"])]


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_module_with_main(name: str) -> None:
    assert callable(importlib.import_module(cli.COMMANDS[name].module).main)


# --- as typed


def test_option_texts_end_without_a_full_stop() -> None:
    text = re.compile(r'^    (\w+): [^\n]*\n    """([^\n]+)"""$', re.MULTILINE)
    found = {path: text.findall(path.read_text(encoding="utf-8")) for path in (ROOT / "cn_clip").rglob("*.py")}
    options = [(path.name, *one) for path, all_of_them in found.items() for one in all_of_them]
    assert len(options) > 100
    assert [one for one in options if one[2].endswith(".")] == []


def test_unknown_flag_exits_with_status_2() -> None:
    done = cn_clip("models", "--nonsense")
    assert done.returncode == 2
    assert "--nonsense" in done.stdout + done.stderr


# --- columns


@pytest.mark.parametrize(("text", "cells"), [("", 0), ("abc", 3), ("中文", 4), ("，", 2), ("ｗ", 2), ("e\u0301", 1)])
def test_width_counts_terminal_cells(text: str, cells: int) -> None:
    assert cells_of(text) == cells


def test_align_fills_by_cells_left_and_right() -> None:
    assert terminal.align([("猫", "1", "x"), ("cat!", "12", "")], right=frozenset({1})) == ["猫     1  x", "cat!  12"]
    assert terminal.align([]) == []
    with pytest.raises(ValueError, match="zip"):
        terminal.align([("a", "b"), ("c",)])


@given(st.lists(st.text(alphabet="a中é，", max_size=9), min_size=1))
def test_padded_texts_are_equally_wide(texts: list[str]) -> None:
    assert {cells_of(terminal.pad(text, 20)) for text in texts} == {20}


@dataclass(frozen=True)
class _Sized:
    img_batch_size: int = 4
    device: str = "auto"


def test_out_of_memory_is_one_line_with_the_options_that_the_command_has(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    def allocate(_: _Sized) -> None:
        torch.empty(2**50)

    with pytest.raises(SystemExit, match="1"):
        command.execute(allocate, _Sized, [])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: out of memory (")
    assert line.endswith("; these need less: a smaller --img-batch-size, --device cpu")


def test_other_errors_of_libraries_keep_their_traceback() -> None:
    def fail(_: _Sized) -> None:
        raise RuntimeError("size of tensor")

    with pytest.raises(RuntimeError, match="size of tensor"):
        command.execute(fail, _Sized, [])

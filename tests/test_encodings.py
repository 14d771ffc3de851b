"""Standard output of any encoding, as a redirected one has on Windows: no command ends because of it."""

import ast
import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_lines import LINES, line_of, with_index
from dataset_files import REPOSITORY

from cn_clip import cli, terminal
from cn_clip.clip import load_from_name

ENCODINGS = ("cp1252", "gbk", "ascii")
# What these need is not on this machine, whatever the encoding.
ENDS_IN_A_SENTENCE = {"download", "index watch", "serve", "mcp", "export tensorrt"}
# Processes of their own, or minutes.
SLOW = {"bench", "train", "export coreml", "export onnx"}
HAS_JSON = {name for name in LINES if name not in ("train", "serve", "mcp", "download", "features")}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return with_index(tmp_path_factory.mktemp("世界"))  # a folder whose name most encodings lack


@contextlib.contextmanager
def printing(encoding: str) -> Iterator[tuple[io.BytesIO, io.BytesIO]]:
    """Standard output and error of an encoding, strict, as Python opens them."""
    raw = io.BytesIO(), io.BytesIO()
    out, err = (io.TextIOWrapper(one, encoding=encoding, errors="strict", write_through=True) for one in raw)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        yield raw
    out.detach()
    err.detach()


def run(words: list[str], encoding: str) -> tuple[int, str, str]:
    with printing(encoding) as (out, err):
        try:
            cli.main(words)
            status = 0
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        return status, out.getvalue().decode(encoding), err.getvalue().decode(encoding)


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("command", ["", *LINES])
def test_help_and_errors_are_printed(command: str, encoding: str) -> None:
    assert run([*command.split(), "--help"], encoding)[0] == 0
    status, _, error = run([*command.split(), "--没有这个选项"], encoding)
    assert status == 2
    assert error


# Every command meets the encoding that has least; a few meet the others, which change the streams in the same place.
CASES = [(name, "ascii") for name in LINES if name not in SLOW]
CASES += [(name, one) for name in ("models", "search", "dataset check") for one in ENCODINGS if one != "ascii"]


@pytest.mark.parametrize(("command", "encoding"), CASES)
def test_a_run_ends_as_it_would_in_utf8(
    command: str, encoding: str, paths: dict[str, Path], few_drawings: None, tmp_path: Path
) -> None:
    (tmp_path / "输出").mkdir()
    words = line_of(command, paths, tmp_path / "输出")
    status, _, error = run(words, encoding)
    if command in ENDS_IN_A_SENTENCE:
        assert status == 1
        assert "error: " in error
    else:
        assert status == 0, error


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_json_stays_json_and_says_the_same(encoding: str, paths: dict[str, Path]) -> None:
    words = ["dataset", "check", "--data-dir", str(paths["data"]), "--splits", "train", "--json"]
    printed = [run(words, one)[1] for one in (encoding, "utf-8")]
    assert json.loads(printed[0]) == json.loads(printed[1])
    words = ["search", str(paths["index"]), "红色🎂", "--device", "cpu", "--json"]
    status, out, error = run(words, encoding)
    assert status == 0, error
    assert json.loads(out)


def test_json_keeps_what_an_encoding_has(monkeypatch: pytest.MonkeyPatch) -> None:
    for encoding, expected in (("gbk", '{"名": "猫"}'), ("ascii", '{"\\u540d": "\\u732b"}')):
        with printing(encoding) as (out, _):
            terminal.print_json({"名": "猫"})
        assert out.getvalue().decode(encoding).strip() == expected
    with printing("utf-8") as (out, _):
        terminal.print_json("\udce9🎂")  # a file name that is not UTF-8
    assert out.getvalue() == '"\\udce9🎂"'.encode() + os.linesep.encode()


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_program_of_its_own_may_load_a_model(encoding: str, paths: dict[str, Path]) -> None:
    with printing(encoding) as (out, _):
        load_from_name(
            str(paths["checkpoint"]),
            device="cpu",
            vision_model_name="RN-Small-64",
            text_model_name="BERT-Tiny-chinese",
            input_resolution=64,
        )
        terminal.say("模型 🎂")
    assert "Model info" in out.getvalue().decode(encoding)


def test_a_process_ends_well_whatever_its_output_is(paths: dict[str, Path]) -> None:
    """A real process, its own streams: ASCII, closed, and a reader that is gone before the first line."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "ascii"}
    line = [sys.executable, "-m", "cn_clip", "models"]
    done = subprocess.run(line, env=environment, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(line, env=environment, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


# --- files

OPENERS = {"open", "fdopen", "NamedTemporaryFile", "TemporaryFile"}
READERS = {"read_text", "write_text", "FileHandler", "TextIOWrapper"}
# Their `open` opens something else than a text file.
OTHER_OPENERS = {"Image", "lmdb", "tarfile", "os", "zipfile", "archive", "Snapshot", "subject", "place", "webbrowser"}
OTHER_OPENERS |= {"_decoders", "graph", "av", "stored", "circuit"}


def names_no_encoding(node: ast.Call) -> bool:
    given = {one.arg: one.value for one in node.keywords}
    if "encoding" in given or None in given:
        return False
    function = node.func
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", None)
    if name in READERS:
        return True
    if name in OPENERS:
        owner = function.value if isinstance(function, ast.Attribute) else None
        if name == "open" and getattr(owner, "id", getattr(owner, "attr", None)) in OTHER_OPENERS:
            return False
        if isinstance(owner, ast.Call):  # Storage.child(…).open() reads bytes
            return not (isinstance(owner.func, ast.Attribute) and owner.func.attr in ("at", "child"))
        words = [one.value for one in (*node.args, given.get("mode")) if isinstance(one, ast.Constant)]
        return not any(isinstance(one, str) and "b" in one and len(one) < 5 for one in words)
    return any(
        isinstance(value := given.get(key), ast.Constant) and value.value for key in ("text", "universal_newlines")
    )


@pytest.mark.parametrize("folder", ["cn_clip", "benchmarks", "tools"])
def test_every_text_file_and_every_pipe_is_of_a_named_encoding(folder: str) -> None:
    found = []
    for path in sorted((REPOSITORY / folder).rglob("*.py")):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        found += [f"{path.relative_to(REPOSITORY)}:{node.lineno}" for node in calls if names_no_encoding(node)]
    assert found == []


def test_a_call_without_an_encoding_would_be_found() -> None:
    faulty = ("open(p)", "p.open()", "p.read_text()", "run(x, text=True)", 'open(p, "w")')
    fine = ('open(p, "rb")', 'p.open(encoding="utf-8")', "Image.open(p)", 'run(x, text=True, encoding="utf-8")')
    for source, expected in [*((one, True) for one in faulty), *((one, False) for one in fine)]:
        (call,) = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call))
        assert names_no_encoding(call) is expected, source

"""Output files: whole or not at all, never in the place of something else, and nothing left of runs that died."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cn_clip import jsonl
from cn_clip.errors import ConfigError, DataError
from cn_clip.jsonl import atomic_write, refuse_inputs
from cn_clip.processes import host_name


def write(path: str | Path, text: str = "new") -> None:
    with atomic_write(path) as stream:
        stream.write(text)


def test_a_link_stays_and_the_file_it_names_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "x").write_text("old")
    (tmp_path / "x").symlink_to(tmp_path / "real" / "x")
    (tmp_path / "dangling").symlink_to(tmp_path / "real" / "y")
    write(tmp_path / "x")
    write(tmp_path / "dangling")
    assert ((tmp_path / "x").is_symlink(), (tmp_path / "dangling").is_symlink()) == (True, True)
    assert {path.name: path.read_text() for path in (tmp_path / "real").iterdir()} == {"x": "new", "y": "new"}


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, reason in [("pipe", "is no regular file"), ("folder", "is a folder"), ("none/x", "does not exist")]:
        with pytest.raises(DataError, match=rf"{tmp_path}/{name}: .*{reason}"):
            write(tmp_path / name)
    with pytest.raises(DataError, match="an empty path"):
        write("")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "pipe"]


def test_a_name_that_is_too_long_and_a_full_disk_are_told_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"xxx: cannot be written \(File name too long\)"):
        write(tmp_path / ("x" * 300))
    code = f"from cn_clip.jsonl import atomic_write\nwith atomic_write({str(tmp_path / 'big')!r}) as stream:\n" + (
        "    for _ in range(9): stream.write('x' * 10_000)"
    )

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = subprocess.run([sys.executable, "-c", code], preexec_fn=limit, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert last == f"cn_clip.errors.OutputError: {tmp_path}/big: cannot be written (File too large)"
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_a_pipe_is_not_taken_for_one_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(BrokenPipeError), atomic_write(tmp_path / "x"):
        raise BrokenPipeError
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_dead_runs_go_and_those_of_live_ones_and_of_other_files_stay(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name in (
        dead := f".x.{host_name()}-{gone.pid}-abc.tmp",
        ours := f".x.{host_name()}-{os.getpid()}-abc.tmp",  # of a process before us with our number
        parent := f".x.{host_name()}-{os.getppid()}-abc.tmp",
        elsewhere := f".x.{host_name()}2-{gone.pid}-abc.tmp",
        other := f".xy.{host_name()}-{gone.pid}-abc.tmp",
    ):
        (tmp_path / name).touch()
    with atomic_write(tmp_path / "x") as first:
        first.write("first")
        write(tmp_path / "x", "second")  # two writers of one process do not take each other for dead
    assert (tmp_path / "x").read_text() == "first"
    assert {path.name for path in tmp_path.iterdir()} == {"x", parent, elsewhere, other}
    assert {dead, ours}.isdisjoint(os.listdir(tmp_path))
    assert jsonl._being_written == set()


def test_a_killed_writer_leaves_a_file_that_the_next_one_removes(tmp_path: Path) -> None:
    code = f"""
import os, signal
from cn_clip.jsonl import atomic_write
with atomic_write({str(tmp_path / "x")!r}):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code])
    assert len(list(tmp_path.iterdir())) == 1
    write(tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_an_output_that_is_an_input_by_any_name_is_refused(tmp_path: Path) -> None:
    texts, folder = tmp_path / "t.jsonl", tmp_path / "lmdb"
    folder.mkdir()
    for path in (texts, folder / "data.mdb"):
        path.touch()
    (tmp_path / "link").symlink_to(texts)
    (tmp_path / "hard").hardlink_to(texts)
    for output in (texts, tmp_path / "link", tmp_path / "hard", folder / ".." / "t.jsonl", folder / "data.mdb", folder):
        with pytest.raises(ConfigError, match=rf"--output {output}: would overwrite .*, which it reads"):
            refuse_inputs("--output", output, [texts, folder, folder / "data.mdb"])
    refuse_inputs("--output", tmp_path / "new.jsonl", [texts, folder, None, tmp_path / "gone"])
    with pytest.raises(ConfigError, match="--output: expected a path, got an empty one"):
        refuse_inputs("--output", "", [])

"""Outputs: whole or not at all, in no other thing's place, of one writer at a time; nothing is left of the dead."""

import ctypes
import errno
import os
import resource
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cn_clip import files
from cn_clip.errors import ConfigError, DataError
from cn_clip.files import Lock, alone, atomic_write, refuse_inputs, settle, staged_folder, written_together

ROOT = Path(__file__).parent.parent


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
    too_long = pytest.raises(DataError, match=r"xxx: cannot be written \(File name too long\)")
    with too_long, staged_folder(tmp_path / ("x" * 300)):
        pass
    code = f"from cn_clip.files import atomic_write\nwith atomic_write({str(tmp_path / 'big')!r}) as stream:\n" + (
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


def in_another_process(code: str, *words: object, killed: bool = False) -> str:
    """Runs `code` with `words` as its arguments, checks how it ends, and returns what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"import os, signal, sys\nfrom cn_clip import files\n{code}", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == (-signal.SIGKILL if killed else 0), done.stderr
    return done.stdout


KILL = "os.kill(os.getpid(), signal.SIGKILL)"


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


# --- what killed processes leave


@pytest.mark.parametrize("writer", [atomic_write, staged_folder, written_together])
def test_what_a_killed_writer_leaves_goes_whatever_its_host_was_called(tmp_path: Path, writer: Any) -> None:
    code = f"files.platform.node = lambda: 'container'\nwith files.{writer.__name__}(files.Path(sys.argv[1])): {KILL}"
    in_another_process(code, tmp_path / "x", killed=True)
    assert any(files.is_temporary(name) for name in names(tmp_path))
    (tmp_path / ".y.abcdefgh.tmp").mkdir()  # of another file, and without a lock
    with writer(tmp_path / "x"):
        pass
    assert [name for name in names(tmp_path) if name != "x"] == [".y.abcdefgh.tmp"]


def test_what_living_writers_have_stays(tmp_path: Path) -> None:
    with atomic_write(tmp_path / "x") as first:
        first.write("first")
        write(tmp_path / "x", "second")  # of this process
        in_another_process("with files.atomic_write(sys.argv[1]) as stream: stream.write('third')", tmp_path / "x")
        assert (tmp_path / "x").read_text() == "third"
    assert (tmp_path / "x").read_text() == "first"
    assert names(tmp_path) == ["x"]


def test_a_folder_that_is_not_of_this_package_is_not_a_leftover(tmp_path: Path) -> None:
    for name in (".x.abcdefgh.tmp", ".x.notes.tmp"):
        (tmp_path / name).mkdir()
    (tmp_path / ".x.filefile.tmp").write_text("mine")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "lock").touch()
    (tmp_path / ".x.linklink.tmp").symlink_to(tmp_path / "other")
    before = names(tmp_path)
    write(tmp_path / "x")
    assert names(tmp_path) == [*before, "x"]
    assert (tmp_path / "other" / "lock").exists()


def test_many_writers_of_one_name_at_once_all_succeed_and_leave_one_file(tmp_path: Path) -> None:
    code = "for n in range(40):\n with files.atomic_write(sys.argv[1]) as stream: stream.write('x' * 10000)"
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: in_another_process(code, tmp_path / "x"), range(3)))
    assert names(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "x" * 10000


def test_a_folder_locked_by_its_process_while_another_takes_it_for_abandoned_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outer = tmp_path / ".x.abcdefgh.tmp"
    outer.mkdir()
    (outer / "lock").touch()  # its process has opened it, and not locked it yet
    owner, release = files.Lock(outer / "lock"), files.Lock.release

    def release_and_be_overtaken(lock: files.Lock) -> None:
        release(lock)
        if lock is not owner and lock.path == owner.path:
            assert owner.acquire()
            (outer / "content").mkdir()

    monkeypatch.setattr(files.Lock, "release", release_and_be_overtaken)
    files.clear_leftovers(tmp_path, ".x.")
    assert names(outer) == ["content", "lock"]
    owner.release()


# --- permissions


def test_the_permissions_of_a_file_are_kept_and_those_of_a_new_one_obey_the_umask(tmp_path: Path) -> None:
    for name, mode in (("secret", 0o600), ("shared", 0o664)):
        (tmp_path / name).write_text("old")
        (tmp_path / name).chmod(mode)
    before = os.umask(0o027)
    try:
        for name in ("secret", "shared", "new"):
            write(tmp_path / name)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"secret": 0o600, "shared": 0o664, "new": 0o640}


def test_the_permissions_of_folders_and_of_files_written_together_are_kept(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir(mode=0o700)
    (tmp_path / "a").touch(mode=0o600)
    with staged_folder(tmp_path / "folder") as folder:
        (folder / "x").touch()
    with written_together(tmp_path / "group") as folder:
        (folder / "a").write_text("new")
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o600


# --- folders


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system whose library has no such call."""
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace())


@pytest.mark.parametrize("can_exchange", [True, False])
def test_a_folder_takes_the_place_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, can_exchange: bool
) -> None:
    if not can_exchange:
        without_exchange(monkeypatch)
    for name in ("old", "new"):
        with staged_folder(tmp_path / "folder") as folder:
            (folder / name).write_text(name)
        assert names(tmp_path / "folder") == [name]
    assert names(tmp_path) == ["folder"]


SEEN = """
moments = []
def look(event, arguments):
    if event in ("os.rename", "os.rmdir", "os.remove", "shutil.rmtree") and len(moments) < 1000:
        moments.append(sorted(os.listdir(sys.argv[1])) if os.path.isdir(sys.argv[1]) else None)
with files.staged_folder(sys.argv[1]) as folder:
    (folder / "new").touch()
    sys.addaudithook(look)
assert moments, "nothing was seen"
print(moments)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the step is of Linux and macOS")
def test_at_every_moment_there_is_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "old").touch()
    assert "None" not in in_another_process(SEEN, tmp_path / "folder")
    assert names(tmp_path / "folder") == ["new"]


def test_a_folder_that_is_a_mount_point_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "folder").mkdir()

    def busy(*_: object) -> int:
        ctypes.set_errno(errno.EBUSY)
        return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: SimpleNamespace(renameat2=busy))
    reason = r"folder: cannot be written \(Device or resource busy\)"
    with pytest.raises(DataError, match=reason), staged_folder(tmp_path / "folder"):
        pass
    assert names(tmp_path) == ["folder"]


# --- several files in one step

STEPS = """
count = 0
def look(event, arguments):
    global count
    if event in ("os.rename", "os.rmdir", "os.remove"):
        count += 1
        if count == int(sys.argv[2]): os.kill(os.getpid(), signal.SIGKILL)
with files.written_together(files.Path(sys.argv[1])) as folder:
    for name in ("a", "b", "c"):
        (folder / name).write_text("new")
    (folder / "inner").mkdir()
    (folder / "inner" / "d").write_text("new")
    sys.addaudithook(look)
print("done")
"""


def test_killed_at_any_step_all_files_are_old_or_all_are_new_once_settled(tmp_path: Path) -> None:
    """The first writer lays the old files, the second is killed at its first, second, ... renaming or removal."""
    found = []
    for step in range(1, 40):
        folder = tmp_path / str(step)
        folder.mkdir()
        for name in ("a", "b"):
            (folder / name).write_text("old")
        (folder / "inner").mkdir()
        (folder / "inner" / "e").write_text("old")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        code = f"import os, signal, sys\nfrom cn_clip import files\n{STEPS}"
        command = [sys.executable, "-c", code, str(folder / "group"), str(step)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        settle(folder)
        there = (path.relative_to(folder).as_posix() for path in folder.rglob("[a-e]"))
        seen = {name: (folder / name).read_text() for name in there if not name.startswith(".")}
        found.append(tuple(sorted(seen.items())))
        if done.returncode == 0:
            break
    old = (("a", "old"), ("b", "old"), ("inner/e", "old"))
    new = (("a", "new"), ("b", "new"), ("c", "new"), ("inner/d", "new"))
    assert found[-1] == new
    assert set(found) == {old, new}
    assert len(found) > 6


def test_what_cannot_be_settled_is_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".dataset.cn_clip-unfinished").mkdir()
    (tmp_path / ".dataset.cn_clip-unfinished" / "a").touch()

    def read_only(*_: object, **__: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Lock, "_open", read_only)
        with pytest.raises(DataError, match=r"cn_clip-unfinished: holds files of a run that was killed .*Read-only"):
            settle(tmp_path)
    settle(tmp_path)
    assert names(tmp_path) == ["a"]
    settle(tmp_path / "none")


def test_a_file_does_not_take_the_place_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with pytest.raises(DataError, match="a: is a folder"), written_together(tmp_path / "group") as folder:
        (folder / "a").touch()
    assert names(tmp_path) == ["a"]


# --- locks

HOLD = "lock = files.Lock(files.Path(sys.argv[1])); assert lock.acquire(); print(os.getpid(), flush=True); "


def holding(path: Path, then: str = "sys.stdin.read()") -> "subprocess.Popen[str]":
    code = f"import os, sys\nfrom cn_clip import files\n{HOLD}{then}"
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_a_lock_names_who_has_it_and_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with holding(path) as other:
        with (
            pytest.raises(ConfigError, match=rf"^busy \(pid {other.pid} on .+, since 2.*\); wait until it has ended"),
            alone(path, "busy"),
        ):
            pytest.fail("two have it")
        other.kill()
        other.wait()
        with alone(path, "busy"):
            assert path.exists()
    assert names(tmp_path) == []


def test_the_workers_of_a_killed_process_do_not_keep_its_lock(tmp_path: Path) -> None:
    fork = "\nif os.fork() == 0: import time; print(os.getpid(), flush=True); time.sleep(60)\nelse: sys.stdin.read()"
    with holding(tmp_path / "lock", fork) as other:
        assert other.stdout is not None
        child = int(other.stdout.readline())
        other.kill()
        other.wait()
        try:
            with alone(tmp_path / "lock", "the child has it"):
                pass
        finally:
            os.kill(child, signal.SIGKILL)


def test_a_child_neither_gives_the_lock_back_nor_removes_the_folder(tmp_path: Path) -> None:
    held = files.HeldFolder(tmp_path, ".x.")
    child = os.fork()
    if child == 0:
        held.remove()
        os._exit(0)
    os.waitpid(child, 0)
    assert held.path.is_dir()
    files.clear_leftovers(tmp_path, ".x.")
    assert held.path.is_dir()
    held.remove()
    assert names(tmp_path) == []


def test_who_waits_says_for_whom_and_then_goes_on(tmp_path: Path) -> None:
    said: list[str] = []
    with holding(tmp_path / "lock") as other:

        def end(sentence: str) -> None:
            said.append(sentence)
            other.kill()

        with alone(tmp_path / "lock", "busy", waiting=end):
            pass
    assert len(said) == 1
    assert said[0].startswith(f"busy (pid {other.pid} on ")


def test_many_processes_take_turns(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    code = """
path = files.Path(sys.argv[1])
for n in range(30):
    with files.alone(path / "lock", "busy", waiting=lambda _: None):
        (path / "count").write_text(str(int((path / "count").read_text()) + 1))
"""
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: in_another_process(code, tmp_path), range(3)))
    assert (tmp_path / "count").read_text() == "90"
    assert names(tmp_path) == ["count"]


def test_on_a_disk_without_locks_nothing_is_refused_and_nothing_taken_for_dead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_another_process(f"with files.atomic_write(sys.argv[1]): {KILL}", tmp_path / "x", killed=True)
    monkeypatch.setattr(files, "_try_lock", lambda _: None)
    with alone(tmp_path / "lock", "busy"), atomic_write(tmp_path / "x") as stream:
        stream.write("new")
    assert len(names(tmp_path)) == 2
    assert (tmp_path / "x").read_text() == "new"


@pytest.mark.parametrize("name", ["x" * 255, "长" * 85])
def test_the_longest_names_can_be_written(tmp_path: Path, name: str) -> None:
    write(tmp_path / name)
    with staged_folder(tmp_path / f"f{name[1:]}"), written_together(tmp_path / f"g{name[1:]}"):
        pass
    assert (tmp_path / name).read_text() == "new"


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

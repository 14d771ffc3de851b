"""The commands on a system without what only POSIX has, as on Windows."""

import ctypes
import importlib
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from command_lines import LINES, line_of, with_index

from cn_clip import cli, processes
from cn_clip.deploy import bench, bench_report, bench_worker
from cn_clip.deploy.bench_worker import Job

POSIX_MODULES = ("fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "posix", "syslog", "readline", "curses")
POSIX_NAMES = (
    *("fork", "getuid", "geteuid", "getgid", "getegid", "setsid", "killpg", "sched_getaffinity", "sched_setaffinity"),
    *("statvfs", "pread", "pwrite", "preadv", "posix_fadvise", "posix_fallocate", "mkfifo", "mknod"),
    *("chown", "fchown", "fchmod", "uname", "getloadavg", "sysconf", "register_at_fork", "wait4", "waitid", "nice"),
    *("O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC", "lockf", "sync"),
)
# What these need is not on this machine, whatever the system.
ENDS_IN_A_SENTENCE = {"download", "index watch", "serve", "mcp", "export tensorrt"}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return with_index(tmp_path_factory.mktemp("world"))


@pytest.fixture
def windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as this package can see. Other libraries keep what they imported before."""
    read_text = Path.read_text

    def without_proc(path: Path, *args: Any, **settings: Any) -> str:
        if str(path).startswith("/proc/"):
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return read_text(path, *args, **settings)

    for command in cli.COMMANDS.values():
        importlib.import_module(command.module)
    # Python has it on Windows too, by other means.
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 40, used=0, free=1 << 40))
    for name in POSIX_MODULES:
        monkeypatch.setitem(sys.modules, name, None)
    for name in POSIX_NAMES:
        monkeypatch.delattr(os, name, raising=False)
    monkeypatch.setattr(Path, "read_text", without_proc)


def test_memory_is_unknown_where_no_system_says_it(windows: None) -> None:
    assert processes.peak_bytes() == 0
    row = {"tower": "text", "backend": "torch", "precision": "fp32", "batch_size": 1, "peak_bytes": 0}
    numbers = dict.fromkeys(("median_ms", "p95_ms", "per_second", "load_s", "cosine_min", "cosine_mean"), 1.0)
    assert bench_report.cells({**row, **numbers})[-3] == "—"


def test_windows_is_asked_for_the_peak_of_the_working_set(windows: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        """kernel32, as its documentation says it answers."""

        def __init__(self, name: str) -> None:
            assert name == "kernel32"

            def get_current_process() -> int:
                return -1

            def get_memory_info(process: int, counters: Any, size: int) -> int:
                # A DWORD for the size, one for page faults, then eight of the width of a pointer.
                assert (process, size) == (-1, 8 + 8 * ctypes.sizeof(ctypes.c_size_t))
                counters._obj.peak_working_set = 300 * 2**20
                return 1

            self.GetCurrentProcess, self.K32GetProcessMemoryInfo = get_current_process, get_memory_info

    monkeypatch.setattr(ctypes, "WinDLL", Library, raising=False)
    assert processes.peak_bytes() == 300 * 2**20


def test_bench_measures_without_posix(windows: None, tmp_path: Path) -> None:
    job = Job("Emoji-Tiny", str(tmp_path), kind="text", device="cpu", num_threads=1)
    bench_worker.reference(job)
    row = bench_worker.measure(job)
    assert row["cosine_min"] > 0.999
    assert row["peak_bytes"] == 0
    assert bench.Options(model="Emoji-Tiny").backends


@pytest.mark.parametrize("command", [name for name in LINES if name != "bench"])
def test_every_command_runs_without_posix(
    command: str,
    paths: dict[str, Path],
    windows: None,
    few_drawings: None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    try:
        cli.main(line_of(command, paths, tmp_path))
    except SystemExit as stopped:
        if stopped.code:
            error = capsys.readouterr().err
            assert command in ENDS_IN_A_SENTENCE, error
            assert "error: " in error

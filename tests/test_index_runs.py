"""How a run of `cn-clip index build` goes on: what it says first, when it commits, what ends it, what it skips."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_index_commands import MODEL, Command, command, name, write_pictures

from cn_clip import cli
from cn_clip.clip.backends.pytorch import TorchBackend
from cn_clip.index import ingest
from cn_clip.retrieval.store import open_index

__all__ = ["command"]

SMALL = (*MODEL, "--batch-size", "4", "--num-workers", "0")


def test_the_first_line_says_what_there_is_to_do(
    tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, index = write_pictures(tmp_path / "pictures", range(3)), tmp_path / "i"
    for found, unchanged in ((3, 0), (5, 3)):
        write_pictures(folder, range(unchanged, found))
        cli.main(["index", "build", str(folder), "--output", str(index), *MODEL])
        assert capsys.readouterr().out.splitlines()[0] == (
            f"找到 {found} 张图片，{unchanged} 张未变 / found {found} pictures, {unchanged} unchanged; "
            f"模型 / model Emoji-Tiny (torch, auto, fp32) → {index}"
        )


def test_what_is_computed_is_committed_by_time_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_pictures(tmp_path / "pictures", range(10))
    monkeypatch.setattr(ingest, "COMMIT_SECONDS", 0.0)
    cli.main(["index", "build", str(folder), "--output", str(tmp_path / "i"), *SMALL])
    done = [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("已完成")]
    assert done == [f"已完成 / done {count} / 10" for count in (4, 8, 10, 10)]


@pytest.fixture
def signal_at_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Has a signal sent while the batch of that number, from 1, is computed."""

    def arm(number: int, at: int) -> None:
        encode, calls = TorchBackend.encode_pixels, []

        def with_signal(backend: TorchBackend, pixels: Any) -> Any:
            calls.append(len(pixels))
            if len(calls) == at:
                os.kill(os.getpid(), number)
            return encode(backend, pixels)

        monkeypatch.setattr(TorchBackend, "encode_pixels", with_signal)

    return arm


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_keeps_what_it_has_computed_and_goes_on(
    tmp_path: Path,
    command: Command,
    capsys: pytest.CaptureFixture[str],
    signal_at_batch: Callable[[int, int], None],
    number: int,
    status: int,
) -> None:
    folder, index = write_pictures(tmp_path / "pictures", range(12)), tmp_path / "i"
    gone = tmp_path / "gone.png"
    (folder / name(11)).rename(gone)
    command("index", "build", folder, "--output", index, *SMALL)
    write_pictures(folder, range(12, 24))
    (folder / name(0)).unlink()
    signal_at_batch(number, 3)
    args = ["index", "build", str(folder), "--output", str(index), *SMALL, "--json"]
    with pytest.raises(SystemExit, match=f"^{status}$"):
        cli.main(args)
    out = capsys.readouterr()
    assert "再运行同一条命令就接着做 / interrupted, with all kept that was done; the same command goes on" in out.err
    result = json.loads(out.out)
    # Two batches are kept, and nothing is removed by a run that has not seen all.
    assert (result["encoded"], result["num_items"], result["removed"], result["interrupted"]) == (8, 19, [], True)
    assert len(open_index(index)) == 19
    result = command(*args[:-1])
    assert (result["encoded"], result["unchanged"], result["removed"]) == (4, 18, [name(0)])
    assert result["interrupted"] is False

"""`benchmarks/index_run.py`, with few pictures: its kills lose nothing, and it finds what differs."""

import sys
from pathlib import Path

import numpy as np
import pytest
import warm_python

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import index_run

from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.store import Index, open_index
from cn_clip.retrieval.writer import NewItem, open_writer


@pytest.mark.long
def test_runs_that_are_ended_lose_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    options = index_run.Options(pictures=40, interrupts=4, python=str(warm_python.program()))
    index_run.measure(options)
    out = capsys.readouterr().out
    assert "pictures           40\n" in out
    assert "faults             []\n" in out


def index_of(folder: Path, *items: NewItem) -> Index:
    with open_writer(folder, Manifest(ModelInfo("m", "f", 2))) as writer:
        writer.commit(items)
    return open_index(folder)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        (NewItem("a", np.array([1, 0], dtype=np.float32), {"x": 1}, b"jpg"), []),
        (NewItem("b", np.array([1, 0], dtype=np.float32), {"x": 1}, b"jpg"), ["1 and 1 items, or others"]),
        (NewItem("a", np.array([0.5, 0], dtype=np.float32), {"x": 1}, b"jpg"), ["vectors differ by 0.5"]),
        (NewItem("a", np.array([1, 0], dtype=np.float32), {"x": 2}, b""), ["thumbnails differ", "metadata differ"]),
    ],
)
def test_differences_are_found(tmp_path: Path, item: NewItem, expected: list[str]) -> None:
    one = index_of(tmp_path / "1", NewItem("a", np.array([1, 0], dtype=np.float32), {"x": 1}, b"jpg"))
    assert list(index_run.differences(one, index_of(tmp_path / "2", item))) == expected


def test_the_last_report_counts() -> None:
    lines = ["500 / 900 done, 8.0/s, 00:50 left", "已完成 900 / 900"]
    assert index_run.Run(0, lines, 1.0, 1.0, 1.0).done == 900
    assert index_run.Run(-9, [], 1.0, 1.0, 1.0).done == 0

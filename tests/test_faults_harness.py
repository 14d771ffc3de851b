"""The harness of faults sees what it looks for: a traceback, a crash, a hang, a silent difference."""

import os
import random
import signal
import sys
from pathlib import Path

import lmdb
import pytest
import torch

from cn_clip.errors import DataError

if sys.platform != "linux":
    pytest.skip("the harness forks, and looks into /proc", allow_module_level=True)

from faults.counts import Counts
from faults.forked import reports
from faults.fuzz import World
from faults.mutations import odd_bytes, odd_json, odd_lines, odd_tar, odd_zip, small_tar
from faults.readers import Reader
from faults.writers import tree
from other_kinds import zipped

ACTS = b"sdtchmo"
EXPECTED = {"fine": 1, "sentence": 2, "traceback": 1, "signal": 2, "difference": 1}


def reads(folder: Path) -> object:
    """A reader with every fault, each at another first byte of its file."""
    data = (folder / "file").read_bytes()
    if data[0] == ord("d"):
        raise DataError(f"{folder}: damaged")
    if data[0] == ord("t"):
        raise KeyError("field")
    if data[0] == ord("c"):
        os.kill(os.getpid(), signal.SIGSEGV)
    while data[0] == ord("h"):
        pass
    return bytearray(1 << 40) if data[0] == ord("m") else data


def test_every_fault_is_counted_as_what_it_is_and_the_file_is_whole_again(tmp_path: Path) -> None:
    numbers = iter(range(100))
    reader = Reader(
        "every fault",
        lambda folder: (folder / "file").write_bytes(b"sound"),
        reads,
        {"*": lambda rng, data: bytes([ACTS[rng.randrange(7)]]) + data[1:]},
        is_checked=True,
    )
    chosen = {}
    while len(chosen) < len(ACTS):
        number = next(numbers)
        rng = random.Random(f"0/{reader.name}/{number}")
        rng.choice([0])  # the file
        chosen.setdefault(rng.randrange(7), number)
    counts = Counts("test")
    world = World(reader, tmp_path / "world", 0, sorted(chosen.values()), seconds=0.5)
    while world.taken < len(ACTS):
        world.go_on(counts)
    assert counts.found == EXPECTED
    assert counts.faults == 4
    assert str(counts).startswith("test: 7 inputs, 2 sentences, 1 tracebacks, 2 signals, 1 silent differences, 0 lost")
    assert (tmp_path / "world" / "file").read_bytes() == b"sound"


def test_a_child_that_dies_costs_only_its_own_input() -> None:
    def take(number: int) -> str:
        if number % 4 == 2:
            os.kill(os.getpid(), signal.SIGBUS)
        return str(number * number)

    found = list(reports(take, range(9), a_child=3))
    assert [one.number for one in found] == list(range(9))
    assert [one.line for one in found] == [None if n % 4 == 2 else str(n * n) for n in range(9)]
    assert {one.signal for one in found if one.line is None} == {signal.SIGBUS}


@pytest.mark.parametrize(
    ("mutation", "data"),
    [
        (odd_bytes, bytes(range(256)) * 40),
        (odd_json, b'{"a": [1, {"b": "c"}]}'),
        (odd_lines, b'{"a": 1}\n{"a": 2}\n'),
        (odd_zip, zipped(a=b"123", b=b"456")),
        (odd_tar, small_tar({"a.png": b"123", "a.txt": b"4"})),
    ],
)
def test_the_same_seed_damages_alike_and_others_otherwise(mutation: "object", data: bytes) -> None:
    damaged = [[mutation(random.Random(seed), data) for seed in range(60)] for _ in range(2)]  # type: ignore[operator]
    assert damaged[0] == damaged[1]
    assert len(set(damaged[0])) > 20


def test_results_are_compared_by_what_they_hold(tmp_path: Path) -> None:
    for run, value in (("a", 1.0), ("b", 1.0), ("c", 2.0)):
        (tmp_path / run).mkdir()
        for name in ("one.pt", "out.out"):
            torch.save({"state_dict": {"w": torch.tensor([value])}, "when": run}, tmp_path / run / name)
        with lmdb.open(str(tmp_path / run / "pairs")) as environment, environment.begin(write=True) as transaction:
            transaction.put(b"passing", bytes(9) * (run == "a"))
            transaction.delete(b"passing")
            transaction.put(b"1", str(value).encode())
        (tmp_path / run / f"metrics_{run}.jsonl").write_text(run)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    other = tree(tmp_path / "c")
    assert [name for name, one in tree(tmp_path / "a").items() if other[name] == one] == []
    assert "unreadable" not in other.values()
    (tmp_path / "c" / "out.out").write_bytes((tmp_path / "c" / "one.pt").read_bytes()[:300])
    assert tree(tmp_path / "c")["out.out"] == "unreadable"

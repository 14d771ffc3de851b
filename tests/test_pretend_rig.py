"""What the rig of the pretend GPU says of the counts it is given; the runs themselves are in test_pretend_gpu.py."""

import importlib
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RIG = ROOT / "tools" / "pretend_gpu"
sys.path[:0] = [str(RIG), str(RIG / "site")]
rig: Any = importlib.import_module("rig")
pretend_meter: Any = importlib.import_module("pretend_meter")

STEP = {"wait_event": 1, "launches": 100, "up_bytes": 800, "pictures": 4}


def result(steps: list[dict[str, int]], **facts: Any) -> Any:
    record = {"steps": steps, "waits_at": {}, "pictures": 0, "largest_pageable": 30, "peak_bytes": 3 << 20, **facts}
    return rig.Result("train x", 0, 1.25, "", [record])


def test_only_steady_steps_are_judged_and_waits_are_told_by_kind() -> None:
    first = {**STEP, "wait_device": 9, "launches": 999}
    odd = {**STEP, "wait_stream": 2, "launches": 104, "up_bytes": 1600}
    found = result([first, first, STEP, STEP, odd, STEP])
    assert found.waits == [{"event": 1}, {"event": 1}, {"event": 1, "stream": 2}, {"event": 1}]
    assert found.launches == 101
    assert found.bytes_a_picture == (3 * 800 + 1600) / 16


def test_the_bytes_of_other_commands_are_those_since_their_first_batch() -> None:
    assert result([], pictures=12, since_first_batch={"up_bytes": 600}).bytes_a_picture == 50
    assert result([], pictures=12, since_first_batch={}).bytes_a_picture == 0  # on the CPU
    assert result([]).bytes_a_picture is None


def test_the_table_has_a_line_for_each_run() -> None:
    none = rig.Result("help", 1, 0.5, "")
    waiting = result([STEP, STEP, STEP, {**STEP, "wait_stream": 1}, STEP, STEP])
    head, *lines = rig.table([waiting, none]).splitlines()
    assert re.split(r"\s{2,}", head) == list(rig.COLUMNS)
    assert [re.split(r"\s{2,}", line) for line in lines] == [
        ["train x", "0", "1.2", "1 event | 1 event + 1 stream", "100", "200", "30", "3.0 MiB"],
        ["help", "1", "0.5", "-", "-", "-", "-", "-"],
    ]


class Scripted(pretend_meter.Meter):  # type: ignore[misc]
    """Counters that a test sets."""

    now: "Counter[str]"

    def read(self) -> "Counter[str]":
        return self.now.copy()

    def first_batch(self) -> None:
        pass

    def _watch_waits(self) -> None:
        pass


def test_a_step_lasts_to_the_next_and_what_is_done_aside_belongs_to_none() -> None:
    meter = Scripted()
    meter.now = Counter(launches=5)
    meter.step(4)
    meter.now += Counter(launches=10, wait_event=1)
    with meter.aside():
        meter.now += Counter(launches=1000)
        with meter.aside():
            meter.now += Counter(wait_stream=7)
    meter.now += Counter(up_bytes=48)
    meter.step(3)
    assert meter.steps == [{"launches": 10, "wait_event": 1, "up_bytes": 48, "pictures": 4}]
    meter.step(3)
    assert meter.steps[1:] == [{"pictures": 3}]
    assert meter.num_pictures == 10


def test_the_runtime_counts_what_the_rig_asks_for() -> None:
    source = (RIG / "runtime.cpp").read_text(encoding="utf-8")
    counters = re.findall(r"^    ([A-Z_]+),", source[source.index("enum Counter {") :], re.MULTILINE)
    names = "".join(re.findall(r'^    "(.*)"', source[source.index("NAMES =") :], re.MULTILINE)).split()
    assert names == [counter.lower() for counter in counters]
    assert {*rig.WAITS, "launches", "up_bytes", "up_pageable_largest"} <= set(names)


def test_the_meter_watches_the_steps_that_the_rig_judges() -> None:
    assert range(pretend_meter.FIRST, pretend_meter.LAST + 1) == rig.STEADY

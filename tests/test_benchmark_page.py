"""The page of inference speed: what is kept of each kind of processor, and how it is shown beside the others."""

import copy
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import page  # noqa: E402

from cn_clip.clip.backends.speeds import MEASURED, NAMES, Mode  # noqa: E402


@pytest.fixture
def runs() -> list[Any]:
    return copy.deepcopy(page.read(page.RESULTS))


def test_the_page_is_what_the_kept_results_give() -> None:
    for language, path in (("zh", "docs/benchmarks.md"), ("en", "docs/en/benchmarks.md")):
        written = (ROOT / path).read_text(encoding="utf-8").partition(f"\n{page.KEPT}")[0]
        assert written == page.render(page.read(page.RESULTS), language)  # type: ignore[arg-type]


@pytest.mark.parametrize("language", ["zh", "en"])
def test_every_row_names_its_processor_and_processors_stand_beside_each_other(runs: list[Any], language: Any) -> None:
    kinds = {NAMES[found["facts"]["kind"]] for found in runs}
    assert {"AVX2", "AVX-512 BF16"} <= kinds
    shown = page.render(runs, language)
    rows = [
        line.split(" | ")
        for line in shown.splitlines()
        if re.match(r"\| (cn_clip|transformers|torch|onnx|open|auto)", line)
    ]
    assert len(rows) == sum(len(found["towers"]) for found in runs)
    assert {row[1] for row in rows} == kinds
    ways = [row[0] for row in rows]
    assert [ways.index(way) for way in ways] == sorted(ways.index(way) for way in ways)  # a way's rows are together
    assert "None" not in shown


def test_what_was_not_recorded_is_a_dash_and_misses_no_goal(runs: list[Any]) -> None:
    (avx2,) = (found for found in runs if found["facts"]["kind"] == "avx2")
    assert "| onnx int8 | AVX2 | — | 2.03× | — | — | 8.40× | — | — |" in page.render(runs, "en")
    assert page.misses(avx2) == [
        "images ours: 2.03 times the reference, goal 3.5",
        "texts ours: 8.40 times the reference, goal 10",
        "pipeline ours: 3.30 times the reference, goal 5",
    ]


def test_a_row_too_far_from_float32_reaches_no_goal(runs: list[Any]) -> None:
    found = next(one for one in runs if one["facts"]["kind"] == "avx512-bf16")
    found["towers"] = [
        {
            "name": "openvino bf16",
            "images": {"ratio": 9.0, "cosine_min": 0.9990},
            "texts": {"ratio": 9.5, "cosine_min": 0.9999},
        }
    ]
    found["pipeline"] = {"ratio": {"reference": 1.0, "auto:auto": 4.0}, "taken": {"auto:auto": "openvino:bf16"}}
    found["start"], found["trained"] = {"ours": 2.6, "reference": 5.0}, []
    assert page.misses(found) == [
        "images bf16: 0.00 times the reference, goal 2.5",
        "pipeline bf16: 4.00 times the reference, goal 4.5",
        "start: 2.60 s, goal 2.5 s",
    ]


def test_a_run_replaces_its_kind_and_what_is_below_the_mark_stays(tmp_path: Path, runs: list[Any]) -> None:
    results, output = tmp_path / "results", tmp_path / "docs" / "benchmarks.md"
    results.mkdir()
    for found in runs:
        (results / f"{found['facts']['kind']}.json").write_text(json.dumps(found), encoding="utf-8")
    page.write(output, results)
    assert output.read_text(encoding="utf-8") == page.render(runs, "zh")
    output.write_text(f"{output.read_text(encoding='utf-8')}\n{page.KEPT}\n## 别的\n", encoding="utf-8")
    page.write(output, results)
    assert output.read_text(encoding="utf-8") == f"{page.render(runs, 'zh')}\n{page.KEPT}\n## 别的\n"
    assert (output.parent / "en" / "benchmarks.md").read_text(encoding="utf-8") == page.render(runs, "en")


def test_the_table_that_auto_goes_by_names_only_what_the_page_measured(runs: list[Any]) -> None:
    for found in runs:
        measured = MEASURED[found["facts"]["kind"]].speeds
        names = {row["name"] for row in found["towers"]}
        assert {str(mode) for mode in measured} <= names
        assert Mode("torch", "fp32") in measured

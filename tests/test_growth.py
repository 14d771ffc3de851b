"""`benchmarks/growth.py`: exponents worked by hand, and a page that names every curve in both languages."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import growth
import growth_page


def test_the_exponent_is_the_slope_of_the_upper_half() -> None:
    # 5 of fixed cost, then quadratic: the lower half does not count.
    assert growth.exponent([(x, x**2.0) for x in (1, 10, 100, 1000)]) == pytest.approx(2)
    assert growth.exponent([(1, 5), (2, 5), (4, 5), (8, 64), (16, 256), (32, 1024)]) == pytest.approx(2)
    assert growth.exponent([(x, 3.0) for x in (1, 10, 100)]) == pytest.approx(0)
    assert growth.exponent([(1, 1.0), (2, 2.0)]) is None
    # What was too little to measure is left out.
    assert growth.exponent([(1, 0.0), (2, 0.0), (4, 1.0)]) is None


def test_a_command_is_measured_point_by_point(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    growth.run(growth.Options(only=("top-k",), largest=4000, work=tmp_path, json=True))
    found = json.loads(capsys.readouterr().out)
    curve = found["curves"]["top 10 of N among N"]
    assert [point[0] for point in curve["points"]] == [1000, 2000, 4000]
    assert all(point[1] > 0 for point in curve["points"])
    growth_page.draw(found, tmp_path / "images")
    assert (tmp_path / "images/growth-cpu.png").read_bytes()[:4] == b"\x89PNG"
    for folder in (tmp_path, tmp_path / "en"):
        folder.mkdir(exist_ok=True)
        (folder / "benchmarks.md").write_text("# Speed\n\nwritten before\n", encoding="utf-8")
    for _ in range(2):  # written again, it is there once
        growth_page.write(found, tmp_path)
    written = (tmp_path / "en/benchmarks.md").read_text(encoding="utf-8")
    assert written.startswith("# Speed\n\nwritten before\n\n<!-- kept")
    assert written.count("## Growth") == 1
    assert "## 增长" in (tmp_path / "benchmarks.md").read_text(encoding="utf-8")
    assert "| N 个查询在 N 行里各取前 10 | 1,000–4,000 行和查询 |" in growth_page.section(found, "zh")
    assert "| top 10 of N among N | 1,000–4,000 rows and queries |" in growth_page.section(found, "en")


def test_every_curve_has_a_chinese_name() -> None:
    source = Path(growth.__file__).read_text(encoding="utf-8")
    unused = [name for name in growth_page.NAMES if f'"{name}"' not in source]
    assert unused == []
    assert {group.axis for group in growth.GROUPS.values()} <= set(growth_page.AXES)
    assert set(growth.LIMITS) == set(growth_page.REASONS)

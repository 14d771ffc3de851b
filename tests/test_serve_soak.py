"""What the soak of the service makes of few answers and of little time."""

import sys
from pathlib import Path

import pytest

from cn_clip.errors import ConfigError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))

import serve_soak


def test_too_few_answers_have_no_percentiles() -> None:
    assert serve_soak.percentiles_ms([]) == serve_soak.percentiles_ms([1.0]) == ["-", "-", "-"]
    assert serve_soak.percentiles_ms([number / 1000 for number in range(1, 101)]) == ["50", "96", "100"]


@pytest.mark.parametrize("minutes", [0.0, 0.5, float("nan"), float("inf")])
def test_less_than_a_minute_is_refused(minutes: float) -> None:
    with pytest.raises(ConfigError, match="--minutes: expected at least 1"):
        serve_soak.Options(Path("i"), minutes=minutes)


def test_thirds() -> None:
    assert serve_soak.thirds(range(6)) == [range(2), range(2, 4), range(4, 6)]

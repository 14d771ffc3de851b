"""Public uses of `cn_clip.clip` return what they return with the reference (cn_clip 1.6.0)."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import reference_uses as uses

GOLDEN = json.loads(gzip.decompress((Path(__file__).parent / "golden" / "uses.json.gz").read_bytes()))


def compare(ours: Any, theirs: Any, place: str) -> None:
    if isinstance(theirs, dict):
        assert isinstance(ours, dict), place
        assert sorted(ours) == sorted(theirs), place
        for name in theirs:
            compare(ours[name], theirs[name], f"{place}.{name}")
    elif isinstance(theirs, list):
        assert len(ours) == len(theirs), place
        for number, value in enumerate(theirs):
            compare(ours[number], value, f"{place}[{number}]")
    elif isinstance(theirs, float):
        # The values are of the order of 1; sums are taken in another order.
        assert ours == pytest.approx(theirs, abs=2e-5, rel=1e-5), place
    else:
        assert ours == theirs, place


@pytest.mark.parametrize("name", [name for name in uses.USES if name != "signatures"])
def test_a_public_use_returns_what_it_returns_with_the_reference(name: str) -> None:
    compare(uses.plain(uses.USES[name]()), GOLDEN[name], name)

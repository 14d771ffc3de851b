"""How the package is built: what `tools/house_figures.py` counts and must stay nothing."""

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))
house_figures: Any = importlib.import_module("house_figures")


@pytest.fixture(scope="module")
def figures() -> dict[str, Any]:
    found: dict[str, Any] = house_figures.figures(ROOT)
    return found


def test_no_two_modules_import_each_other_not_even_inside_functions(figures: dict[str, Any]) -> None:
    assert figures["cycles of imports at the top"] == []
    assert figures["cycles with imports in functions"] == []


def test_every_public_name_says_what_it_is(figures: dict[str, Any]) -> None:
    assert figures["public names without a docstring"] == []


def test_cycles_and_silent_names_are_found(tmp_path: Path) -> None:
    package = tmp_path / "cn_clip"
    package.mkdir()
    (package / "a.py").write_text("import cn_clip.b\n\n\ndef shown() -> None:\n    pass\n")
    (package / "b.py").write_text('def _hidden() -> None:\n    """Says."""\n    from cn_clip import a\n')
    done = subprocess.run(
        [sys.executable, house_figures.__file__, str(tmp_path)], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert "cycles of imports at the top: 0" in lines
    assert lines[lines.index("cycles with imports in functions: 1") + 1].strip() == "cn_clip.a <-> cn_clip.b"
    assert lines[lines.index("public names without a docstring: 1") + 1].strip() == "cn_clip.a.shown"
    assert "imports in functions: 1" in lines

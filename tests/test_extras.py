"""What is missing is named: the optional package, or the one that it needs and does not find."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cn_clip import extras
from cn_clip.errors import MissingExtraError


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("import absent_dependency.part", "`absent_dependency`;"),
        ("from os import absent_name", "`os` (cannot import name 'absent_name' from 'os'"),
        ("raise ImportError('libgone.so.1: no such file')", "`broken_extra` (libgone.so.1: no such file);"),
    ],
    ids=["another package", "a name", "a library"],
)
def test_the_package_at_fault_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, package: str
) -> None:
    (tmp_path / "broken_extra.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(MissingExtraError) as caught:
        extras.require("broken_extra", extra="page", purpose="the page")
    assert str(caught.value).startswith(f"the page needs the package {package}")
    assert str(caught.value).endswith("; install it with: pip install 'cn-clip-next[page]'")


def test_a_package_that_is_absent_is_named_without_its_modules() -> None:
    with pytest.raises(MissingExtraError, match=r"^the page needs the package `absent_extra`; install it with"):
        extras.require("absent_extra.part", extra="page", purpose="the page")


def test_a_package_that_fails_while_it_loads_says_why(tmp_path: Path) -> None:
    program = "from cn_clip import extras; extras.require('matplotlib', extra='plot', purpose='the plot')"
    environment = {**os.environ, "MPLBACKEND": "absent-backend", "MPLCONFIGDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    last = done.stderr.strip().splitlines()[-1]
    assert "MissingExtraError: the plot needs the package `matplotlib`, which does not load: " in last
    assert "absent-backend" in last

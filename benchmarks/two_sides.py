"""Runs the same command of the reference and of this package, each in a process of its own, as a user does."""

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cn_clip.errors import ConfigError  # noqa: E402


@dataclass(frozen=True)
class Finished:
    """What a command printed, and the seconds of its process, start and imports included."""

    stdout: str
    seconds: float


@dataclass(frozen=True)
class Side:
    """One of the two packages: how its commands are started."""

    name: str
    python: str
    is_reference: bool
    environment: Mapping[str, str] = field(default_factory=dict)

    def run(self, module: str, arguments: list[str], folder: Path) -> Finished:
        """Runs `cn_clip.{module}` with `folder` as the working directory; raises ConfigError when it fails."""
        path = str(ROOT / "cn_clip" / f"{module.replace('.', '/')}.py")
        shim = [str(ROOT / "benchmarks" / "reference_run.py"), f"cn_clip.{module}"]
        return self._timed([self.python, *(shim if self.is_reference else [path]), *arguments], folder)

    def run_code(self, code: str, arguments: list[str], folder: Path) -> Finished:
        """Runs lines of Python that import cn_clip."""
        place = f"import sys; sys.path.insert(0, {str(ROOT / 'benchmarks')!r})\n"
        shim = f"{place}import reference_run\nreference_run.trust_own_files()\n"
        return self._timed([self.python, "-c", (shim if self.is_reference else "") + code, *arguments], folder)

    def _timed(self, line: list[str], folder: Path) -> Finished:
        own = [] if self.is_reference else [str(ROOT)]
        more = dict(self.environment)
        path = os.pathsep.join([*own, *filter(None, [more.pop("PYTHONPATH", "")])])
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment = {**inherited, **more, **({"PYTHONPATH": path} if path else {})}
        started = time.perf_counter()
        done = subprocess.run(
            line, cwd=folder, env=environment, capture_output=True, text=True, check=False, encoding="utf-8"
        )
        if done.returncode:
            raise ConfigError(f"{' '.join(line)[:200]}: ended with status {done.returncode}: {done.stderr[-2000:]}")
        return Finished(done.stdout, time.perf_counter() - started)


def two_sides(reference_python: str, **environment: str) -> tuple[Side, Side]:
    """The reference under its interpreter, and this package under the running one."""
    return Side("reference", reference_python, True, environment), Side("ours", sys.executable, False, environment)

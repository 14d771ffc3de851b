"""Measures what a user waits for first: importing, `--help`, and loading a ViT-B-16 file, beside the reference:

python benchmarks/loading.py --reference-python REFERENCE/bin/python
"""

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

from cn_clip import command  # noqa: E402
from cn_clip.errors import ConfigError  # noqa: E402

VISION, TEXT, RESOLUTION = "ViT-B-16", "RoBERTa-wwm-ext-base-chinese", 224
GOALS = {"load_s": 1.5, "load_peak_gb": 1.2, "import_s": 0.4, "help_s": 0.5}

# Runs in both packages. The first use is measured too: a memory-mapped file is read when its values are needed.
PROBE = """
import json, resource, sys, time
import torch
torch.set_num_threads(1)
if sys.argv[2] == "reference":
    import reference_shim
start = time.perf_counter()
import cn_clip.clip as clip
imported = time.perf_counter()
model, transform = clip.load_from_name(
    sys.argv[1], device="cpu", vision_model_name=sys.argv[3], text_model_name=sys.argv[4],
    input_resolution=int(sys.argv[5]),
)
loaded = time.perf_counter()
unit = 1e6 if sys.platform != "darwin" else 1e9
load_peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
model.eval()
used = time.perf_counter()
with torch.no_grad():
    model(torch.zeros(1, 3, int(sys.argv[5]), int(sys.argv[5])), clip.tokenize(["皮卡丘"]))
answer = {
    "import_s": imported - start,
    "load_s": loaded - imported,
    "load_peak_gb": load_peak,
    "first_use_s": time.perf_counter() - used,
    "used_peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit,
    "torch": torch.__version__,
}
print("ANSWER " + json.dumps(answer))
"""


@dataclass(frozen=True)
class Options:
    reference_python: Path | None = None
    """The interpreter of an environment with cn_clip 1.6.0; left out, only this package is measured."""
    runs: int = 3
    """How often each measurement is made; medians are reported."""
    json: bool = False
    """Print one JSON object instead of the table."""

    def __post_init__(self) -> None:
        if self.runs < 1:
            raise ConfigError(f"runs: expected at least 1, got {self.runs}")


def run(options: Options) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip_cn_vit-b-16.pt"
        # In its own process: a child's peak memory starts at what its parent held.
        writer = get_context("spawn").Process(target=write_checkpoint, args=(path,))
        writer.start()
        writer.join()
        results = measure_loading(path, options)
    help_s = {module: median(time_help(module) for _ in range(options.runs)) for module in command_modules()}
    answer = {"machine": machine(results), "runs": options.runs, "loading": results, "help_s": help_s, "goals": GOALS}
    print(json.dumps(answer, ensure_ascii=False) if options.json else table(answer))


def write_checkpoint(path: Path) -> None:
    """A ViT-B-16 file as training of the reference writes it, float32, 188 million deterministic values."""
    import torch
    from deterministic import state_dict

    from cn_clip.clip.model import CLIP
    from cn_clip.zoo import model_config

    with torch.device("meta"):
        model = CLIP.from_config(model_config(VISION, TEXT))
    shapes = [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    state = {f"module.{name}": torch.from_numpy(value) for name, value in state_dict(shapes).items()}
    torch.save({"epoch": 1, "step": 1, "name": "benchmark", "state_dict": state, "optimizer": {}}, path)


def measure_loading(path: Path, options: Options) -> dict[str, dict[str, Any]]:
    """Medians of each package, the packages taking turns so that neither has the quieter machine."""
    pythons = {"cn_clip 2": Path(sys.executable)}
    if options.reference_python is not None:
        pythons["reference"] = options.reference_python
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    for _ in range(options.runs):
        for name, python in pythons.items():
            runs[name].append(probe(python, path, is_reference=name == "reference"))
    return {name: summary(answers) for name, answers in runs.items()}


def probe(python: Path, path: Path, *, is_reference: bool) -> dict[str, Any]:
    kind, import_path = ("reference", ROOT / "benchmarks") if is_reference else ("ours", ROOT)
    arguments = [str(python), "-c", PROBE, str(path), kind, VISION, TEXT, str(RESOLUTION)]
    answer = subprocess.run(
        arguments,
        cwd=path.parent,
        env=environment(import_path),
        capture_output=True,
        text=True,
        check=True,
        encoding="utf-8",
    )
    content: dict[str, Any] = json.loads(answer.stdout.rpartition("ANSWER ")[2])
    return content


def environment(import_path: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(import_path), "OMP_NUM_THREADS": "1"}


def summary(answers: list[dict[str, Any]]) -> dict[str, Any]:
    first = answers[0]
    return {key: median(a[key] for a in answers) if isinstance(value, float) else value for key, value in first.items()}


def command_modules() -> list[str]:
    """Every module that is a command: it hands its options to `command.execute`, or is the table of commands."""
    names = []
    for path in sorted((ROOT / "cn_clip").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if re.search(r"^ +(command\.)?execute\(", source, re.MULTILINE) or path.name == "cli.py":
            names.append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return names


def time_help(module: str) -> float:
    start = time.perf_counter()
    arguments = [sys.executable, "-m", module, "--help"]
    subprocess.run(arguments, cwd=ROOT, env=environment(ROOT), capture_output=True, check=True)
    return time.perf_counter() - start


def machine(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {
        "cpus": os.cpu_count(),
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": {name: result.pop("torch") for name, result in results.items()},
        "threads": 1,
    }


def table(answer: dict[str, Any]) -> str:
    machine_line = ", ".join(f"{key} {value}" for key, value in answer["machine"].items())
    lines = [f"ViT-B-16 file, float32, CPU; median of {answer['runs']}; {machine_line}", ""]
    names = list(answer["loading"])
    lines.append(f"{'':<14}" + "".join(f"{name:>12}" for name in names) + f"{'goal':>10}")
    for key in ("import_s", "load_s", "load_peak_gb", "first_use_s", "used_peak_gb"):
        values = "".join(f"{answer['loading'][name][key]:>12.3f}" for name in names)
        lines.append(f"{key:<14}{values}{answer['goals'].get(key, ''):>10}")
    lines += ["", f"--help, seconds (goal {answer['goals']['help_s']})"]
    lines += [f"{seconds:>8.3f}  {module}" for module, seconds in answer["help_s"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    command.execute(run, Options)

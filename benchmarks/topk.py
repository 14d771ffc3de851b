"""Top-10 of texts over pictures: the reference's script beside ours, on the same feature files, on the CPU.

python benchmarks/topk.py --reference-python REFERENCE/bin/python
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402

from cn_clip import command  # noqa: E402
from cn_clip.errors import ConfigError  # noqa: E402
from cn_clip.features.files import Features, read_features, write_features  # noqa: E402

GOAL = 20
ROWS_A_BATCH = 5000

# Runs the reference's script unchanged, but for the device and for noting when each of its two parts begins.
SHIM = """
import builtins, json, runpy, sys, time
import torch
torch.Tensor.cuda = lambda self, *_, **__: self
started, marks, say = time.perf_counter(), {}, builtins.print
def note(*values, **options):
    marks[str(values[0])[:16]] = time.perf_counter() - started
    say(*values, **options)
builtins.print = note
runpy.run_module("cn_clip.eval.make_topk_predictions", run_name="__main__")
load, total = marks["Finished loading"], time.perf_counter() - started
say("ANSWER " + json.dumps({"load_seconds": load, "search_seconds": total - load, "torch": torch.__version__}))
"""


@dataclass(frozen=True)
class Options:
    """Compares load time, search time and ids; the reference may do a part of the texts, then its search is scaled."""

    reference_python: str
    """The interpreter of an environment that has cn_clip 1.6.0."""
    images: int = 100_000
    """How many pictures to search."""
    texts: int = 5000
    """How many texts to look up."""
    reference_texts: int = 100
    """How many of the texts the reference looks up; its search time is extrapolated linearly to all."""
    dimensions: int = 512
    """Length of the feature vectors."""
    folder: str | None = None
    """Where the feature files go, or lie from an earlier run; default: a temporary folder (1.3 GB at full size)."""
    json: bool = False
    """Print the numbers as one JSON object instead of a table."""

    def __post_init__(self) -> None:
        if not 1 <= self.reference_texts <= self.texts:
            raise ConfigError(f"--reference-texts: expected 1 to {self.texts}, got {self.reference_texts}")


def run(options: Options) -> int:
    """Returns 1 when ours is not `GOAL` times as fast, or when other ids do not come from equal scores."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(options.folder or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        write_inputs(folder, options)
        theirs = run_reference(folder, options.reference_python)
        ours = run_ours(folder)
        compared = compare(folder)
    scale = options.texts / options.reference_texts
    theirs["search_seconds"] *= scale
    for times in (theirs, ours):
        times["total_seconds"] = times["load_seconds"] + times["search_seconds"]
    ratios = {name: theirs[name] / ours[name] for name in ("load_seconds", "search_seconds", "total_seconds")}
    say = command.Speaker(quiet=options.json)
    say(table(theirs, ours, ratios, compared, options))
    say.result({"reference": theirs, "ours": ours, "ratios": ratios, **compared})
    return 0 if ratios["total_seconds"] >= GOAL and compared["largest_score_difference"] < 1e-6 else 1


def write_inputs(folder: Path, options: Options) -> None:
    """Unit vectors around 1,000 centres, as features of like pictures lie; a part of the texts for the reference."""
    generator = np.random.default_rng(0)
    centres = units(generator.standard_normal((1000, options.dimensions)))
    spread = 0.7 / np.sqrt(options.dimensions)

    def batches(count: int) -> Iterator[tuple[list[int | str], Any]]:
        for start in range(0, count, ROWS_A_BATCH):
            rows = min(ROWS_A_BATCH, count - start)
            noise = spread * generator.standard_normal((rows, options.dimensions))
            vectors = units(centres[generator.integers(0, len(centres), rows)] + noise).astype(np.float32)
            yield list(range(1000 + start, 1000 + start + rows)), vectors

    if not (folder / "images.jsonl").exists():
        write_features(folder / "images.jsonl", "image_id", batches(options.images))
    if not (folder / "texts.jsonl").exists():
        write_features(folder / "texts.jsonl", "text_id", batches(options.texts))
    with (
        (folder / "texts.jsonl").open(encoding="utf-8") as all_texts,
        (folder / "part.jsonl").open("w", encoding="utf-8") as part,
    ):
        part.writelines(line for line, _ in zip(all_texts, range(options.reference_texts), strict=False))


def units(rows: Any) -> Any:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def run_reference(folder: Path, python: str) -> dict[str, Any]:
    shim = folder / "shim.py"
    shim.write_text(SHIM, encoding="utf-8")
    return timed(
        [python, str(shim), *arguments(folder, "part.jsonl", "reference.jsonl")],
        lambda out: json.loads(out.rpartition("ANSWER ")[2]),
        {name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )


def run_ours(folder: Path) -> dict[str, Any]:
    script = str(ROOT / "cn_clip" / "eval" / "make_topk_predictions.py")
    return timed(
        [sys.executable, script, *arguments(folder, "texts.jsonl", "ours.jsonl"), "--device=cpu", "--json"],
        json.loads,
        {**os.environ, "PYTHONPATH": str(ROOT)},
    )


def arguments(folder: Path, texts: str, output: str) -> list[str]:
    paths = {"image-feats": "images.jsonl", "text-feats": texts, "output": output}
    return [f"--{flag}={folder / name}" for flag, name in paths.items()]


def timed(line: list[str], answer: Callable[[str], dict[str, Any]], environment: dict[str, str]) -> dict[str, Any]:
    """The answer of a command with the seconds of the whole process, start and imports included."""
    started = time.perf_counter()
    done = subprocess.run(line, capture_output=True, text=True, check=False, env=environment, encoding="utf-8")
    if done.returncode:
        raise ConfigError(f"{line[0]}: the run ended with status {done.returncode}: {done.stderr[-2000:]}")
    return {**answer(done.stdout), "process_seconds": time.perf_counter() - started}


def compare(folder: Path) -> dict[str, Any]:
    """How many texts have the same ids in the same order, and how far the exact scores of the others differ."""
    images = read_features(folder / "images.jsonl", "image_id")
    texts = read_features(folder / "part.jsonl", "text_id")
    with (
        (folder / "reference.jsonl").open(encoding="utf-8") as theirs,
        (folder / "ours.jsonl").open(encoding="utf-8") as ours,
    ):
        pairs = [(json.loads(one), json.loads(other)) for one, other in zip(theirs, ours, strict=False)]
    scores = exact_scores(images, texts)
    different = [pair for pair in pairs if pair[0] != pair[1]]
    gaps = [
        float(np.abs(scores(one["text_id"], one["image_ids"]) - scores(one["text_id"], other["image_ids"])).max())
        for one, other in different
    ]
    return {"compared": len(pairs), "different": len(different), "largest_score_difference": max(gaps, default=0.0)}


def exact_scores(images: Features, texts: Features) -> Callable[[int, list[int]], Any]:
    image_rows = {image_id: row for row, image_id in enumerate(images.ids)}
    text_rows = {text_id: row for row, text_id in enumerate(texts.ids)}

    def scores(text_id: int, image_ids: list[int]) -> Any:
        found = images.vectors[[image_rows[image_id] for image_id in image_ids]].astype(np.float64)
        return found @ texts.vectors[text_rows[text_id]].astype(np.float64)

    return scores


def table(
    theirs: dict[str, Any], ours: dict[str, Any], ratios: dict[str, float], compared: dict[str, Any], options: Options
) -> str:
    lines = [
        f"{options.images:,} pictures, {options.texts:,} texts, {options.dimensions}-d float32, top 10; CPU, "
        f"{os.cpu_count()} cores, {platform.machine()}; torch {theirs['torch']} and {torch.__version__}",
        f"{'':8}{'reference':>12}{'ours':>12}{'ratio':>9}",
    ]
    for name in ratios:
        values = f"{theirs[name]:>10.2f} s{ours[name]:>10.2f} s{ratios[name]:>8.1f}x"
        lines.append(f"{name.removesuffix('_seconds'):8}{values}")
    if options.reference_texts < options.texts:
        lines.append(
            f"The reference looked up {options.reference_texts:,} texts; its search time is that, extrapolated "
            f"linearly to {options.texts:,}."
        )
    same = compared["compared"] - compared["different"]
    lines.append(f"Same ids in the same order for {same:,} of the {compared['compared']:,} texts that both looked up.")
    if compared["different"]:
        lines.append(
            f"Largest exact score difference between swapped pictures: {compared['largest_score_difference']:.1e}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    command.execute(run, Options)

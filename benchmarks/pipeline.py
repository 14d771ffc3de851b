"""The whole retrieval pipeline beside the reference, stage by stage, on the CPU:

python benchmarks/pipeline.py --reference-python REFERENCE/bin/python --data FLICKR8K_CN_FOLDER
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from two_sides import Finished, Side, two_sides  # noqa: E402

from cn_clip import command, zoo  # noqa: E402
from cn_clip.clip.backends.opening import settle_precision  # noqa: E402
from cn_clip.clip.model import CLIP  # noqa: E402
from cn_clip.errors import ConfigError  # noqa: E402
from cn_clip.features.files import read_features  # noqa: E402
from cn_clip.zoo import VisionName  # noqa: E402

# Times as fast as the reference, by precision; of those that side_by_side.py measures see page.GOALS.
GOALS = {"fp32": 1.7, "bf16": 4.5, "int8": 6.0}
EXPORT = """
import sys
from cn_clip.clip.backends.choosing import decide
from cn_clip.clip.backends.opening import open_backend
model, backend, precision, vision, text = sys.argv[1:]
towers = {"vision": vision, "text": text}
if backend == "auto":
    backend, precision = decide(model, precision=precision, device="cpu", **towers).mode
open_backend(model, backend=backend, precision=precision, **towers)
print(f"{backend}:{precision}")
"""
FEATURES = ["--image-feats=valid_imgs.img_feat.jsonl", "--text-feats=valid_texts.txt_feat.jsonl", "--top-k=10"]
# Stage -> the commands of it, in the order of the guides; each is a process.
STAGES: dict[str, list[tuple[str, list[str]]]] = {
    "dataset to LMDB": [("preprocess.build_lmdb_dataset", ["--data_dir=.", "--splits=valid"])],
    "text features": [("eval.extract_features", ["--extract-text-feats"])],
    "image features": [("eval.extract_features", ["--extract-image-feats"])],
    "top-10, text query": [("eval.make_topk_predictions", [*FEATURES, "--output=valid_predictions.jsonl"])],
    "top-10, image query": [("eval.make_topk_predictions_tr", [*FEATURES, "--output=valid_tr_predictions.jsonl"])],
    "recall, text query": [("eval.evaluation", ["valid_texts.jsonl", "valid_predictions.jsonl", "result.json"])],
    "recall, image query": [
        ("eval.transform_ir_annotation_to_tr", ["--input=valid_texts.jsonl"]),
        ("eval.evaluation_tr", ["valid_texts.tr.jsonl", "valid_tr_predictions.jsonl", "tr_result.json"]),
    ],
}


@dataclass(frozen=True)
class Options:
    """Times each stage of the pipeline for the reference and ours, in turns, and compares the features."""

    reference_python: str
    """The interpreter of an environment that has cn_clip 1.6.0."""
    data: str
    """Folder with valid_imgs.tsv and valid_texts.jsonl."""
    pictures: int = 1000
    """How many of the pictures, with their captions."""
    model: VisionName = "ViT-B-16"
    """Picture tower; the text tower is the one it is published with."""
    modes: tuple[str, ...] = ("torch:fp32", "openvino:auto", "openvino:int8")
    """What is measured beside the reference: backend:precision; auto: the fastest this processor has, close to fp32;
    auto:auto: what --backend auto takes."""
    rounds: int = 1
    """How often to run everything; the median counts."""
    batch_size: int = 32
    """Pictures, and texts, in a batch."""
    has_goals: bool = True
    """Name the modes that are not as fast as wanted."""
    json: bool = False
    """Print the numbers as one JSON object instead of a table."""

    def __post_init__(self) -> None:
        if min(self.pictures, self.rounds, self.batch_size) < 1:
            raise ConfigError("--pictures, --rounds, --batch-size: expected at least 1")


def run(options: Options) -> int:
    """Returns 1 when a mode of ours misses its goal, or float32 features differ by more than 1e-4."""
    say = command.Speaker(quiet=options.json)
    found = measure(options, say)
    say.result(found)
    return 1 if found["missed"] else 0


def measure(options: Options, say: command.Speaker) -> dict[str, Any]:
    """Times all stages for the reference and each mode, in turns; names what was missed."""
    options = replace(options, modes=tuple(map(settled_mode, options.modes)))
    reference, ours = two_sides(options.reference_python)
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(temporary)
        # Exported models go to the home folder's cache.
        sides = (reference, *(replace(ours, name=mode, environment={"HOME": temporary}) for mode in options.modes))
        folders = {side.name: home / side.name.replace(":", "-") for side in sides}
        save_model(home / "model.pt", options)
        for folder in folders.values():
            counts = write_part(folder, Path(options.data), options.pictures)
        facts = {**facts_of(options, reference), **counts}
        say(head(facts))
        exports = {side.name: exported(side, home, options.model) for side in sides[1:]}
        seconds = timed_stages(sides, folders, options, say)
        totals = {side.name: sum(stage[side.name] for stage in seconds.values()) for side in sides}
        say(row("total", totals))
        errors = {side.name: largest_difference(folders[reference.name], folders[side.name]) for side in sides[1:]}
    ratios = {name: totals["reference"] / total for name, total in totals.items()}
    taken = {name: one.stdout.splitlines()[-1] for name, one in exports.items()}
    export_s = {name: one.seconds for name, one in exports.items()}
    goals = {name: GOALS[taken[name].split(":")[1]] for name in options.modes} if options.has_goals else {}
    missed = [
        f"pipeline {name}: {ratios[name]:.2f} times the reference, goal {goal}"
        for name, goal in goals.items()
        if ratios[name] < goal
    ]
    missed += [
        f"pipeline {name}: features differ by {errors[name]:.1e}"
        for name in options.modes
        if "fp32" in taken[name] and errors[name] > 1e-4
    ]
    for name, error in errors.items():
        say(
            f"{name} ({taken[name]}): exported in {export_s[name]:.1f} s, once, not counted; "
            f"features differ by at most {error:.1e}"
        )
    return {
        **facts,
        "seconds": seconds,
        "total": totals,
        "ratio": ratios,
        "export_s": export_s,
        "taken": taken,
        "largest_feature_difference": errors,
        "missed": missed,
    }


def settled_mode(mode: str) -> str:
    """`mode` with the precision that is computed in; raises ConfigError for one that this processor lacks."""
    backend, precision = mode.split(":")
    if backend == "auto":
        return mode
    return f"{backend}:{settle_precision(backend, precision)}"  # type: ignore[arg-type]  # checked there


def exported(side: Side, folder: Path, model: str) -> Finished:
    """Opens the model once, which exports it where the backend wants that; prints what "auto" takes."""
    backend, precision = side.name.split(":")
    if backend == "torch":
        return Finished(side.name, 0.0)
    return side.run_code(EXPORT, ["model.pt", backend, precision, model, text_tower(model)], folder)


def text_tower(model: str) -> str:
    return next((entry.text for entry in zoo.PUBLISHED.values() if entry.vision == model), "RBT3-chinese")


def save_model(path: Path, options: Options) -> None:
    """Random weights, in the format of a training checkpoint."""
    torch.manual_seed(0)
    model = CLIP.from_config(zoo.model_config(options.model, text_tower(options.model)))
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 0, "step": 0, "name": "random", "state_dict": state}, path)


def write_part(folder: Path, data: Path, num_pictures: int) -> dict[str, int]:
    """The first pictures and the captions of just these; how many there are of each."""
    folder.mkdir()
    with (data / "valid_imgs.tsv").open(encoding="utf-8") as source:
        lines = list(islice(source, num_pictures))
    ids = {int(line.split("\t")[0]) for line in lines}
    with (data / "valid_texts.jsonl").open(encoding="utf-8") as source:
        texts = [line for line in source if ids.issuperset(json.loads(line)["image_ids"])]
    (folder / "valid_imgs.tsv").write_text("".join(lines), encoding="utf-8")
    (folder / "valid_texts.jsonl").write_text("".join(texts), encoding="utf-8")
    return {"pictures": len(lines), "texts": len(texts)}


def timed_stages(
    sides: tuple[Side, ...], folders: dict[str, Path], options: Options, say: command.Speaker
) -> dict[str, dict[str, float]]:
    """Median seconds of each stage and side; who is first alternates."""
    rounds: dict[str, dict[str, list[float]]] = {stage: {side.name: [] for side in sides} for stage in STAGES}
    for number in range(options.rounds):
        for position, (stage, commands) in enumerate(STAGES.items()):
            order = sides if (number + position) % 2 == 0 else sides[::-1]
            for side in order:
                rounds[stage][side.name].append(stage_seconds(side, commands, folders[side.name], options))
            say(row(stage, {name: values[-1] for name, values in rounds[stage].items()}))
    return {stage: {name: median(values) for name, values in found.items()} for stage, found in rounds.items()}


def stage_seconds(side: Side, commands: list[tuple[str, list[str]]], folder: Path, options: Options) -> float:
    extraction = [
        *("--image-data=lmdb/valid/imgs", "--text-data=valid_texts.jsonl", "--resume=../model.pt"),
        *(f"--img-batch-size={options.batch_size}", f"--text-batch-size={options.batch_size}", "--context-length=52"),
        *(f"--vision-model={options.model}", f"--text-model={text_tower(options.model)}"),
    ]
    if side.is_reference:
        more = {"eval.extract_features": [*extraction, "--precision=fp32"]}
    else:
        backend, precision = side.name.split(":")
        more = {
            "eval.extract_features": [*extraction, "--device=cpu", f"--backend={backend}", f"--precision={precision}"]
        }
    return sum(side.run(module, [*arguments, *more.get(module, [])], folder).seconds for module, arguments in commands)


def largest_difference(theirs: Path, ours: Path) -> float:
    """The largest distance between the two unit rows of an input; raises ConfigError for other ids."""
    found = []
    for name, field in (("valid_imgs.img_feat.jsonl", "image_id"), ("valid_texts.txt_feat.jsonl", "text_id")):
        one, other = (read_features(folder / name, field) for folder in (theirs, ours))  # type: ignore[arg-type]
        if one.ids != other.ids:
            raise ConfigError(f"{name}: the two sides wrote other ids or another order")
        found.append(float(np.linalg.norm(one.vectors - other.vectors, axis=1).max()))
    return max(found)


def facts_of(options: Options, reference: Side) -> dict[str, Any]:
    code = "import torch; print(torch.__version__)"
    version = subprocess.run(
        [reference.python, "-c", code], capture_output=True, text=True, check=True, encoding="utf-8"
    ).stdout.strip()
    return {
        "model": f"{options.model}@{text_tower(options.model)}",
        "batch_size": options.batch_size,
        "modes": options.modes,
        "rounds": options.rounds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "reference torch": version},
    }


def head(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    names = "".join(f"{name:>22}" for name in facts["modes"])
    return (
        f"{facts['model']}; {facts['pictures']} pictures, {facts['texts']} texts, batches of "
        f"{facts['batch_size']}, context length 52\nCPU, {facts['machine']}; {versions}\n"
        f"{'':20}{'reference':>12}{names}"
    )


def row(name: str, seconds: dict[str, float]) -> str:
    theirs = seconds["reference"]
    ours = [value for side, value in seconds.items() if side != "reference"]
    return f"{name:20}{theirs:>10.2f} s" + "".join(f"{value:>12.2f} s{theirs / value:>7.2f}x" for value in ours)


if __name__ == "__main__":
    command.execute(run, Options)

"""Inference beside the reference and transformers, on the CPU, in one run; writes `docs/benchmarks.md`, and the numbers
of this kind of processor into `benchmarks/results/`:

python benchmarks/side_by_side.py --reference-python REFERENCE/bin/python --data FLICKR8K_CN --output docs/benchmarks.md

All contenders hold the same weights and read the same pictures and captions. Each has a process of its own; they take
turns, so that a slow minute of the machine is everybody's. Medians of the rounds count, after one round to warm up.
"""

import base64
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import page  # noqa: E402
import pipeline  # noqa: E402
import torch  # noqa: E402
import trained  # noqa: E402

from cn_clip import command, ranks  # noqa: E402
from cn_clip.clip.loading import open_model  # noqa: E402
from cn_clip.clip.tokenizer import VOCAB_FILE  # noqa: E402
from cn_clip.errors import ConfigError  # noqa: E402
from cn_clip.files import atomic_write  # noqa: E402

# Of those of a processor, what low precision needs.
INSTRUCTIONS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp")
VISION, TEXT, RESOLUTION = "ViT-B-16", "RoBERTa-wwm-ext-base-chinese", 224
# From an empty process to the vector of one picture, as a user's script would do it.
START_OURS = """
import sys
from cn_clip.clip import Encoder
encoder = Encoder(sys.argv[1], backend="openvino", precision="auto", download_root=sys.argv[2])
encoder.encode_images(sys.argv[3])
"""
START_REFERENCE = """
import sys
sys.path.insert(0, sys.argv[4])
import reference_shim
import functools, torch
torch.load = functools.partial(torch.load, weights_only=False)
from PIL import Image
from cn_clip.clip import load_from_name
model, preprocess = load_from_name(
    sys.argv[1], device="cpu", vision_model_name="ViT-B-16", text_model_name="RoBERTa-wwm-ext-base-chinese",
    input_resolution=224,
)
model.eval()
with torch.no_grad():
    model.encode_image(preprocess(Image.open(sys.argv[3])).unsqueeze(0))
"""


@dataclass(frozen=True)
class Options:
    """Times pictures, captions, the start and the whole pipeline, and compares the vectors."""

    reference_python: str
    """The interpreter of an environment that has cn_clip 1.6.0."""
    data: Path
    """Folder with valid_imgs.tsv and valid_texts.jsonl."""
    trained: tuple[str, ...] = ("Emoji-Tiny",)
    """Trained models whose recall is compared between precisions: Emoji-Tiny on its emoji, files on --data."""
    output: Path | None = None
    """Where the page goes, its English one into en/ beside it; default: no page."""
    results: Path = page.RESULTS
    """Folder of the numbers, a file for each kind of processor; the page shows all of them."""
    only: tuple[str, ...] = ()
    """Contenders to time beside the reference and torch fp32, such as "onnx int8" auto; default: all."""
    num_pictures: int = 48
    """Pictures of a round."""
    num_texts: int = 256
    """Captions of a round."""
    image_batch: int = 16
    """Pictures in a batch."""
    text_batch: int = 64
    """Captions in a batch."""
    rounds: int = 3
    """Rounds that count."""
    pipeline_pictures: int = 600
    """Pictures of the whole pipeline, with their captions; 0 leaves it out."""
    json: bool = False
    """Print one JSON object instead of progress."""

    def __post_init__(self) -> None:
        if self.only and self.results == page.RESULTS:
            raise ConfigError("--only: would replace the rows of all contenders; give another folder as --results")


@dataclass(frozen=True)
class Contender:
    """What is measured: its name in the tables, and the settings of its process."""

    name: str
    python: str
    settings: dict[str, Any]

    def start(self) -> "subprocess.Popen[str]":
        """Its process, waiting for orders."""
        worker = [self.python, str(ROOT / "benchmarks" / "tower_worker.py"), json.dumps(self.settings)]
        path = str(ROOT / "benchmarks")
        environment = {**os.environ, "PYTHONPATH": path}
        return subprocess.Popen(
            worker,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            encoding="utf-8",
        )


def run(options: Options) -> int:
    """Returns 1 when a goal is missed."""
    say = command.Speaker(quiet=options.json)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        contenders = prepare(folder, options, say)
        towers = time_towers(contenders, folder, options, say)
        start = time_start(folder, options, say)
    found: dict[str, Any] = {"facts": facts(options), "towers": towers, "start": start, "trained": []}
    keep(found, options)  # what follows may fail, and this took long
    found["trained"] = [row for name in options.trained for row in trained.measure(name, options.data, say)]
    keep(found, options)
    if options.pipeline_pictures:
        found["pipeline"] = whole_pipeline(options, say)
        keep(found, options)
    missed = page.misses(found)
    for one in missed:
        say(f"missed: {one}")
    say.result({**found, "missed": missed})
    return 1 if missed else 0


def keep(found: dict[str, Any], options: Options) -> None:
    """The numbers so far, and the page with them."""
    options.results.mkdir(parents=True, exist_ok=True)
    with atomic_write(options.results / f"{found['facts']['kind']}.json") as stream:
        json.dump(found, stream, ensure_ascii=False, indent=1)
        stream.write("\n")
    if options.output:
        page.write(options.output, options.results)


def prepare(folder: Path, options: Options, say: command.Speaker) -> list[Contender]:
    """One set of weights in the formats of all contenders, exported for ours; pictures and captions as files."""
    say("Writing the weights for all contenders...")
    save_weights(folder)
    pictures, captions = save_inputs(folder, options)
    common = {
        "pictures": pictures,
        "captions": captions,
        "image_batch": options.image_batch,
        "text_batch": options.text_batch,
        "vision": VISION,
        "text": TEXT,
        "resolution": RESOLUTION,
        "checkpoint": str(folder / "model.pt"),
        "folder": str(folder / "transformers"),
        "root": str(folder / "cache"),
    }
    theirs = [
        Contender("cn_clip 1.6.0 fp32", options.reference_python, {**common, "contender": "reference"}),
        Contender("transformers fp32", sys.executable, {**common, "contender": "transformers"}),
    ]
    ours = [
        Contender(
            "auto" if backend == "auto" else f"{backend} {precision}",
            sys.executable,
            {**common, "contender": "ours", "backend": backend, "precision": precision},
        )
        for backend, precision in (*trained.MODES, ("auto", "auto"))
    ]
    always = (theirs[0].name, "torch fp32")
    return [one for one in (*theirs, *ours) if not options.only or one.name in (*always, *options.only)]


def save_weights(folder: Path) -> None:
    """A random ViT-B-16 as a transformers folder and a checkpoint; exact in float16, which the reference rounds to."""
    from transformers import ChineseCLIPConfig, ChineseCLIPModel

    vision = {"patch_size": 16, "image_size": RESOLUTION}
    model = ChineseCLIPModel(ChineseCLIPConfig(text_config={"vocab_size": 21128}, vision_config=vision))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        uniform = torch.rand(parameter.shape, generator=generator) * 2 - 1
        if parameter.ndim < 2:
            values = uniform * 0.1 + (1 if "norm" in name.lower() and name.endswith("weight") else 0)
        elif "embedding" in name and "patch" not in name:
            values = uniform * (0.1 if "vision" in name else 0.5)
        else:
            values = uniform * (3 / parameter[0].numel()) ** 0.5
        if parameter.ndim:
            parameter.data.copy_(values.half().float())
    model.save_pretrained(folder / "transformers")
    shutil.copy(VOCAB_FILE, folder / "transformers" / "vocab.txt")
    ours, _ = open_model(folder / "transformers")
    state = {f"module.{name}": value for name, value in ours.state_dict().items()}
    torch.save({"epoch": 0, "step": 0, "name": "random", "state_dict": state}, folder / "model.pt")


def save_inputs(folder: Path, options: Options) -> tuple[list[str], str]:
    """The first pictures as files, and the first captions as lines."""
    paths = []
    with (options.data / "valid_imgs.tsv").open(encoding="utf-8") as source:
        for number, line in enumerate(islice(source, options.num_pictures)):
            path = folder / f"{number:04d}.jpg"
            path.write_bytes(base64.urlsafe_b64decode(line.split("\t")[1].strip()))
            paths.append(str(path))
    with (options.data / "valid_texts.jsonl").open(encoding="utf-8") as source:
        texts = [json.loads(line)["text"].lower() for line in islice(source, options.num_texts)]
    captions = folder / "captions.txt"
    captions.write_text("\n".join(texts), encoding="utf-8")
    return paths, str(captions)


def time_towers(
    contenders: list[Contender], folder: Path, options: Options, say: command.Speaker
) -> list[dict[str, Any]]:
    """Items a second of each contender, its cosines to float32 in PyTorch, its peak memory."""
    say(f"Starting {len(contenders)} contenders; those of ours export what they need...")
    processes, taken = [], {}
    for contender in contenders:  # one after the other: they share a cache of exports, and two cores
        process = contender.start()
        processes.append(process)
        loaded = _answer(process, contender)
        taken[contender.name] = loaded.get("auto")
        say(f"  {contender.name:22} ready after {loaded['load_s']:.1f} s")
        if loaded.get("auto"):
            say(f"  {loaded['auto']['why']}")
    try:
        seconds: dict[str, dict[str, list[float]]] = {one.name: {"images": [], "texts": []} for one in contenders}
        for number in range(options.rounds + 1):
            for work in ("images", "texts"):
                order = list(zip(contenders, processes, strict=True))
                for contender, process in order if number % 2 else order[::-1]:
                    path = f" {folder}/{work}-{contenders.index(contender)}.npy" if number == 0 else ""
                    _order(process, work + path)
                    value = _answer(process, contender)["seconds"]
                    if number:
                        seconds[contender.name][work].append(value)
            say(f"  round {number} of {options.rounds} done")
        counts = {"images": options.num_pictures, "texts": options.num_texts}
        exact = [one.name for one in contenders].index("torch fp32")
        rows = []
        for place, (contender, process) in enumerate(zip(contenders, processes, strict=True)):
            _order(process, "peak")
            row: dict[str, Any] = {"name": contender.name, "peak_gb": _answer(process, contender)["peak_gb"]}
            if auto := taken[contender.name]:
                row |= {"name": f"auto ({auto['backend']} {auto['precision']})", "auto": auto}
            for work, count in counts.items():
                spent = seconds[contender.name][work]
                found, truth = (np.load(folder / f"{work}-{one}.npy") for one in (place, exact))
                cosines = (found * truth).sum(axis=1)
                row[work] = {
                    "per_s": count / median(spent),
                    "slowest_per_s": count / max(spent),
                    "cosine_min": float(cosines.min()),
                    "cosine_mean": float(cosines.mean()),
                }
            rows.append(row)
    finally:
        for process in processes:
            process.kill()
    for row in rows:
        for work in counts:
            row[work]["ratio"] = row[work]["per_s"] / rows[0][work]["per_s"]
        say(f"  {row['name']:22} {row['images']['per_s']:8.1f} pictures/s {row['texts']['per_s']:8.1f} texts/s")
    return rows


def _order(process: "subprocess.Popen[str]", line: str) -> None:
    assert process.stdin is not None
    process.stdin.write(line + "\n")
    process.stdin.flush()


def _answer(process: "subprocess.Popen[str]", contender: Contender) -> dict[str, Any]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("ANSWER "):
            answer: dict[str, Any] = json.loads(line.removeprefix("ANSWER "))
            return answer
    raise ConfigError(f"{contender.name}: its process ended; run benchmarks/tower_worker.py with {contender.settings}")


def time_start(folder: Path, options: Options, say: command.Speaker) -> dict[str, float]:
    """Seconds from the start of the process to the first vector, the model exported before; medians."""
    taken: dict[str, list[float]] = {"reference": [], "ours": []}
    sides = {"reference": (options.reference_python, START_REFERENCE), "ours": (sys.executable, START_OURS)}
    for number in range(options.rounds + 1):
        for side, (python, code) in sides.items():
            arguments = [
                str(folder / "model.pt"),
                str(folder / "cache"),
                str(folder / "0000.jpg"),
                f"{ROOT}/benchmarks",
            ]
            environment = {**os.environ, "PYTHONPATH": str(ROOT) if side == "ours" else ""}
            started = time.perf_counter()
            subprocess.run(
                [python, "-c", code, *arguments], check=True, capture_output=True, env=environment, cwd=folder
            )
            if number:
                taken[side].append(time.perf_counter() - started)
    result: dict[str, float] = {side: median(values) for side, values in taken.items()}
    say(f"  start to first vector: reference {result['reference']:.2f} s, ours {result['ours']:.2f} s")
    return result


def whole_pipeline(options: Options, say: command.Speaker) -> dict[str, Any]:
    settings = pipeline.Options(
        options.reference_python,
        str(options.data),
        pictures=options.pipeline_pictures,
        modes=("auto:auto", "openvino:auto"),
        json=options.json,
        has_goals=False,
    )
    return pipeline.measure(settings, say)


def facts(options: Options) -> dict[str, Any]:
    packages = ("torch", "onnxruntime", "openvino", "transformers", "numpy", "pillow")
    name, flags = ranks.processor()
    return {
        "date": date.today().isoformat(),
        "processor": name,
        "kind": ranks.processor_kind(),
        "instructions": [one for one in INSTRUCTIONS if one in flags],
        "cores": os.cpu_count(),
        "system": platform.system(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "image_batch": options.image_batch,
        "text_batch": options.text_batch,
        "num_pictures": options.num_pictures,
        "num_texts": options.num_texts,
        "rounds": options.rounds,
    }


if __name__ == "__main__":
    command.execute(run, Options)

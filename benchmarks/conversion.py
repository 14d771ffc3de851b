"""One model through every form of `cn-clip convert`, opened by the transformers of other environments; on the CPU.

python benchmarks/conversion.py ENV/bin/python OTHER/bin/python --reference-python REFERENCE/bin/python
"""

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests"))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import tyro  # noqa: E402
from deterministic import TEXT_TOWER, TEXTS, picture_bytes, weight  # noqa: E402
from PIL import Image  # noqa: E402
from two_sides import two_sides  # noqa: E402

from cn_clip import cli, command, zoo  # noqa: E402
from cn_clip.clip import load_from_name, tokenize  # noqa: E402
from cn_clip.clip.model import CLIP, convert_weights  # noqa: E402

HOPS = {
    "folder": "transformers",
    "model.safetensors": "safetensors",
    "sentence": "sentence-transformers",
    "back.pt": "pt",
}
NUM_PICTURES = 3

# Run by an interpreter that knows nothing of this package: rows of the folder's own processor, and of given inputs.
OPEN = """
import json, logging, sys, warnings
from pathlib import Path
import numpy as np, torch, transformers
from PIL import Image
work = Path(sys.argv[1])
said = []
class Keep(logging.Handler):
    def emit(self, record): said.append(record.getMessage())
for name in ("transformers", "sentence_transformers"):
    logging.getLogger(name).addHandler(Keep(logging.WARNING))
warnings.simplefilter("always")
warnings.showwarning = lambda message, *_: said.append(str(message))
given = np.load(work / "inputs.npz")
texts = json.loads((work / "texts.json").read_text())
pictures = [Image.open(path) for path in sorted(work.glob("*.png"))]
model, report = transformers.ChineseCLIPModel.from_pretrained(work / "folder", output_loading_info=True)
four = transformers.__version__.startswith("4.")
with torch.inference_mode():
    tokens = torch.from_numpy(given["tokens"])
    both = model(input_ids=tokens, attention_mask=tokens.ne(0).long(), pixel_values=torch.from_numpy(given["pixels"]))
    before = len(said)
    processor = transformers.AutoProcessor.from_pretrained(work / "folder")
    unasked, said[before:] = said[before:], []
    if four:
        processor = transformers.ChineseCLIPProcessor.from_pretrained(work / "folder", use_fast=False)
    own_inputs = processor(text=texts, images=pictures, padding="max_length", truncation=True, return_tensors="pt")
    own = model(**own_inputs)
rows = {"given": torch.cat([both.image_embeds, both.text_embeds]).numpy()}
rows["own"] = torch.cat([own.image_embeds, own.text_embeds]).numpy()
facts = {
    "transformers": transformers.__version__,
    "keys": {name: len(found) for name, found in report.items() if name.endswith("_keys")},
    "dtype": str(model.dtype),
    "same_tokens": bool(torch.equal(own_inputs["input_ids"], tokens)),
    "pictures_by": type(processor.image_processor).__name__,
    "pixels": float((own_inputs["pixel_values"] - torch.from_numpy(given["pixels"])).abs().max()),
    "said_of_processor": unasked,
}
try:
    import sentence_transformers
    facts["sentence_transformers"] = sentence_transformers.__version__
    library = sentence_transformers.SentenceTransformer(str(work / "sentence"), device="cpu")
    rows["sentence"] = np.concatenate([library.encode(pictures), library.encode(texts)])
except ImportError as error:
    facts["sentence_transformers"] = facts.get("sentence_transformers") or None
    facts["sentence_error"] = str(error)
except Exception as error:
    facts["sentence_error"] = f"{type(error).__name__}: {error}"
np.savez(work / "rows.npz", **rows)
print(json.dumps(facts | {"said": said}))
"""
ENCODE = """
import sys
import numpy as np
import torch
from cn_clip.clip import load_from_name
path, inputs, output, *towers = sys.argv[1:]
given = np.load(inputs)
model, _ = load_from_name(
    path, device="cpu", vision_model_name=towers[0], text_model_name=towers[1], input_resolution=int(towers[2])
)
model.eval()
with torch.no_grad():
    rows = model.encode_image(torch.from_numpy(given["pixels"])), model.encode_text(torch.from_numpy(given["tokens"]))
np.save(output, torch.cat(rows).float().numpy())
"""


@dataclass(frozen=True)
class Options:
    """Writes a checkpoint of deterministic weights, converts it through every form, and compares bits and features."""

    pythons: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="PYTHON")]
    """Interpreters of environments that have transformers, and sentence-transformers where it should be tried"""
    vision_model: zoo.VisionName = "ViT-B-16"
    """The picture tower, with the text tower it is published with"""
    reference_python: str | None = None
    """The interpreter of an environment that has cn_clip 1.6.0: opens the file that came back"""
    tolerance: float = 1e-4
    """Largest difference of unit rows from the same pixels and token ids"""
    json: bool = False
    """Print the numbers as one JSON object instead of lines"""


def run(options: Options) -> int:
    """Returns 1 when a bit changed, a key is missing or left over, or features differ by more than the tolerance."""
    say = command.Speaker(quiet=options.json)
    towers = options.vision_model, TEXT_TOWER[options.vision_model]
    say(f"{'@'.join(towers)}, fp16 weights, fp32 arithmetic, CPU, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        seconds = convert_through(work, towers)
        for name, spent in seconds.items():
            say(f"-> {name}: {spent:.1f} s")
        same = same_bits(work / "run.pt", work / "back.pt")
        say(f"run.pt and back.pt: the same names in the same order, types and bits: {same}")
        rows = write_inputs(work)
        hops = {name: worst(features(work / name, work), rows) for name in HOPS}
        say(f"features of this package from each form, largest difference: {max(hops.values()):.1e}")
        opened = [open_with(python, work, rows, say) for python in options.pythons]
        found: dict[str, Any] = {"seconds": seconds, "same_bits": same, "features": hops, "opened": opened}
        if options.reference_python:
            found["reference"] = open_by_reference(options.reference_python, work, towers, rows)
            say(f"cn_clip 1.6.0 opens back.pt: largest difference {found['reference']:.1e}")
    say.result(found)
    numbers = [*hops.values(), found.get("reference", 0), *(one["given"] for one in opened)]
    good = same and max(numbers) <= options.tolerance and not any(sum(one["keys"].values()) for one in opened)
    return 0 if good else 1


def convert_through(work: Path, towers: tuple[str, str]) -> dict[str, float]:
    """Writes run.pt in the types of the published files and every form after it; the seconds of each."""
    with torch.device("meta"):
        model = CLIP.from_config(zoo.model_config(*towers))
    tensors = {name: torch.from_numpy(weight(name, tuple(v.shape))) for name, v in model.state_dict().items()}
    model.load_state_dict(tensors, assign=True)
    convert_weights(model)
    state = {f"module.{name}": value for name, value in model.state_dict().items()}
    torch.save({"epoch": 3, "step": 7, "name": "run", "state_dict": state}, work / "run.pt")
    seconds, source = {}, work / "run.pt"
    for name, kind in HOPS.items():
        started = time.perf_counter()
        with command.stdout_to_stderr(when=True):
            cli.main(["convert", str(source), str(work / name), "--to", kind])
        seconds[name], source = time.perf_counter() - started, work / name
    return seconds


def same_bits(one: Path, other: Path) -> bool:
    first, second = (torch.load(path, weights_only=True, mmap=True)["state_dict"] for path in (one, other))
    return list(first) == list(second) and all(
        value.dtype is second[name].dtype and torch.equal(value, second[name]) for name, value in first.items()
    )


def write_inputs(work: Path) -> np.ndarray:
    """Pictures, texts, and what this package makes of them; returns its unit rows from run.pt."""
    for number in range(NUM_PICTURES):
        Image.fromarray(picture_bytes(number, height=300 + 40 * number, width=400)).save(work / f"{number}.png")
    (work / "texts.json").write_text(json.dumps(TEXTS), encoding="utf-8")
    _, transform = load_quietly(work / "run.pt")
    pictures = [Image.open(path) for path in sorted(work.glob("*.png"))]
    pixels = np.stack([transform.array(picture) for picture in pictures])
    np.savez(work / "inputs.npz", pixels=pixels, tokens=tokenize(TEXTS).numpy())
    return features(work / "run.pt", work)


def load_quietly(path: Path) -> Any:
    with command.stdout_to_stderr(when=True):
        return load_from_name(str(path), device="cpu")


def features(path: Path, work: Path) -> np.ndarray:
    """Unit rows of the pictures and the texts."""
    model, _ = load_quietly(path)
    given = np.load(work / "inputs.npz")
    pixels, tokens = (torch.from_numpy(given[name]) for name in ("pixels", "tokens"))
    with torch.inference_mode():
        rows = torch.cat([model.encode_image(pixels), model.encode_text(tokens)])
    return unit(rows.numpy())


def unit(rows: np.ndarray) -> np.ndarray:
    scaled: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return scaled


def worst(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max())


def open_with(python: str, work: Path, rows: np.ndarray, say: command.Speaker) -> dict[str, Any]:
    """What transformers of that environment says and computes."""
    done = subprocess.run(
        [python, "-c", OPEN, str(work)], capture_output=True, text=True, check=False, encoding="utf-8"
    )
    if done.returncode:
        raise RuntimeError(f"{python}: {done.stderr[-2000:]}")
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found = np.load(work / "rows.npz")
    facts["given"] = worst(found["given"], rows)
    facts["own_texts"] = worst(found["own"][NUM_PICTURES:], rows[NUM_PICTURES:])
    facts["own_pictures"] = worst(found["own"][:NUM_PICTURES], rows[:NUM_PICTURES])
    say(f"--- transformers {facts['transformers']}, sentence-transformers {facts['sentence_transformers']}")
    say(f"keys missing or left over: {facts['keys']}; arithmetic in {facts['dtype']}")
    say(f"features from the same pixels and token ids: largest difference {facts['given']:.1e}")
    say(f"token ids equal: {facts['same_tokens']}; pixels ({facts['pictures_by']}): {facts['pixels']:.1e}")
    say(f"features by its own processor: texts {facts['own_texts']:.1e}, pictures {facts['own_pictures']:.1e}")
    if "sentence" in found:
        facts["sentence_texts"] = worst(found["sentence"][NUM_PICTURES:], rows[NUM_PICTURES:])
        facts["sentence_pictures"] = worst(found["sentence"][:NUM_PICTURES], rows[:NUM_PICTURES])
        say(f"SentenceTransformer: texts {facts['sentence_texts']:.1e}, pictures {facts['sentence_pictures']:.1e}")
    for name in ("said", "said_of_processor", "sentence_error"):
        if facts.get(name):
            say(f"{name}: {facts[name]}")
    return facts


def open_by_reference(python: str, work: Path, towers: tuple[str, str], rows: np.ndarray) -> float:
    reference, _ = two_sides(python)
    resolution = str(zoo.vision_config(towers[0]).image_resolution)
    places = [str(work / name) for name in ("back.pt", "inputs.npz", "reference.npy")]
    reference.run_code(ENCODE, [*places, *towers, resolution], work)
    return worst(unit(np.load(work / "reference.npy")), rows)


if __name__ == "__main__":
    command.execute(run, Options)

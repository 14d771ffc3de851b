"""Towers of other families at full size with random weights: OpenVINO and ONNX Runtime beside transformers' float32.

python benchmarks/families.py                         # all families, minutes; exports stay in --folder
python benchmarks/families.py --families siglip --json

Each tower and mode is timed in turns with transformers, on the same inputs, in one process, both on one core: medians
of processor time, which other programs of the machine hardly change. Vocabularies are small, for looking a token up
costs nothing. A cosine is that of the row farthest from transformers' float32.
"""

import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

# Before the libraries count the cores.
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import torch  # noqa: E402
from numpy.typing import NDArray  # noqa: E402
from tiny_families import Sizes, write_family  # noqa: E402

from cn_clip import command  # noqa: E402
from cn_clip.clip.backends import parity  # noqa: E402
from cn_clip.clip.backends.names import KINDS, Kind  # noqa: E402
from cn_clip.clip.backends.opening import open_source  # noqa: E402
from cn_clip.clip.families import fg_clip_2  # noqa: E402
from cn_clip.clip.families.opening import FamilySource  # noqa: E402

Rows = NDArray[np.float32]


def _tower(width: int, layers: int, heads: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


BASE, LARGE = _tower(768, 12, 12), _tower(1024, 24, 16)
# As published: SigLIP base, MetaCLIP 2 worldwide B/16, AltCLIP (ViT-L/14 and XLM-R large), FG-CLIP 2 base.
FAMILIES = {
    "siglip": Sizes({**BASE, "patch_size": 16}, BASE, resolution=224, noise=0.02),
    "metaclip_2": Sizes({**BASE, "patch_size": 16}, _tower(512, 12, 8), 512, resolution=224, noise=0.02),
    "altclip": Sizes({**LARGE, "patch_size": 14}, LARGE, 768, resolution=224, noise=0.01),
    "fg_clip_2": Sizes({**BASE, "num_patches": 256}, BASE, noise=0.02),
}
MODES = ("openvino:int8", "openvino:bf16", "onnx:fp32")


@dataclass(frozen=True)
class Options:
    """Times the towers of families by backend and precision, against transformers in float32."""

    families: tuple[str, ...] = tuple(FAMILIES)
    """Which families."""
    modes: tuple[str, ...] = MODES
    """BACKEND:PRECISION each."""
    folder: Path = Path("runs/families")
    """Where the models and their exports stay."""
    batch: tuple[int, int] = (4, 8)
    """Pictures, and texts, in a batch."""
    repeats: int = 3
    """How often each side is timed."""
    export_only: bool = False
    """Make the files, and time nothing."""
    json: bool = False
    """Print the numbers as one JSON object a line instead of a table."""


def theirs(folder: Path, kind: Kind, inputs: Any) -> Callable[[], Rows]:
    """What transformers computes of a batch, by the class that opens the folder, and nothing else."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if config["model_type"] == "fgclip2":
        made = fg_clip_2.read_config(transformers, config)
        model = transformers.Siglip2Model.from_pretrained(folder, config=made)
    else:
        model = transformers.AutoModel.from_pretrained(folder, trust_remote_code=False)
    model = model.eval()
    given = {name: torch.from_numpy(value) for name, value in _arguments(config, kind, inputs).items()}
    compute = model.get_image_features if kind == "image" else model.get_text_features

    @torch.inference_mode()
    def run() -> Rows:
        rows: Rows = torch.nn.functional.normalize(compute(**given).pooler_output, dim=-1).numpy()
        return rows

    return run


def _arguments(config: Any, kind: Kind, inputs: Any) -> dict[str, Any]:
    """The same inputs as the arguments of transformers."""
    if kind == "text":
        pad = config["text_config"].get("pad_token_id", 0)
        masked = {"attention_mask": (inputs != pad).astype(np.int64)} if config["model_type"] == "altclip" else {}
        return {"input_ids": inputs, **masked}
    if inputs.ndim == 4:
        return {"pixel_values": inputs}
    sizes = inputs[:, 0, :2].astype(np.int64)
    longest = int(sizes.prod(axis=1).max())
    mask = (np.arange(longest)[None] < sizes.prod(axis=1, keepdims=True)).astype(np.int64)
    patches = np.ascontiguousarray(inputs[:, 1 : 1 + longest])
    return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": sizes}


def measure(options: Options, family: str) -> Iterator[dict[str, Any]]:
    """A line for each tower and mode of a family."""
    folder = options.folder / family
    if not (folder / "config.json").is_file():
        write_family(folder, family, sizes=FAMILIES[family])
        gc.collect()
    source = FamilySource(f"hf:{folder}", download_root=options.folder)
    for number, kind in enumerate(KINDS):
        inputs = _inputs(source, kind, options.batch[number])
        run = None if options.export_only else theirs(folder, kind, inputs)
        for mode in options.modes:
            backend, _, precision = mode.partition(":")
            settings: dict[str, Any] = {"backend": backend, "precision": precision, "kinds": [kind], "num_threads": 1}
            opened: Any = open_source(source, **settings)
            if run is not None:
                encode = opened.encode_pixels if kind == "image" else opened.encode_tokens
                expected, found = run(), encode(inputs)
                spread = float((expected[:1] @ expected[1:].T).min())
                times = _in_turns(run, partial(encode, inputs), options.repeats)
                yield {
                    "family": family,
                    "tower": kind,
                    "mode": mode,
                    "transformers_ms": 1000 * times[0],
                    "ours_ms": 1000 * times[1],
                    "times": times[0] / times[1],
                    "cosine": float((expected * found).sum(axis=1).min()),
                    "cosine_between_inputs": spread,
                }
            del opened
            gc.collect()
        del run
        gc.collect()


def _inputs(source: FamilySource, kind: Kind, count: int) -> Any:
    """Embedded pictures and captions, as the family has them; pictures of 256 x 256, as many patches as base models."""
    samples = parity.embedded_samples()
    if kind == "text":
        texts = source.inputs.texts
        return texts.pad(texts.rows(list(samples.captions[:count])))
    pictures = [one.convert("RGB").resize((256, 256)) for one in samples.pictures[:count]]
    return np.stack([source.inputs.pictures.array(one) for one in pictures])


def _in_turns(first: Callable[[], object], second: Callable[[], object], repeats: int) -> tuple[float, float]:
    """The median seconds of processor time of each."""
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repeats):
        for run, seconds in zip((first, second), times, strict=True):
            start = time.process_time()
            run()
            seconds.append(time.process_time() - start)
    return float(np.median(times[0])), float(np.median(times[1]))


def run(options: Options) -> None:
    """Prints a table, or JSON lines."""
    torch.set_num_threads(1)
    if not options.json:
        print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, batch {options.batch}")
        print(f"{'family':12}{'tower':7}{'mode':15}{'transformers':>13}{'here':>9}{'times':>7}{'cosine':>10}  between")
    for family in options.families:
        for line in measure(options, family):
            if options.json:
                print(json.dumps(line), flush=True)
                continue
            ends = f"{line['transformers_ms']:10.0f} ms{line['ours_ms']:6.0f} ms{line['times']:7.2f}"
            close = f"{line['cosine']:10.6f}{line['cosine_between_inputs']:9.4f}"
            print(f"{line['family']:12}{line['tower']:7}{line['mode']:15}{ends}{close}", flush=True)


if __name__ == "__main__":
    command.execute(run, Options)

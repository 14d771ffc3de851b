"""One contender of `side_by_side.py`, in a process of its own that computes when told to:

python benchmarks/tower_worker.py '{"contender": "openvino bf16", ...}'

It runs under the reference's interpreter too, so it imports nothing of this package unless it is measured.
"""

import io
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np


class Reference:
    """cn_clip 1.6.0 as its README uses it, in float32."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import reference_shim  # noqa: F401  (before anything that imports torchvision)
        import torch

        import cn_clip.clip as clip

        self.torch, self.clip = torch, clip
        torch.load = _trusting(torch.load)
        self.model, self.preprocess = clip.load_from_name(
            settings["checkpoint"],
            device="cpu",
            vision_model_name=settings["vision"],
            text_model_name=settings["text"],
            input_resolution=settings["resolution"],
        )
        self.model.eval()

    def images(self, pictures: list[bytes], batch_size: int) -> Any:
        from PIL import Image

        rows = []
        with self.torch.no_grad():
            for batch in _batches(pictures, batch_size):
                pixels = self.torch.stack([self.preprocess(Image.open(io.BytesIO(one))) for one in batch])
                features = self.model.encode_image(pixels)
                rows.append(features / features.norm(dim=-1, keepdim=True))
        return self.torch.cat(rows).numpy()

    def texts(self, texts: list[str], batch_size: int) -> Any:
        rows = []
        with self.torch.no_grad():
            for batch in _batches(texts, batch_size):
                features = self.model.encode_text(self.clip.tokenize(batch, context_length=52))
                rows.append(features / features.norm(dim=-1, keepdim=True))
        return self.torch.cat(rows).numpy()


class Transformers:
    """ChineseCLIPModel with its processor, in float32; texts padded to the longest of their batch."""

    def __init__(self, settings: dict[str, Any]) -> None:
        import torch
        import transformers

        self.torch = torch
        self.model = transformers.ChineseCLIPModel.from_pretrained(settings["folder"]).eval()
        side = {"height": settings["resolution"], "width": settings["resolution"]}
        self.pictures = transformers.ChineseCLIPImageProcessor(size=side, do_center_crop=False)
        self.tokenizer = transformers.BertTokenizerFast.from_pretrained(settings["folder"])
        # Some versions pass over a vocab.txt without a word, and every character is [UNK] then.
        if self.tokenizer.unk_token_id in self.tokenizer("一只猫")["input_ids"]:
            raise RuntimeError(f"transformers {transformers.__version__} did not load the vocabulary")

    def images(self, pictures: list[bytes], batch_size: int) -> Any:
        from PIL import Image

        opened = [Image.open(io.BytesIO(one)).convert("RGB") for one in pictures]
        return self._rows(
            self.model.get_image_features(**self.pictures(images=batch, return_tensors="pt"))
            for batch in _batches(opened, batch_size)
        )

    def texts(self, texts: list[str], batch_size: int) -> Any:
        options = {"padding": True, "truncation": True, "max_length": 52, "return_tensors": "pt"}
        return self._rows(
            self.model.get_text_features(**self.tokenizer(batch, **options)) for batch in _batches(texts, batch_size)
        )

    def _rows(self, batches: Any) -> Any:
        with self.torch.no_grad():
            # transformers 5 gives an output object, 4 gave the tensor
            found = [getattr(batch, "pooler_output", batch) for batch in batches]
        return self.torch.nn.functional.normalize(self.torch.cat(found), dim=-1).numpy()


class Ours:
    """`Encoder` of this package."""

    def __init__(self, settings: dict[str, Any]) -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
        from cn_clip.clip import Encoder

        device = None if settings["backend"] == "openvino" else "cpu"
        self.encoder = Encoder(
            settings["checkpoint"],
            backend=settings["backend"],
            precision=settings["precision"],
            device=device,
            download_root=settings["root"],
        )
        self.auto = None if self.encoder.decision is None else self.encoder.decision.values()

    def images(self, pictures: list[bytes], batch_size: int) -> Any:
        return self.encoder.encode_images(pictures, batch_size=batch_size)

    def texts(self, texts: list[str], batch_size: int) -> Any:
        return self.encoder.encode_texts(texts, batch_size=batch_size)


def _trusting(load: Any) -> Any:
    def trusting(*args: Any, **options: Any) -> Any:
        return load(*args, **{**options, "weights_only": False})

    return trusting


def _batches(items: list[Any], size: int) -> Any:
    return (items[start : start + size] for start in range(0, len(items), size))


def main() -> None:
    settings = json.loads(sys.argv[1])
    started = time.perf_counter()
    kind = {"reference": Reference, "transformers": Transformers}.get(settings["contender"], Ours)
    contender = kind(settings)
    pictures = [Path(path).read_bytes() for path in settings["pictures"]]
    texts = Path(settings["captions"]).read_text(encoding="utf-8").splitlines()
    work = {
        "images": lambda: contender.images(pictures, settings["image_batch"]),
        "texts": lambda: contender.texts(texts, settings["text_batch"]),
    }
    _answer({"load_s": time.perf_counter() - started, "auto": getattr(contender, "auto", None)})
    for line in sys.stdin:
        command, _, path = line.strip().partition(" ")
        if command == "peak":
            _answer({"peak_gb": _peak_gb()})
            continue
        started = time.perf_counter()
        rows = work[command]()
        seconds = time.perf_counter() - started
        if path:
            np.save(path, rows)
        _answer({"seconds": seconds})


def _peak_gb() -> float:
    """Of this process alone: `ru_maxrss` begins with what the parent held when it started this one."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    (line,) = (one for one in lines if one.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024 / 1e9


def _answer(values: dict[str, Any]) -> None:
    print("ANSWER " + json.dumps(values), flush=True)


if __name__ == "__main__":
    main()

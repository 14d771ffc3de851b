"""Steps of training of the reference (cn_clip 1.6.0) on a GPU, when told to; runs under its interpreter:

REFERENCE/bin/python benchmarks/gpu_reference.py '{"info": {...}, "device": "cuda", "longest": 30, "repeats": 5}'

Each line of the input is a number of pairs; the answer is a line of JSON. Mixed float16, which is its default on a GPU.
"""

import contextlib
import json
import sys
import time
from typing import Any

import reference_shim  # noqa: F401  (before anything that imports torchvision)
import torch

from cn_clip.clip.model import CLIP


class Reference:
    """Its model, optimizer and loss, as its training loop puts them together."""

    def __init__(self, settings: dict[str, Any]) -> None:
        torch.manual_seed(0)
        self.settings, self.device = settings, torch.device(settings["device"])
        self.model = CLIP(**settings["info"]).to(self.device).train()
        named = [(name, one) for name, one in self.model.named_parameters() if one.requires_grad]
        kinds = ("bn", "ln", "bias", "logit_scale")
        free = [one for name, one in named if any(kind in name for kind in kinds)]
        decayed = [one for name, one in named if not any(kind in name for kind in kinds)]
        groups = [{"params": free, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.001}]
        self.optimizer = torch.optim.AdamW(groups, lr=5e-5, betas=(0.9, 0.98), eps=1e-6)
        self.criterion = torch.nn.CrossEntropyLoss()
        self.on_gpu = self.device.type == "cuda"
        self.scaler = torch.cuda.amp.GradScaler(enabled=self.on_gpu)

    def step(self, pixels: Any, tokens: Any) -> None:
        self.optimizer.zero_grad()
        with torch.cuda.amp.autocast() if self.on_gpu else contextlib.nullcontext():
            image, text, scale = self.model(pixels.to(self.device), tokens.to(self.device), 0)
            logits = scale.mean() * image @ text.t()
            target = torch.arange(len(logits), device=self.device)
            loss = (self.criterion(logits, target) + self.criterion(logits.t(), target)) / 2
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def answer(self, pairs: int) -> dict[str, Any]:
        side = self.settings["info"]["image_resolution"]
        pixels = torch.randn(pairs, 3, side, side)
        tokens = torch.zeros(pairs, 52, dtype=torch.long)
        tokens[:, : self.settings["longest"]] = 7
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(2 + self.settings["repeats"]):
            started = time.perf_counter()
            self.step(pixels, tokens)
            if self.on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated() / 2**30 if self.on_gpu else None
        return {"seconds": seconds[2:], "peak_gib": peak, "torch": torch.__version__}


def main() -> None:
    reference = Reference(json.loads(sys.argv[1]))
    print("ANSWER {}", flush=True)
    for line in sys.stdin:
        try:
            found = reference.answer(int(line))
        except RuntimeError as error:
            found = {"error": str(error).splitlines()[0]}
        print("ANSWER " + json.dumps(found), flush=True)


if __name__ == "__main__":
    main()

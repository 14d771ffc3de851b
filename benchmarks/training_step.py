"""Measures training steps of ViT-B-16 on the CPU, beside the reference, in turns:

python benchmarks/training_step.py --reference-python REFERENCE/bin/python
"""

import json
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from cn_clip import command  # noqa: E402
from cn_clip.errors import ConfigError  # noqa: E402

VISION, TEXT = "ViT-B-16", "RoBERTa-wwm-ext-base-chinese"
GOALS = {"speed": 2.5, "memory": 0.6}

# Both sides: the model of their own package, AdamW with the same groups, the loss of the batch, float32 or bfloat16.
PROBE = """
import json, resource, sys, time
import torch
settings = json.loads(sys.argv[1])
torch.set_num_threads(settings["threads"])
torch.manual_seed(0)
pixels = torch.randn(settings["batch"], 3, 224, 224)
tokens = torch.randint(1, 20000, (settings["batch"], 52))
for row, length in enumerate(settings["lengths"]):
    tokens[row, length:] = 0
if settings["side"] == "reference":
    import reference_shim
    from cn_clip.clip.model import CLIP
    model = CLIP(**settings["info"])
    model.train()
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    free = [p for n, p in named if "bn" in n or "ln" in n or "bias" in n or "logit_scale" in n]
    decayed = [p for n, p in named if not ("bn" in n or "ln" in n or "bias" in n or "logit_scale" in n)]
    groups = [{"params": free, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.001}]
    optimizer = torch.optim.AdamW(groups, lr=5e-5, betas=(0.9, 0.98), eps=1e-6)
    criterion = torch.nn.CrossEntropyLoss()
    def step():
        optimizer.zero_grad()
        image, text, scale = model(pixels, tokens, 0)
        logits = scale * image @ text.t()
        target = torch.arange(len(logits))
        loss = (criterion(logits, target) + criterion(logits.t(), target)) / 2
        loss.backward()
        optimizer.step()
        return loss.item()
else:
    import contextlib
    from functools import partial
    from cn_clip.clip.model import CLIP
    from cn_clip.data.datasets import PairBatch
    from cn_clip.training.distributed import Parallel
    from cn_clip.training.loss import Objective
    from cn_clip.training.scheduler import build_optimizer
    from cn_clip.training.step import Learner, make_batch
    cpu = torch.device("cpu")
    model = CLIP(**settings["info"]).train()
    model.set_grad_checkpointing(settings["checkpointing"])
    optimizer = build_optimizer(model, lr=5e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.001)
    mixed = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
    autocast = mixed if settings["precision"] == "bf16" else contextlib.nullcontext
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    learner = Learner(Parallel(model, cpu), Objective(), scaler, autocast)
    numbers = list(range(settings["batch"]))
    def step():
        optimizer.zero_grad(set_to_none=True)
        batch = make_batch(PairBatch(pixels, tokens, numbers, numbers, []), cpu)
        scores = learner.backward([batch])
        optimizer.step()
        return scores.loss.item()
times, losses = [], []
for _ in range(settings["steps"] + settings["warmup"]):
    start = time.perf_counter()
    losses.append(step())
    times.append(time.perf_counter() - start)
unit = 1e6 if sys.platform != "darwin" else 1e9
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
answer = {"seconds": times[settings["warmup"]:], "peak_gb": peak, "losses": losses, "torch": torch.__version__}
print("ANSWER " + json.dumps(answer))
"""


@dataclass(frozen=True)
class Options:
    """One process a measurement, the sides in turns; medians over all steps after the warm-up."""

    reference_python: Path | None = None
    """The interpreter of an environment with cn_clip 1.6.0; left out, only this package is measured."""
    batch_size: int = 16
    """Pairs a step."""
    text_length: int = 52
    """Tokens of every text; 0: lengths as of the captions of flickr8k-cn, 8 to 30."""
    steps: int = 3
    """Timed steps of each process."""
    warmup: int = 2
    """Steps before them."""
    rounds: int = 2
    """Processes of each side."""
    threads: int = 2
    """CPU threads of PyTorch."""
    json: bool = False
    """Print one JSON object instead of the table."""

    def __post_init__(self) -> None:
        if min(self.steps, self.rounds, self.threads, self.batch_size) < 1:
            raise ConfigError("steps, rounds, threads and batch size: expected at least 1")


def run(options: Options) -> None:
    sides = [("ours bf16", "bf16", False), ("ours bf16, checkpointing", "bf16", True), ("ours fp32", "fp32", False)]
    if options.reference_python is not None:
        sides.insert(0, ("reference fp32", "fp32", False))
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in sides}
    for _ in range(options.rounds):
        for name, precision, checkpointing in sides:
            runs[name].append(probe(options, name, precision, checkpointing=checkpointing))
    results = {name: summary(answers) for name, answers in runs.items()}
    answer = {"machine": machine(options, runs), "results": results, "goals": GOALS}
    print(json.dumps(answer, ensure_ascii=False) if options.json else table(answer))


def probe(options: Options, name: str, precision: str, *, checkpointing: bool) -> dict[str, Any]:
    from cn_clip.zoo import model_config

    is_reference = name.startswith("reference")
    lengths = [options.text_length or 8 + 22 * row // options.batch_size for row in range(options.batch_size)]
    settings = {
        "side": "reference" if is_reference else "ours",
        "info": model_config(VISION, TEXT).info(),
        "batch": options.batch_size,
        "lengths": lengths,
        "steps": options.steps,
        "warmup": options.warmup,
        "threads": options.threads,
        "precision": precision,
        "checkpointing": checkpointing,
    }
    python = options.reference_python if is_reference else sys.executable
    import_path = ROOT / "benchmarks" if is_reference else ROOT
    line = [str(python), "-c", PROBE, json.dumps(settings)]
    # Elsewhere than here: the folder of a run comes first among those Python imports from.
    with tempfile.TemporaryDirectory() as folder:
        environment = {"PYTHONPATH": str(import_path)}
        answer = subprocess.run(
            line, cwd=folder, env=environment, capture_output=True, text=True, check=False, encoding="utf-8"
        )
    if answer.returncode:
        raise ConfigError(f"{name}: ended with status {answer.returncode}: {answer.stderr[-2000:]}")
    content: dict[str, Any] = json.loads(answer.stdout.rpartition("ANSWER ")[2])
    return content


def summary(answers: list[dict[str, Any]]) -> dict[str, float]:
    seconds = [value for answer in answers for value in answer["seconds"]]
    return {"seconds": median(seconds), "peak_gb": median(answer["peak_gb"] for answer in answers)}


def machine(options: Options, runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    return {
        "processor": platform.machine(),
        "python": platform.python_version(),
        "torch": {name: answers[0]["torch"] for name, answers in runs.items()},
        "threads": options.threads,
        "batch": options.batch_size,
        "text_length": options.text_length or "8-30",
        "steps": options.steps * options.rounds,
    }


def table(answer: dict[str, Any]) -> str:
    lines = [f"one training step of {VISION}: " + ", ".join(f"{k} {v}" for k, v in answer["machine"].items()), ""]
    lines.append(f"{'':<26}{'s/step':>8}{'peak GB':>9}{'speed':>8}{'memory':>8}")
    base = answer["results"].get("reference fp32")
    for name, result in answer["results"].items():
        ratios = ""
        if base:
            ratios = f"{base['seconds'] / result['seconds']:>7.2f}x{result['peak_gb'] / base['peak_gb']:>8.0%}"
        lines.append(f"{name:<26}{result['seconds']:>8.2f}{result['peak_gb']:>9.2f}{ratios}")
    lines.append(f"goals (bf16 beside the reference): speed {GOALS['speed']}x, memory {GOALS['memory']:.0%}")
    return "\n".join(lines)


if __name__ == "__main__":
    command.execute(run, Options)

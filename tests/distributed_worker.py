"""What each process of test_distributed.py runs: `torchrun … distributed_worker.py OUTPUT DEVICE MODE...`; no test."""

import contextlib
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deterministic import SMALL_MODEL, training_batches

from cn_clip import ranks
from cn_clip.clip.model import CLIP
from cn_clip.data.datasets import PairBatch
from cn_clip.training.distributed import Gather, Parallel, from_first, process_group, whole
from cn_clip.training.loss import Objective
from cn_clip.training.scheduler import build_optimizer, decay_groups, load_optimizer_state, optimizer_state
from cn_clip.training.step import Batch, Learner, Teacher, make_batch

CPU = torch.device("cpu")
TEACHER = Teacher(lambda pixels: pixels[:, :, :4, :4].flatten(1), resolution=None)
# name -> gather, batches of each process, and what else
MODES: dict[str, dict[str, Any]] = {
    "default": {"gather": "values"},
    "with_grad": {"gather": "gradients"},
    "skip": {"gather": "none"},
    "accumulated": {"gather": "gradients", "accum": 2},
    "siglip": {"gather": "gradients", "kind": "siglip"},
    "siglip_accumulated": {"gather": "gradients", "kind": "siglip", "accum": 2},
    "multi_positive": {"gather": "gradients", "multi_positive": True},
    "matryoshka_accumulated": {"gather": "gradients", "dimensions": (3, 8), "accum": 2},
    "local_matryoshka": {"gather": "gradients", "local_loss": True, "dimensions": (3, 8)},
    "distillation": {"gather": "gradients", "teacher": TEACHER},
    "distillation_default": {"gather": "values", "teacher": TEACHER},
    "local": {"gather": "gradients", "local_loss": True},
    "local_accumulated": {"gather": "gradients", "local_loss": True, "accum": 2},
    "local_siglip_multi_positive": {
        "gather": "gradients",
        "local_loss": True,
        "kind": "siglip",
        "multi_positive": True,
        "accum": 2,
    },
    "local_distillation_multi_positive": {
        "gather": "gradients",
        "local_loss": True,
        "teacher": TEACHER,
        "multi_positive": True,
    },
    "fsdp": {"gather": "gradients", "fsdp": True},
    "fsdp_accumulated": {"gather": "gradients", "fsdp": True, "accum": 2},
    "fsdp_bf16": {"gather": "gradients", "fsdp": True, "bf16": True},
    "fsdp_bf16_accumulated": {"gather": "gradients", "fsdp": True, "bf16": True, "accum": 2},
}


def batches_of(rank: int, world_size: int, accum: int, device: torch.device = CPU) -> list[Batch]:
    """The part of 8 pairs that a process has, in `accum` batches."""
    ((pixels, tokens),) = training_batches(1)
    numbers = torch.arange(8).chunk(world_size)[rank].chunk(accum)
    images, texts = torch.from_numpy(pixels), torch.from_numpy(tokens)
    parts = [PairBatch(images[n], texts[n], (n // 3).tolist(), n.tolist(), []) for n in numbers]
    return [make_batch(part, device) for part in parts]


def update(mode: str, *, steps: int = 2, device: torch.device = CPU) -> dict[str, Any]:
    """Loss, gradients and then weights and optimizer state of some updates on one fixed batch."""
    settings = {"kind": "clip", "accum": 1, "fsdp": False, **MODES[mode]}
    torch.manual_seed(3)
    model = CLIP(**SMALL_MODEL).train().to(device)
    if settings["kind"] == "siglip":
        model.add_logit_bias()
    gather: Gather = settings["gather"]
    mixed = torch.bfloat16 if settings.get("bf16") else None
    parallel = Parallel(model, device, fsdp=settings["fsdp"] and ranks.world_size() > 1, gathered_type=mixed)
    optimizer = build_optimizer(model, lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2)
    teacher = settings.get("teacher")
    learner = Learner(
        parallel,
        Objective(settings["kind"], 0.5 if teacher else 0.0, settings.get("dimensions", ())),
        torch.amp.GradScaler(device.type, enabled=False),
        contextlib.nullcontext if mixed is None else partial(torch.autocast, device.type, dtype=mixed),
        gather=gather,
        multi_positive=settings.get("multi_positive", False),
        local_loss=settings.get("local_loss", False),
        teacher=teacher,
    )
    groups = decay_groups(model)
    batches = batches_of(ranks.rank(), ranks.world_size(), settings["accum"], device)
    types: set[str] = set()
    if mixed is not None:
        norm = model.visual.transformer.resblocks[0].ln_1
        norm.register_forward_pre_hook(lambda module, _: types.add(str(module.weight.dtype)))
    result: dict[str, Any] = {"losses": []}
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        result["losses"].append(learner.backward(batches).loss.item())
        if "gradients" not in result:
            named = model.named_parameters()
            result["gradients"] = {name: whole(p.grad).clone() for name, p in named if p.grad is not None}
        optimizer.step()
    result["computed_with"] = sorted(types)
    result["weights"] = {name: value.clone() for name, value in parallel.state_dict().items()}
    with torch.no_grad():  # as a validation before the checkpoint; FSDP then holds the root's weights together
        model.eval()(batches[0].pixels_B3RR, None)
    result["optimizer"] = optimizer_state(optimizer, groups)
    load_optimizer_state(optimizer, groups, from_first(result["optimizer"]))
    result["again"] = optimizer_state(optimizer, groups)
    return result


def on_cpu(value: Any) -> Any:
    """The same with every tensor on the CPU."""
    if isinstance(value, dict):
        return {name: on_cpu(part) for name, part in value.items()}
    return value.cpu() if isinstance(value, torch.Tensor) else value


def main() -> None:
    """Every mode in turn; rank 0 writes what came out, and the losses of all."""
    output = Path(sys.argv[1])
    torch.set_num_threads(1)
    device = ranks.own_device(sys.argv[2])
    ranks.set_float32_products(device, is_strict=True)
    with process_group(device):
        for mode in sys.argv[3:]:
            result = update(mode, device=device)
            losses: list[Any] = [None] * ranks.world_size()
            dist.all_gather_object(losses, result["losses"])
            if ranks.rank() == 0:
                torch.save(on_cpu({**result, "all_losses": losses}), output / f"{mode}.pt")
    tasks = Path("/proc/self/task").glob("*/comm")
    (output / f"threads-{ranks.rank()}").write_text("".join(sorted(task.read_text() for task in tasks)))


if __name__ == "__main__":
    main()

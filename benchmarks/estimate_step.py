"""Estimates a training step on an NVIDIA GPU without computing it, of this tree and of others, in one table:

python benchmarks/estimate_step.py --checkout ../before .

One step (towers, loss, backward pass, optimizer) of ViT-B-16 @ RoBERTa-base is traced with tensors that have a shape
and no content. A kernel takes the time of its products at the peak or of its bytes at the bandwidth. Assumed:
- An H200 that reaches 742 TFLOP/s in bfloat16 and float16, 60 in float32, and 4.1 TB/s.
- A kernel takes 2 us at least, reads every operand once and writes every result; kernels follow without gaps.
- Attention is FlashAttention or the memory-efficient kernel, never cuDNN's.
- In the backward pass a normalisation is two kernels, FlashAttention three, an embedding four.
So the ratio of two estimates means something, milliseconds less. Needs PyTorch's CUDA build and a driver that answers.
"""

# B pairs, L tokens, R resolution

import argparse
import collections
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

ROOT = Path(__file__).resolve().parent.parent
# Floating-point operations and bytes a second, seconds.
PEAK = {torch.bfloat16: 742e12, torch.float16: 742e12, torch.float32: 60e12}
BANDWIDTH, LEAST = 4.1e12, 2e-6
# Operators that start another number of kernels than one; those without work start none.
KERNELS = {
    "native_layer_norm_backward": 2,
    "_scaled_dot_product_flash_attention_backward": 3,
    "_scaled_dot_product_efficient_attention_backward": 2,
    "embedding_dense_backward": 4,
    "logsumexp": 3,
    "_fused_adamw_": 8,
}
NO_WORK = ("prim::", "empty", "detach", "alias", "lift_fresh")


@dataclass
class Estimate:
    """Of one step: kernels started, FLOPs, bytes read and written, bytes kept for the backward pass, milliseconds."""

    kernels: int = 0
    flops: float = 0.0
    moved: float = 0.0
    saved: int = 0
    ms: float = 0.0


class Roofline(TorchDispatchMode):
    """Adds up what every operator that runs inside costs."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.seconds_of = Estimate(), collections.Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operator and adds its cost."""
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if func.is_view or name.startswith(NO_WORK):
            return result
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not any(tensor.is_cuda for tensor in (*inputs, *outputs)):
            return result
        if (
            name == "_fused_adamw_"
        ):  # rates and counts aside: weights, gradients and two moments in, all but gradients out
            outputs = [tensor for number in (0, 2, 3) for tensor in args[number]]
        count = flop_registry.get(func.overloadpacket)
        flops = 0 if count is None else count(*args, **(kwargs or {}), out_val=result)
        moved = sum(map(_bytes, inputs)) + sum(map(_bytes, outputs))
        if name == "embedding":  # reads only the rows that it gives
            moved = 2 * sum(map(_bytes, outputs))
        kernels = KERNELS.get(name, 1)
        peak = PEAK.get(inputs[0].dtype if inputs else torch.float32, PEAK[torch.float32])
        seconds = max(flops / peak, moved / BANDWIDTH, LEAST * kernels)
        self.seconds_of[f"{name} {str(outputs[0].dtype if outputs else '').removeprefix('torch.')}"] += seconds
        total = self.total
        total.kernels, total.flops, total.moved = total.kernels + kernels, total.flops + flops, total.moved + moved
        total.ms += seconds * 1000
        return result


def _bytes(tensor: Tensor) -> int:
    """What is read of a tensor: rows that are repeated by a stride of 0 count once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= 1 if stride == 0 else size
    return elements * tensor.element_size()


@contextmanager
def counting_saved(weights: Sequence[Tensor]) -> Iterator[dict[int, int]]:
    """Bytes of each storage that the backward pass keeps, by its address; weights do not count."""
    own = {tensor.untyped_storage()._cdata for tensor in weights}
    found: dict[int, int] = {}
    alive = []  # an address stands for one storage only as long as that is kept

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and tensor.is_cuda:
            alive.append(storage)
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield found


def estimate(options: argparse.Namespace, length: int) -> tuple[Estimate, list[tuple[str, float]]]:
    """The step with texts of `length` tokens, and the milliseconds of its most costly operators."""
    from cn_clip import zoo
    from cn_clip.clip.model import CLIP, convert_weights
    from cn_clip.training.loss import Objective, Pairs
    from cn_clip.training.scheduler import build_optimizer

    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        model = CLIP.from_config(zoo.model_config(options.vision_model, options.text_model)).train()
        if options.precision == "fp16":
            convert_weights(model)
        model.set_grad_checkpointing(options.grad_checkpointing)
        optimizer = build_optimizer(model, lr=5e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.001)
        pixels_B3RR = torch.empty(options.batch_size, 3, model.resolution, model.resolution)
        tokens_BL = torch.ones(options.batch_size, length, dtype=torch.int64)
        mixed: AbstractContextManager[object] = nullcontext()
        if options.precision in ("bf16", "amp"):
            mixed = torch.autocast("cuda", torch.bfloat16 if options.precision == "bf16" else torch.float16)
        for _ in range(2):  # the first step also makes the optimizer's moments
            optimizer.zero_grad()
            with Roofline() as roofline:
                with counting_saved(list(model.parameters())) as saved, mixed:
                    loss = Objective("clip")(Pairs(*model(pixels_B3RR, tokens_BL))).loss
                loss.backward()
                optimizer.step()
    roofline.total.saved = sum(saved.values())
    return roofline.total, [(name, seconds * 1000) for name, seconds in roofline.seconds_of.most_common(options.top)]


def estimate_here(options: argparse.Namespace) -> None:
    """Prints the estimates of the tree on PYTHONPATH as JSON, a list with one for each length."""
    rows = []
    for length in options.lengths:
        found, costly = estimate(options, length)
        rows.append({"length": length, **asdict(found), "costly": costly})
    print(json.dumps(rows))


def table(trees: dict[str, list[dict[str, Any]]], top: int) -> str:
    """A line for each tree and length, and under it the operators that take longest."""
    lines = [f"{'tree':24} {'tokens':>6} {'kernels':>8} {'TFLOP':>7} {'GB moved':>9} {'GiB saved':>10} {'ms':>7}"]
    for tree, rows in trees.items():
        for row in rows:
            numbers = (
                f"{row['flops'] / 1e12:7.2f} {row['moved'] / 1e9:9.1f} {row['saved'] / 2**30:10.2f} {row['ms']:7.1f}"
            )
            lines.append(f"{tree[-24:]:24} {row['length']:6} {row['kernels']:8} {numbers}")
            lines += [f"{'':31} {ms:7.2f} ms  {name}" for name, ms in row["costly"][:top]]
    return "\n".join(lines)


def main() -> None:
    """Runs one process for each tree, which imports `cn_clip` from it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkout", type=Path, nargs="+", default=[ROOT], help="trees to estimate; default this one")
    parser.add_argument("--vision-model", default="ViT-B-16")
    parser.add_argument("--text-model", default="RoBERTa-wwm-ext-base-chinese")
    parser.add_argument("--batch-size", type=int, default=256, help="pairs")
    parser.add_argument("--lengths", type=int, nargs="+", default=[20, 52], help="tokens of the texts")
    parser.add_argument("--precision", choices=["bf16", "amp", "fp16", "fp32"], default="bf16")
    parser.add_argument("--grad-checkpointing", action="store_true")
    parser.add_argument("--top", type=int, default=0, help="list so many of the most costly operators")
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.here:
        estimate_here(options)
        return
    trees = {}
    for path in options.checkout:
        rest = [word for word in sys.argv[1:] if word != "--json"]
        paths = os.pathsep.join([str(path.resolve()), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, __file__, "--here", *rest]
        environment = {**os.environ, "PYTHONPATH": paths}
        found = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True, encoding="utf-8"
        )
        trees[str(path)] = json.loads(found.stdout)
    print(json.dumps(trees) if options.json else table(trees, options.top))


if __name__ == "__main__":
    main()

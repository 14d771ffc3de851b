"""What `gpu.py` measures: functions from a `Bench` to rows of a table; nothing here knows of time limits or pages."""

# B pairs, L tokens, R resolution, P patches and the class token, W width, E embedding

import base64
import contextlib
import io
import itertools
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from PIL import Image  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.nn.attention import SDPBackend, sdpa_kernel  # noqa: E402

from cn_clip import ranks, zoo  # noqa: E402
from cn_clip.clip.encoder import Encoder  # noqa: E402
from cn_clip.clip.layers import LayerNorm, QuickGELU  # noqa: E402
from cn_clip.clip.model import CLIP  # noqa: E402
from cn_clip.data.datasets import PairBatch  # noqa: E402
from cn_clip.data.lmdb_store import Pair, SplitWriter  # noqa: E402
from cn_clip.errors import lacked_memory  # noqa: E402
from cn_clip.training import inputs, params  # noqa: E402
from cn_clip.training.distributed import Parallel, compile_blocks  # noqa: E402
from cn_clip.training.loss import Objective  # noqa: E402
from cn_clip.training.scheduler import build_optimizer, clamp_logit_scale  # noqa: E402
from cn_clip.training.step import Learner, make_batch  # noqa: E402
from cn_clip.zoo import ModelConfig  # noqa: E402

Row = dict[str, Any]
GIB = 2**30


@dataclass(frozen=True)
class Bench:
    """Where and how large: the sizes of a GPU by default, tiny ones with `smoke`."""

    device: torch.device
    smoke: bool = False
    precision: str = "bf16"
    tflops: dict[str, float] = field(default_factory=dict)
    """Measured peak by arithmetic; `matmul` writes it, and later measures give their share of it."""

    def pick(self, full: Any, tiny: Any) -> Any:
        """The size for this run."""
        return tiny if self.smoke else full

    @property
    def towers(self) -> tuple[str, str]:
        """The model of the steps and of the extraction."""
        chosen: tuple[str, str] = self.pick(
            ("ViT-B-16", "RoBERTa-wwm-ext-base-chinese"), ("ViT-Tiny-64", "BERT-Tiny-chinese")
        )
        return chosen

    def timed(self, work: Callable[[], object], *, repeats: int | None = None, warmup: int = 3) -> list[float]:
        """Seconds of each repeat after the warm-up, the device's own clock where it has one."""
        repeats, warmup = repeats or self.pick(10, 2), self.pick(warmup, 1)
        for _ in range(warmup):
            work()
        if self.device.type != "cuda":
            return [_elapsed(work) for _ in range(repeats)]
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        marks[0].record()
        for mark in marks[1:]:
            work()
            mark.record()
        torch.cuda.synchronize(self.device)
        return [first.elapsed_time(then) / 1000 for first, then in itertools.pairwise(marks)]

    def seconds(self, work: Callable[[], object], **settings: Any) -> float:
        """The median of `timed`."""
        return statistics.median(self.timed(work, **settings))

    def peak_gib(self, work: Callable[[], object]) -> float | None:
        """What PyTorch's allocator held at most while `work` ran; None off CUDA."""
        if self.device.type != "cuda":
            work()
            return None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) / GIB


def _elapsed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@contextlib.contextmanager
def arithmetic(name: str) -> Iterator[None]:
    """Float32 products in TF32 with "tf32", in full otherwise."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    ranks.set_float32_products(torch.device("cuda", 0), is_strict=name != "tf32")  # for all GPUs; the CPU has no TF32
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


# --- what the device can do -------------------------------------------------------------------------------------------


def matmul(bench: Bench) -> list[Row]:
    """TFLOP/s of one large square product, and GB/s of a copy inside the device, its reading and writing counted."""
    rows = []
    side = bench.pick(8192, 128)
    for name, dtype in (("bf16", torch.bfloat16), ("tf32", torch.float32), ("fp32", torch.float32)):
        left, right = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
        with arithmetic(name):
            seconds = bench.seconds(partial(torch.mm, left, right), repeats=bench.pick(20, 2))
        bench.tflops[name] = 2 * side**3 / seconds / 1e12
        rows.append({"what": f"{name} {side}³", "ms": seconds * 1e3, "TFLOP/s": bench.tflops[name], "GB/s": None})
    source = torch.empty(bench.pick(GIB, 2**16), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.seconds(lambda: target.copy_(source))
    speed = 2 * source.numel() / seconds / 1e9
    rows.append({"what": "copy device to device", "ms": seconds * 1e3, "TFLOP/s": None, "GB/s": speed})
    return rows


def transfer(bench: Bench) -> list[Row]:
    """A batch of pictures from the host: bytes of a picture, and GB/s."""
    rows = []
    count, side = bench.pick(256, 4), bench.pick(224, 16)
    for kind, dtype in (("float32", torch.float32), ("uint8", torch.uint8)):
        for memory in ("pageable", "pinned"):
            if memory == "pinned" and bench.device.type != "cuda":
                continue
            pixels = torch.zeros(count, 3, side, side, dtype=dtype, pin_memory=memory == "pinned")
            target = torch.empty_like(pixels, device=bench.device)
            seconds = bench.seconds(partial(target.copy_, pixels, non_blocking=True))
            size = pixels.nbytes
            row = {"what": f"{kind}, {memory}", "bytes a picture": size // count, "ms a batch": seconds * 1e3}
            rows.append({**row, "GB/s": size / seconds / 1e9})
    return rows


# --- a step of training -----------------------------------------------------------------------------------------------


def step_flops(config: ModelConfig, pairs: int, tokens: int) -> float:
    """Floating point operations of forward and backward pass of a ViT and BERT, products only, nothing recomputed.

    A product of (m, k) and (k, n) has 2mkn; the backward pass has two of them for each, but one for the patches, whose
    input is not trained. The last layer of each tower computes the class token alone.
    """
    vision, text = config.vision, config.text
    assert isinstance(vision.vision_layers, int)
    assert vision.vision_patch_size is not None
    width, patches = vision.vision_width, (vision.image_resolution // vision.vision_patch_size) ** 2
    first = 2 * patches * 3 * vision.vision_patch_size**2 * width
    picture = (vision.vision_layers - 1) * _layer(patches + 1, patches + 1, width, 4 * width)
    picture += _layer(patches + 1, 1, width, 4 * width) + 2 * width * vision.embed_dim
    hidden, wide = text.text_hidden_size, text.text_intermediate_size
    words = (text.text_num_hidden_layers - 1) * _layer(tokens, tokens, hidden, wide)
    words += _layer(tokens, 1, hidden, wide) + 2 * hidden * vision.embed_dim
    logits = 2 * pairs * vision.embed_dim
    return pairs * (2 * first + 3 * (picture + words + logits))


def _layer(length: int, queries: int, width: int, inner: int) -> float:
    """One layer for one picture or text: `queries` of its `length` tokens look, and go on."""
    projections = 2 * width * width * (2 * length + 2 * queries)
    return projections + 4 * queries * length * width + 4 * queries * width * inner


@dataclass
class Run:
    """A model in training, and pairs for it; `step` takes one update as the training loop does."""

    bench: Bench
    config: ModelConfig
    compiled: bool = False
    checkpointing: bool = False

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        device = self.bench.device
        with device:
            self.model = CLIP.from_config(self.config).train()
        self.model.set_grad_checkpointing(self.checkpointing)
        if self.compiled:
            compile_blocks(self.model)
        self.optimizer = build_optimizer(self.model, lr=5e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.001)
        dtype = ranks.autocast_dtype(self.bench.precision, device)
        scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        autocast = contextlib.nullcontext if dtype is None else partial(torch.autocast, device.type, dtype=dtype)
        self.learner = Learner(Parallel(self.model, device), Objective(), scaler, autocast)

    def pairs(self, count: int) -> PairBatch:
        """Random pixels as bytes and token ids, as a loader gives them; lengths as of captions, 8 to 30 tokens."""
        side = self.config.vision.image_resolution
        generator = torch.Generator().manual_seed(count)
        pinned = self.bench.device.type == "cuda"
        pixels = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
        tokens = torch.randint(1, 20000, (count, 52), generator=generator)
        tokens[torch.arange(52) >= (8 + torch.arange(count) % 23).unsqueeze(1)] = 0
        tokens[0, :LONGEST] = 1
        if pinned:
            pixels, tokens = pixels.pin_memory(), tokens.pin_memory()
        numbers = list(range(count))
        return PairBatch(pixels, tokens, numbers, numbers, [0] * count)

    def step(self, pairs: PairBatch) -> Tensor:
        """One update; returns the loss."""
        self.optimizer.zero_grad(set_to_none=True)
        batch = make_batch(pairs, self.bench.device, with_keys=False)
        loss = self.learner.backward([batch]).loss
        self.learner.scaler.step(self.optimizer)
        self.learner.scaler.update()
        clamp_logit_scale(self.model.logit_scale)
        return loss


LONGEST = 30


def step_times(bench: Bench, pairs: int, reference: "Callable[[int], dict[str, Any]] | None" = None) -> list[Row]:
    """Eager, compiled and, where it is there, the reference: in turns, after each has had its warm-up."""
    config = zoo.model_config(*bench.towers)
    contenders: dict[str, Callable[[], list[float]]] = {}
    peaks: dict[str, float | None] = {}
    for name in ("eager", "compiled"):
        run = Run(bench, config, compiled=name == "compiled")
        batch = run.pairs(pairs)
        before = torch.cuda.memory_allocated(bench.device) if bench.device.type == "cuda" else 0
        own = sum(one.nbytes for one in run.model.parameters())
        peak = bench.peak_gib(lambda run=run, batch=batch: [run.step(batch) for _ in range(3)])  # type: ignore[misc]
        # Without what the contender before it holds.
        peaks[name] = None if peak is None else peak - (before - own) / GIB
        contenders[name] = partial(bench.timed, partial(run.step, batch), repeats=bench.pick(5, 1), warmup=2)
    if reference is not None:
        peaks["cn_clip 1.6.0"] = None

        def of_reference() -> list[float]:
            answer = reference(pairs)
            peaks["cn_clip 1.6.0"] = answer["peak_gib"]
            seconds: list[float] = answer["seconds"]
            return seconds

        contenders["cn_clip 1.6.0"] = of_reference
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(bench.pick(3, 1)):
        for name, measure in contenders.items():
            times[name] += measure()
    operations = step_flops(config, pairs, LONGEST)
    return [_step_row(bench, name, pairs, times[name], peaks[name], operations) for name in contenders]


def _step_row(bench: Bench, name: str, pairs: int, times: list[float], peak: float | None, operations: float) -> Row:
    seconds = statistics.median(times)
    speed = operations / seconds / 1e12
    share = 100 * speed / bench.tflops["bf16"] if "bf16" in bench.tflops else None
    row: Row = {"what": name, "pairs": pairs, "ms a step": seconds * 1e3, "pairs/s": pairs / seconds}
    return {**row, "peak GiB": peak, "TFLOP/s": speed, "% of peak": share}


def loader_step(bench: Bench) -> list[Row]:
    """Steps fed by the loader of training from JPEG files of 640 x 480 in an LMDB: how long a step waits."""
    pairs, rows = bench.pick(256, 4), []
    run = Run(bench, zoo.model_config(*bench.towers))
    with tempfile.TemporaryDirectory() as folder:
        write_split(Path(folder), count=bench.pick(4096, 12), size=bench.pick((640, 480), (40, 30)))
        for workers in bench.pick((4, 8, 16), (0,)):
            options = params.Options(train_data=folder, batch_size=pairs, num_workers=workers, warmup=0)
            data = inputs.training_data(options, run.config.vision.image_resolution, bench.device)
            data.start_epoch(0, 0)
            waited, steps = [], []
            batches = iter(data.loader)
            for _ in range(bench.pick(12, 2)):
                started = time.perf_counter()
                batch = next(batches)
                loaded = time.perf_counter()
                run.step(batch).item()
                waited.append(loaded - started)
                steps.append(time.perf_counter() - started)
            del batches
            share = 100 * sum(waited[2:]) / sum(steps[2:]) if len(steps) > 2 else 100 * sum(waited) / sum(steps)
            rows.append({"--num-workers": workers, "ms a step": statistics.median(steps) * 1e3, "Data Time %": share})
    return rows


def write_split(folder: Path, *, count: int, size: tuple[int, int]) -> None:
    """An LMDB of `count` pictures with texts; thirty-two different ones, so that writing takes no time."""
    files = [base64.b64encode(picture(number, size)) for number in range(32)]
    with SplitWriter(folder) as writer:
        for number in range(count):
            writer.put_image(number, files[number % len(files)])
            writer.put_pair(Pair(number, number, f"第{number}张图片，一只狗在雪地里奔跑"))


def picture(number: int, size: tuple[int, int]) -> bytes:
    """A JPEG of smooth shapes and some noise."""
    random = np.random.default_rng(number)
    coarse = Image.fromarray(random.integers(0, 255, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8))
    stream = io.BytesIO()
    coarse.resize(size, Image.Resampling.BICUBIC).save(stream, "JPEG", quality=85)
    return stream.getvalue()


# --- parts of the towers ----------------------------------------------------------------------------------------------


def parts(bench: Bench) -> list[Row]:
    """Forward and backward pass of the pieces that other kernels could compute, at the sizes of the step."""
    batch, length, width = bench.pick((256, 197, 768), (2, 5, 64))
    dtype = torch.bfloat16
    rows = torch.randn(batch, length, width, device=bench.device, dtype=dtype, requires_grad=True)
    wide = torch.randn(batch, length, 4 * width, device=bench.device, dtype=dtype, requires_grad=True)
    norm, plain = LayerNorm(width).to(bench.device), nn.LayerNorm(width, device=bench.device, dtype=dtype)
    works: dict[str, Callable[[], Tensor]] = {
        "QuickGELU: this package": partial(QuickGELU(), wide),
        "QuickGELU: x * sigmoid(1.702 x)": lambda: wide * torch.sigmoid(1.702 * wide),
        "LayerNorm: this package": partial(norm, rows),
        "LayerNorm: in float32": lambda: F.layer_norm(
            rows.float(), (width,), norm.weight.float(), norm.bias.float(), 1e-5
        ).to(dtype),
        "LayerNorm: in bf16": partial(plain, rows),
    }
    found = [{"what": name, "ms": 1e3 * bench.seconds(partial(_both_ways, work))} for name, work in works.items()]
    heads = width // 64
    for tower, tokens, masked in (("pictures", length, False), ("texts, padded", bench.pick(30, 4), True)):
        shape = (batch, heads, tokens, 64)
        query, key, value = (torch.randn(shape, device=bench.device, dtype=dtype, requires_grad=True) for _ in range(3))
        mask = torch.zeros(batch, 1, 1, tokens, device=bench.device, dtype=dtype) if masked else None
        attend = partial(F.scaled_dot_product_attention, query, key, value, attn_mask=mask)
        found.append({"what": f"attention, {tower}: chosen", "ms": 1e3 * bench.seconds(partial(_both_ways, attend))})
        for backend in (
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.MATH,
        ):
            label = f"attention, {tower}: {backend.name.lower().removesuffix('_attention')}"
            found.append({"what": label, "ms": _with_kernel(bench, backend, attend)})
    return found


def _both_ways(work: Callable[[], Tensor]) -> None:
    output = work()
    output.backward(output)


def _with_kernel(bench: Bench, backend: SDPBackend, attend: Callable[[], Tensor]) -> float | None:
    """Milliseconds with this kernel, None where PyTorch does not offer it for these inputs."""
    try:
        with sdpa_kernel(backend), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return 1e3 * bench.seconds(partial(_both_ways, attend))
    except RuntimeError:
        return None


# --- extraction -------------------------------------------------------------------------------------------------------


def extraction(bench: Bench) -> list[Row]:
    """Pictures a second of `Encoder`, from pixels, and from JPEG files of 640 x 480 with the decoding."""
    rows = []
    batch, rounds = bench.pick((256, 4), (4, 1))
    files = [picture(number, bench.pick((640, 480), (40, 30))) for number in range(batch)] * rounds
    for name in ("fp32", "tf32", "bf16", "fp16"):
        with arithmetic(name):
            encoder = encoder_of(bench, "fp32" if name == "tf32" else name)
            pixels = np.zeros((batch, 3, encoder.resolution, encoder.resolution), dtype=np.float32)
            computing = statistics.median(_host_seconds(bench, partial(encoder.encode_pixels, pixels)))
            decode = partial(encoder.encode_images, files, batch_size=batch, num_threads=bench.pick(16, 2))
            whole = _elapsed(decode)
        row = {"what": name, "batch": batch, "pictures/s": batch / computing}
        rows.append({**row, "with decoding": len(files) / whole})
    return rows


def texts(bench: Bench) -> list[Row]:
    """Texts of fifty lengths in eight sizes of batch, three times: the first pass makes plans, if plans are made."""
    encoder = encoder_of(bench, "bf16")
    lengths = range(3, bench.pick(53, 7))
    sizes = bench.pick((1, 2, 5, 16, 40, 64, 200, 512), (1, 3))
    rows: list[Row] = []
    for name in ("first pass", "second pass", "third pass"):
        started, slowest = time.perf_counter(), 0.0
        for size in sizes:
            for length in lengths:
                tokens = np.full((size, length), 7, dtype=np.int64)
                slowest = max(slowest, _elapsed(partial(encoder.encode_tokens, tokens)))
        seconds = time.perf_counter() - started
        count = len(sizes) * len(lengths)
        rows.append({"what": name, "batches": count, "s": seconds, "slowest batch ms": slowest * 1e3})
    return rows


def encoder_of(bench: Bench, precision: str) -> Encoder:
    """An Encoder over random weights."""
    torch.manual_seed(0)
    model = CLIP.from_config(zoo.model_config(*bench.towers)).eval()
    return Encoder(model, device=bench.device, precision=precision)


def _host_seconds(bench: Bench, work: Callable[[], object]) -> list[float]:
    """For work that ends with its result on the host."""
    for _ in range(bench.pick(3, 1)):
        work()
    return [_elapsed(work) for _ in range(bench.pick(10, 2))]


# --- memory -----------------------------------------------------------------------------------------------------------

LARGE = {
    "ViT-B-16": "RoBERTa-wwm-ext-base-chinese",
    "ViT-L-14": "RoBERTa-wwm-ext-base-chinese",
    "ViT-H-14": "RoBERTa-wwm-ext-large-chinese",
    "RN50": "RBT3-chinese",
}


def peak_row(bench: Bench, vision: str, text: str, *, checkpointing: bool, batches: tuple[int, ...]) -> Row:
    """What two steps of training hold at most, in GiB, by pairs a batch."""
    row: Row = {"what": vision, "--grad-checkpointing": "yes" if checkpointing else "no"}
    run = Run(bench, zoo.model_config(vision, text), checkpointing=checkpointing)
    for pairs in batches:
        batch = run.pairs(pairs)
        try:
            row[f"{pairs} pairs"] = bench.peak_gib(lambda batch=batch: [run.step(batch) for _ in range(2)])  # type: ignore[misc]
        except RuntimeError as error:
            if not lacked_memory(error):
                raise
            row[f"{pairs} pairs"] = "—"
    return row

"""How CPU time and memory grow: with model, batch, text, picture, gallery, clients and dataset:

python benchmarks/growth.py --output docs

Every point is measured in a process of its own. The exponent of a curve is the slope of a straight line through the
upper half of its points, both axes logarithmic: 1 is linear. Written are the numbers, two pictures, and a section
of the page of benchmarks. Exits with 1 when something grows faster than its limit.
"""

# N rows, Q queries, D dimensions, B pictures

import asyncio
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import growth_page  # noqa: E402
import numpy as np  # noqa: E402

from cn_clip import command, terminal  # noqa: E402
from cn_clip.deploy import bench_report  # noqa: E402
from cn_clip.errors import ConfigError  # noqa: E402

RESULTS = Path(__file__).with_suffix(".json")
DIMENSIONS = 64
COMMIT = 100_000
# Exponents above this are faster than linear, measuring errors aside.
LINEAR = 1.1


class Cost(NamedTuple):
    """What one unit of work took. megabytes: the most memory beyond what the process held before; None: not
    looked at. x: where on the axis; None: at the point of the group."""

    curve: str
    seconds: float
    megabytes: float | None = None
    x: float | None = None


@dataclass(frozen=True)
class Group:
    """Curves over one axis, measured together. measure: costs at a point; the folder is empty and goes away."""

    axis: str
    points: tuple[int, ...]
    measure: Callable[[int, Path], Iterator[Cost]]


@dataclass(frozen=True)
class Options:
    """Measures each curve; about 15 minutes on two cores."""

    output: Path | None = None
    """Folder of documents, whose pages of benchmarks get the section; the numbers go to growth.json beside this file"""
    only: tuple[str, ...] = ()
    """Groups to measure; default: all"""
    largest: int | None = None
    """No point beyond this one"""
    measure: tuple[str, int] | None = None
    """Measure one point of one group in this process; what each process is started with"""
    work: Path | None = None
    """Folder to work in; default: a temporary one"""
    json: bool = False
    """Print the numbers as one JSON object"""

    def __post_init__(self) -> None:
        unknown = [name for name in (*self.only, *(self.measure or ())[:1]) if name not in GROUPS]
        if unknown:
            raise ConfigError(f"--only {unknown[0]}: expected one of {', '.join(GROUPS)}")


def run(options: Options) -> int:
    """Returns 1 when a curve is steeper than its limit."""
    if options.measure is not None:
        return _point(*options.measure, options.work)
    say = command.Speaker(quiet=options.json)
    curves: dict[str, dict[str, Any]] = {}
    for name in options.only or GROUPS:
        for x in GROUPS[name].points:
            if options.largest is None or x <= options.largest:
                for cost in _in_process(name, x, options.work):
                    points = curves.setdefault(cost.curve, {"group": name, "axis": GROUPS[name].axis, "points": []})
                    points["points"].append([x if cost.x is None else cost.x, cost.seconds, cost.megabytes])
                    say(f"{name} {x:,}: {cost.curve} {1e3 * cost.seconds:.3g} ms of CPU{_memory(cost)}")
    for curve in curves.values():
        curve["exponent"] = exponent([(x, seconds) for x, seconds, _ in curve["points"]])
        memory = [
            (x, megabytes) for x, _, megabytes in curve["points"] if (megabytes or 0) >= growth_page.LEAST_MEGABYTES
        ]
        curve["memory_exponent"] = exponent(memory)
    found = {"machine": bench_report.machine_facts(), "curves": curves}
    steep = [name for name, curve in curves.items() if (curve["exponent"] or 0) > LIMITS.get(name, LINEAR)]
    say(table(curves))
    if options.output is not None:
        _write(found, options.output)
    say.result({**found, "steep": steep})
    return int(bool(steep))


def exponent(points: list[tuple[float, float]]) -> float | None:
    """The slope of log(y) over log(x) in the upper half of the points, three at least; None for fewer than three."""
    points = [(x, y) for x, y in points if y > 0]
    if len(points) < 3:
        return None
    x_N, y_N = np.log(np.array(points[-max(3, len(points) // 2) :], dtype=np.float64).T)
    return float(np.polyfit(x_N, y_N, 1)[0])


def table(curves: dict[str, dict[str, Any]]) -> str:
    """A line a curve."""
    rows = [
        (
            name,
            curve["axis"],
            *(f"{1e3 * curve['points'][end][1]:.3g} ms at {curve['points'][end][0]:,}" for end in (0, -1)),
            "" if curve["exponent"] is None else f"{curve['exponent']:.2f}",
            "" if curve["memory_exponent"] is None else f"{curve['memory_exponent']:.2f}",
        )
        for name, curve in curves.items()
    ]
    head = ("curve", "axis", "first", "last", "exponent", "of memory")
    return "\n".join(terminal.align([head, *rows], right=frozenset({4, 5})))


def _memory(cost: Cost) -> str:
    return "" if cost.megabytes is None else f", {cost.megabytes:,.0f} MB"


def _write(found: dict[str, Any], docs: Path) -> None:
    RESULTS.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    growth_page.draw(found, docs / "images")
    growth_page.write(found, docs)


# --- one process a point


def _in_process(group: str, x: int, work: Path | None) -> list[Cost]:
    arguments = [sys.executable, __file__, "--measure", group, str(x), *(["--work", str(work)] if work else [])]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    answer = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False, encoding="utf-8")
    if answer.returncode:
        raise RuntimeError(f"{group} {x}: {answer.stderr[-2000:]}")
    return [Cost(*one) for one in json.loads(answer.stdout.splitlines()[-1])]


def _point(group: str, x: int, work: Path | None) -> int:
    with tempfile.TemporaryDirectory(dir=work) as folder, contextlib.redirect_stdout(sys.stderr):
        costs = list(GROUPS[group].measure(x, Path(folder)))
    print(json.dumps(costs))
    return 0


def timed(curve: str, work: Callable[[], object], *, least: float = 0.3) -> Cost:
    """CPU time of a call, the median of several that take `least` seconds together, after two; memory of the second."""
    work()
    memory = _Peak()
    work()
    megabytes = memory.megabytes()
    seconds: list[float] = []
    until = time.process_time() + least
    while not seconds or (time.process_time() < until and len(seconds) < 50):
        begin = time.process_time()
        work()
        seconds.append(time.process_time() - begin)
    return Cost(curve, float(np.median(seconds)), megabytes)


def once(curve: str, work: Callable[[], object]) -> Cost:
    """As `timed`, of one call."""
    memory, begin = _Peak(), time.process_time()
    work()
    return Cost(curve, time.process_time() - begin, memory.megabytes())


class _Peak:
    """The most memory from now on, by the kernel, which can be told to forget an earlier peak (Linux)."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.before = self._kilobytes("VmRSS")

    def megabytes(self) -> float:
        return (self._kilobytes("VmHWM") - self.before) / 1024

    @staticmethod
    def _kilobytes(name: str) -> int:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


# --- what is measured


TOWERS = ("RN-Small-64", "ViT-B-32", "RN50", "ViT-B-16", "ViT-L-14", "ViT-H-14")


def model(number: int, folder: Path) -> Iterator[Cost]:
    """One picture by a tower of TOWERS; the axis is the tower's multiplications, counted as it runs."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    encoder = _encoder(folder, TOWERS[number - 1])
    pixels_BCRR = np.zeros((1, 3, encoder.resolution, encoder.resolution), dtype=np.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder.encode_pixels(pixels_BCRR)
    cost = timed("a picture, by the tower's operations", lambda: encoder.encode_pixels(pixels_BCRR), least=2.0)
    yield cost._replace(x=counter.get_total_flops() / 2e6)


def batch(size: int, folder: Path) -> Iterator[Cost]:
    """Pictures and texts of one size in one batch."""
    encoder = _encoder(folder, "ViT-B-32")
    pixels_BCRR = np.zeros((size, 3, 224, 224), dtype=np.float32)
    yield timed("a batch of pictures", lambda: encoder.encode_pixels(pixels_BCRR), least=1.0)
    ids_BL = np.full((size, 24), 800, dtype=np.int64)
    yield timed("a batch of texts", lambda: encoder.encode_tokens(ids_BL), least=1.0)


def text_length(length: int, folder: Path) -> Iterator[Cost]:
    """Texts of so many tokens."""
    encoder = _encoder(folder, "RN-Small-64")
    ids_BL = np.full((16, length), 800, dtype=np.int64)
    yield timed("16 texts of a length", lambda: encoder.encode_tokens(ids_BL), least=1.0)
    text = "一只黑白相间的猫" * (length // 8)
    yield timed("tokenizing 16 texts", lambda: encoder.texts.rows([text] * 16))


def picture(pixels: int, folder: Path) -> Iterator[Cost]:
    """A JPEG file of so many pixels, decoded and prepared."""
    from PIL import Image

    from cn_clip.clip.transforms import image_transform

    side = round(pixels**0.5)
    rows = np.random.default_rng(0).integers(0, 256, (side // 8 + 1, side // 8 + 1, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(rows).resize((side, side), Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
    transform = image_transform(224)

    def prepare() -> None:
        with Image.open(io.BytesIO(data.getvalue())) as opened:
            transform(opened)

    yield timed("a JPEG, decoded and resized", prepare)


def gallery(num_rows: int, folder: Path) -> Iterator[Cost]:
    """An index of so many rows in a folder: built, opened, searched, changed."""
    from cn_clip.retrieval.manifest import Manifest, ModelInfo
    from cn_clip.retrieval.store import open_index
    from cn_clip.retrieval.writer import NewItem, open_writer

    path, generator = folder / "index", np.random.default_rng(0)
    empty = Manifest(ModelInfo("", "", DIMENSIONS), source="growth", vector_type="float16")

    def units(count: int) -> Any:
        rows = generator.standard_normal((count, DIMENSIONS), dtype=np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def build() -> None:
        with open_writer(path, create=empty) as writer:
            for start in range(0, num_rows, COMMIT):
                part = units(min(COMMIT, num_rows - start))
                writer.commit(
                    [
                        NewItem(f"{start + row:08d}.jpg", part[row], {"year": 2000 + row % 25})
                        for row in range(len(part))
                    ]
                )
            writer.finish()

    import cn_clip.retrieval.flat  # noqa: F401  (torch, whose import is no part of a search)

    yield once("building an index", build)
    yield once("opening it", lambda: open_index(path))
    index = open_index(path)
    yield once("its first id", lambda: index.metadata("00000007.jpg"))
    yield once("its first condition", lambda: index.search(units(1), 10, where="year>=2020"))
    yield timed("an exact search", lambda: index.search(units(1), 10))
    yield timed("a search that a condition narrows", lambda: index.search(units(1), 10, where="year>=2020"))

    def add() -> None:
        with open_writer(path) as writer:
            writer.commit([NewItem("new.jpg", units(1)[0], {"year": 2026})])

    def remove() -> None:
        with open_writer(path) as writer:
            writer.commit(remove=["new.jpg"])

    yield once("adding one item", add)
    yield once("removing one item", remove)


def top_k(num_rows: int, folder: Path) -> Iterator[Cost]:
    """As many queries as rows, as the recall of a dataset needs them."""
    from cn_clip.retrieval import flat

    rows = np.random.default_rng(0).standard_normal((num_rows, DIMENSIONS), dtype=np.float32)
    yield timed("top 10 of N among N", lambda: flat.top_k(rows, rows, 10))


def clients(number: int, folder: Path) -> Iterator[Cost]:
    """Requests of so many clients at once, one text each; CPU of the service for a request."""
    import serve_load

    from cn_clip.emoji_pack import load

    bodies = serve_load.request_bodies("text", [one.name for one in load()])
    with serve_load.service(["--model", "Emoji-Tiny", "--name", "served"]) as (process, port):
        asyncio.run(serve_load.crowd(bodies, number, port, 2.0))
        begin = _cpu_seconds(process.pid)
        seconds, _ = asyncio.run(serve_load.crowd(bodies, number, port, 5.0))
        yield Cost("a request, among so many clients", (_cpu_seconds(process.pid) - begin) / len(seconds))


def request(number: int, folder: Path) -> Iterator[Cost]:
    """One request with so many texts."""
    import serve_load

    body = serve_load.request_body(["一只黑白相间的猫"] * number)
    with serve_load.service(["--model", "Emoji-Tiny", "--name", "served"]) as (process, port):
        asyncio.run(serve_load.crowd([body], 1, port, 1.0))
        begin = _cpu_seconds(process.pid)
        seconds, _ = asyncio.run(serve_load.crowd([body], 1, port, 3.0))
        yield Cost("a request of so many texts", (_cpu_seconds(process.pid) - begin) / len(seconds))


def dataset(num_pairs: int, folder: Path) -> Iterator[Cost]:
    """A dataset of so many pairs: packed, checked, and trained on for one step."""
    _write_pairs(folder, num_pairs)
    build = ["preprocess.build_lmdb_dataset", f"--data_dir={folder}", "--splits=train"]
    yield _command("packing a dataset", build)
    yield _command("checking a dataset", ["preprocess.check_dataset", f"--data-dir={folder}", "--splits=train"])
    towers = ["--vision-model=RN-Tiny-64", "--text-model=BERT-Tiny-chinese", "--device=cpu", "--precision=fp32"]
    sizes = ["--batch-size=32", "--max-steps=1", "--warmup=1", "--num-workers=0", f"--logs={folder / 'logs'}"]
    start = ["training.main", f"--train-data={folder / 'lmdb/train'}", *towers, *sizes]
    yield _command("starting training, and one step", start)


def _encoder(folder: Path, vision: str, text: str = "RBT3-chinese") -> Any:
    """One with random weights, in float32 on the CPU."""
    import torch

    from cn_clip.clip import Encoder
    from cn_clip.clip.model import CLIP
    from cn_clip.zoo import model_config

    torch.manual_seed(0)
    return Encoder(CLIP.from_config(model_config(vision, text)).eval(), device="cpu")


def _write_pairs(folder: Path, count: int) -> None:
    import base64

    from PIL import Image

    generator = np.random.default_rng(0)
    with (
        open(folder / "train_imgs.tsv", "w", encoding="utf-8") as pictures,
        open(folder / "train_texts.jsonl", "w", encoding="utf-8") as texts,
    ):
        for number in range(count):
            data = io.BytesIO()
            Image.fromarray(generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(data, "JPEG")
            pictures.write(f"{number}\t{base64.b64encode(data.getvalue()).decode()}\n")
            texts.write(json.dumps({"text_id": number, "text": f"图片{number}", "image_ids": [number]}) + "\n")


def _command(curve: str, words: list[str]) -> Cost:
    """CPU time and peak memory of a command and its processes."""
    arguments = [sys.executable, "-m", f"cn_clip.{words[0]}", *words[1:]]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd=ROOT)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(words)}: {said.decode(errors='replace')[-2000:]}")
    return Cost(curve, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024)


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


GROUPS = {
    "model": Group("millions of multiplications", tuple(range(1, len(TOWERS) + 1)), model),
    "batch": Group("pictures or texts", (1, 2, 4, 8, 16, 32, 64), batch),
    "text": Group("tokens", (8, 16, 32, 64, 128, 256, 512), text_length),
    "picture": Group("pixels", (10_000, 100_000, 1_000_000, 4_000_000, 16_000_000, 64_000_000), picture),
    "gallery": Group("rows", (1_000, 10_000, 100_000, 1_000_000, 10_000_000), gallery),
    "top-k": Group("rows and queries", (1_000, 2_000, 4_000, 8_000, 16_000), top_k),
    "clients": Group("clients", (1, 8, 32, 128, 500), clients),
    "request": Group("texts", (1, 8, 64, 512, 2048), request),
    "dataset": Group("pairs", (1_000, 10_000, 100_000), dataset),
}
# Curves that may be steeper, with the reason that the page gives.
LIMITS = {"top 10 of N among N": 2.1, "16 texts of a length": 1.4}


if __name__ == "__main__":
    command.execute(run, Options, None)

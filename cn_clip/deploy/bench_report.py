"""The measurements of `cn-clip bench` as a table, a Markdown page and a picture, and what they were made on."""

import contextlib
import datetime
import json
import os
import platform
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from cn_clip import ranks, terminal
from cn_clip.errors import MissingExtraError
from cn_clip.extras import require
from cn_clip.files import atomic_write
from cn_clip.language import both, translated
from cn_clip.processes import usable_cores

Row = dict[str, Any]

MISSING = "—"
HEADER = (
    "tower",
    "backend",
    "precision",
    "batch",
    "median ms",
    "p95 ms",
    "per s",
    "load s",
    "peak MiB",
    "cos min",
    "mean",
)
NUMBERS = frozenset(range(3, len(HEADER)))
COLOURS = {"torch": "#d1495b", "onnx": "#1f6fb4", "openvino": "#2a9d8f", "tensorrt": "#7b5ea7"}
FAINT = "#8d99ae"
MEASURED = (
    "A batch from an array in memory to unit float32 rows in memory, after warm-up; pictures were decoded and scaled, "
    "texts cut into tokens before. A batch of texts holds captions of mixed lengths padded to the longest. `per s`: "
    "pictures or texts a second, from the median. `load s`: from opening to the first result, the import of the "
    "backend included, exporting not. `peak MiB`: the whole process, one for each row. `cos`: cosines to PyTorch in "
    "float32 on 32 embedded pictures, or their names and tags."
)
PACKAGES = ("cn_clip", "torch", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "numpy")
# What fast low precision on x86 and ARM needs.
INSTRUCTIONS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimddp", "bf16")


def machine_facts() -> dict[str, Any]:
    """Processor, cores this process may use, instructions, OMP_NUM_THREADS, system, versions and the time (UTC)."""
    processor, flags = ranks.processor()
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "processor": processor,
        "cores": usable_cores(),
        "instructions": [name for name in INSTRUCTIONS if name in flags],
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


def cells(row: Row) -> list[str]:
    """A row as the table shows it; dashes where it was not measured."""
    name = [row["tower"], row["backend"], row["precision"], str(row["batch_size"])]
    if "error" in row:
        return [*name, *[MISSING] * (len(HEADER) - len(name))]
    return [
        *name,
        f"{row['median_ms']:.2f}",
        f"{row['p95_ms']:.2f}",
        f"{row['per_second']:.1f}",
        f"{row['load_s']:.2f}",
        f"{row['peak_bytes'] / 2**20:.0f}" if row["peak_bytes"] else MISSING,
        f"{row['cosine_min']:.5f}",
        f"{row['cosine_mean']:.5f}",
    ]


def reasons(rows: Sequence[Row]) -> list[str]:
    """`— backend precision: why` of what was not measured; one line a reason, with the towers and batches.

    Before them what "auto" took, and why.
    """
    found: dict[tuple[str, str, str], list[str]] = {}
    taken = dict.fromkeys(f"{row['tower']} {row['precision']}, {row['auto']['why']}" for row in rows if "auto" in row)
    for row in rows:
        if "error" in row:
            combinations = found.setdefault((row["backend"], row["precision"], row["error"]), [])
            combinations.append(f"{row['tower']} ×{row['batch_size']}")
    return list(taken) + [
        f"{MISSING} {backend} {precision} ({', '.join(combinations)}): {error}"
        for (backend, precision, error), combinations in found.items()
    ]


def table(rows: Sequence[Row]) -> list[str]:
    """The lines for a terminal."""
    return [*terminal.align([HEADER, *map(cells, rows)], right=NUMBERS), *reasons(rows)]


def markdown(result: dict[str, Any]) -> str:
    """A page: what it was measured on, the table, what the numbers mean."""
    machine, settings, rows = result["machine"], result["settings"], result["rows"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    threads = settings["num_threads"] or machine["omp_num_threads"] or "default"
    instructions = " ".join(machine["instructions"]) or machine["system"]
    shapes = dict.fromkeys(f"{row['tower']} {'×'.join(map(str, row['shape']))}" for row in rows if "shape" in row)
    marks = ["---:" if number in NUMBERS else "---" for number in range(len(HEADER))]
    lines = [
        f"# {result['model']}: speed of its towers",
        "",
        f"- {machine['processor']}, {machine['cores']} cores ({instructions})",
        f"- threads: {threads}; devices: {', '.join(sorted({row['device'] for row in rows if 'device' in row}))}",
        f"- Python {machine['python']}, {versions}",
        f"- {settings['repeats']} batches timed after {settings['warmup']}; {machine['date']}",
        f"- shapes: {', '.join(shapes)}",
        "",
        *(f"| {' | '.join(line)} |" for line in (HEADER, marks, *map(cells, rows))),
        "",
        *(f"{line}  " for line in reasons(rows)),
        "",
        MEASURED,
        "",
    ]
    return "\n".join(lines)


def write(result: dict[str, Any], folder: Path, *, say: Callable[[str], None]) -> None:
    """Writes bench.json, bench.md and, where there is matplotlib, bench.png; each whole or not at all."""
    with atomic_write(folder / "bench.json") as stream:
        json.dump(result, stream, ensure_ascii=False, indent=1)
    with atomic_write(folder / "bench.md") as stream:
        stream.write(markdown(result))
    names = ["bench.json", "bench.md"]
    if any("error" not in row for row in result["rows"]):
        try:
            draw(result, folder / "bench.png")
            names.append("bench.png")
        except MissingExtraError as error:
            say(both(f"没有画图：{translated(str(error))}", f"no bench.png: {error}"))
    listed = ", ".join(names)
    say(both(f"已写入 {folder}：{listed}", f"written to {folder}: {listed}"))


def draw(result: dict[str, Any], path: Path) -> None:
    """Bars of throughput, a panel for each tower and batch size; raises MissingExtraError without matplotlib."""
    require("matplotlib", extra="plot", purpose="the plot of the measurements")
    figures: Any = require("matplotlib.figure", extra="plot", purpose="the plot of the measurements")
    layouts: Any = require("matplotlib.layout_engine", extra="plot", purpose="the plot of the measurements")
    rows = result["rows"]
    towers, batches = ([*dict.fromkeys(row[name] for row in rows)] for name in ("tower", "batch_size"))
    labels = [*dict.fromkeys(f"{row['backend']} {row['precision']}" for row in rows if "error" not in row)]
    height = 1.2 + len(towers) * (0.9 + 0.33 * len(labels))
    layout = layouts.ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.1, hspace=0.05, wspace=0.05)
    figure = figures.Figure(figsize=(2.4 + 4 * len(batches), height), layout=layout, facecolor="white")
    panels = figure.subplots(len(towers), len(batches), squeeze=False, sharey=True)
    for tower, line in zip(towers, panels, strict=True):
        for batch_size, panel in zip(batches, line, strict=True):
            chosen = [row for row in rows if (row["tower"], row["batch_size"]) == (tower, batch_size)]
            speeds = {f"{row['backend']} {row['precision']}": row.get("per_second", 0.0) for row in chosen}
            values = [speeds.get(label, 0.0) for label in labels]
            colours = [COLOURS.get(label.split()[0], FAINT) for label in labels]
            bars = panel.barh(range(len(labels)), values, color=colours, height=0.68)
            texts = [f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value else MISSING for value in values]
            panel.bar_label(bars, texts, padding=4, fontsize=9, color="#333a45")
            panel.set_yticks(range(len(labels)), labels, fontsize=9)
            panel.set_ylim(len(labels) - 0.4, -0.6)
            panel.set_xlim(0, 1.18 * max([*values, 1e-9]))
            panel.spines[["top", "right", "bottom"]].set_visible(False)
            panel.tick_params(axis="y", length=0)
            panel.tick_params(axis="x", labelbottom=False, length=0)
            unit = "pictures" if tower == "image" else "texts"
            panel.set_title(f"{tower} tower, batch {batch_size}: {unit} per second", loc="left", fontsize=10)
    machine = result["machine"]
    parts = [Path(result["model"]).name, f"{machine['processor']}, {machine['cores']} cores, {machine['date'][:10]}"]
    # The font of matplotlib has no Chinese characters, and a "$" would begin a formula.
    title = "\n".join(part for part in parts if part.isascii())
    figure.suptitle(title, x=0.01, ha="left", fontsize=9, fontweight="bold", parse_math=False)
    with atomic_write(path, "wb") as stream:
        figure.savefig(stream, format="png", dpi=120)

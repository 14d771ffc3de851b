"""The results of `gpu.py` as a block of a page, in Chinese or English, and as a picture."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from cn_clip.errors import DataError
from cn_clip.files import atomic_write

TITLES = {
    "device": ("设备能做到的", "What the device can do"),
    "step": ("一步训练：ViT-B-16 与 RoBERTa-base，bf16", "One training step: ViT-B-16 with RoBERTa-base, bf16"),
    "extraction": ("提取图片特征，每秒张数", "Image features, images/s"),
    "texts": ("长短不一的文本：同样的批过三遍", "Texts of many lengths: the same batches three times"),
    "transfer": ("从主机到设备", "From host to device"),
    "parts": ("塔里的零件，前向加反向", "Parts of the towers, forward and backward"),
    "loader": ("由数据加载进程供给的训练", "Training fed by the data loader"),
    "peaks": ("训练时显存的峰值，GiB", "Peak memory in training, GiB"),
}


class Words(NamedTuple):
    """What a page says around its numbers. title: which one of `TITLES`."""

    title: int
    what: str
    machine: str
    left_out: str
    between: tuple[str, str]


CHINESE = Words(0, "项目", "机器：{}。", "没有测的：{}。", ("，", "；"))
ENGLISH = Words(1, "what", "Machine: {}.", "Left out: {}.", (", ", "; "))


def block(found: dict[str, Any], words: Words) -> str:
    """The machine, a table for each part, and what was left out."""
    comma, semicolon = words.between
    machine = comma.join(f"{name} {value}" for name, value in found["machine"].items())
    sections = [words.machine.format(machine)]
    for part, rows in found["parts"].items():
        if rows:
            sections.append(f"**{TITLES[part][words.title]}**\n\n{table(rows, words)}")
    if found["left_out"]:
        sections.append(words.left_out.format(semicolon.join(found["left_out"])))
    return "\n\n".join(sections)


def table(rows: list[dict[str, Any]], words: Words = ENGLISH) -> str:
    """Rows of equal keys as a table; the first column is text."""
    names = list(rows[0])
    head = " | ".join(words.what if name == "what" else name for name in names)
    rule = " | ".join("---" if number == 0 else "---:" for number in range(len(names)))
    lines = [" | ".join(shown(row[name]) for name in names) for row in rows]
    return "\n".join(f"| {line} |" for line in (head, rule, *lines))


def shown(value: Any) -> str:
    """Three digits of a number, everything of a whole one."""
    if value is None:
        return "—"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def put(page: Path, block: str, *, kind: str) -> None:
    """Replaces what stands between the marks of `kind` in the page; raises DataError when it has none."""
    begin, end = f"<!-- {kind}: begin -->", f"<!-- {kind}: end -->"
    text = page.read_text(encoding="utf-8")
    parts = re.split(f"({re.escape(begin)}|{re.escape(end)})", text)
    if parts[1::2] != [begin, end]:
        raise DataError(f"expected one {begin} and one {end} after it", at=page)
    with atomic_write(page) as stream:
        stream.write(f"{parts[0]}{begin}\n{block}\n{end}{parts[4]}")


def draw(path: Path, found: dict[str, Any]) -> None:
    """The steps as bars, in pairs a second; nothing without matplotlib or without steps."""
    rows = found["parts"].get("step", [])
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    if not rows:
        return
    figure = Figure(figsize=(7, 0.5 + 0.35 * len(rows)), layout="constrained")
    axes = figure.subplots()
    labels = [f"{row['what']}, {row['pairs']}" for row in rows]
    bars = axes.barh(labels, [row["pairs/s"] for row in rows])
    axes.bar_label(bars, fmt="%.0f")
    axes.invert_yaxis()
    axes.set_xlabel("pairs/s")
    figure.savefig(path)

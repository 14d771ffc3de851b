"""What `growth.py` measured, as two pictures and a section of the page of benchmarks."""

# ruff: noqa: E501 - lines of the page

import math
from pathlib import Path
from typing import Any, Literal

import page

# Less memory than this is what the allocator happens to hold.
LEAST_MEGABYTES = 1.0

# Chinese name, and why a curve is steeper than linear, where it is.
NAMES = {
    "a picture, by the tower's operations": "一张图片，按视觉塔的运算量",
    "a batch of pictures": "一批图片",
    "a batch of texts": "一批文本",
    "16 texts of a length": "16 条一样长的文本",
    "tokenizing 16 texts": "16 条文本的分词",
    "a JPEG, decoded and resized": "一张 JPEG 的解码和缩放",
    "building an index": "建索引",
    "opening it": "打开索引",
    "its first id": "第一次按 id 查",
    "its first condition": "第一次按条件检索",
    "an exact search": "一次精确检索",
    "a search that a condition narrows": "一次带条件的检索",
    "adding one item": "加入一项",
    "removing one item": "删除一项",
    "top 10 of N among N": "N 个查询在 N 行里各取前 10",
    "a request, among so many clients": "这么多客户端时的一个请求",
    "a request of so many texts": "含这么多条文本的一个请求",
    "packing a dataset": "打包数据集",
    "checking a dataset": "检查数据集",
    "starting training, and one step": "启动训练并走一步",
}
AXES = {
    "millions of multiplications": "百万次乘法",
    "pictures or texts": "图片或文本",
    "tokens": "token",
    "pixels": "像素",
    "rows": "行",
    "rows and queries": "行和查询",
    "clients": "客户端",
    "texts": "文本",
    "pairs": "图文对",
}
REASONS = {
    "top 10 of N among N": ("every query is compared with every row", "每个查询都要与每一行比较"),
    "16 texts of a length": (
        "attention compares every token with every other; below 100 tokens the rest of the tower outweighs it",
        "注意力让每个 token 与其余每个比较；不到一百个 token 时，塔的其余部分占多数",
    ),
}
COLOURS = {"seconds": "#1f6fb4", "megabytes": "#e08e1b"}


def draw(found: dict[str, Any], folder: Path) -> None:
    """Writes growth-cpu.png and growth-memory.png: a small panel a curve, both axes logarithmic."""
    for name, column, exponent, unit, least in (
        ("cpu", 1, "exponent", "CPU seconds", 0.0),
        ("memory", 2, "memory_exponent", "MB beyond the start", LEAST_MEGABYTES),
    ):
        curves = {
            title: {**curve, "points": [point for point in curve["points"] if (point[column] or 0) > least]}
            for title, curve in found["curves"].items()
        }
        shown = {title: curve for title, curve in curves.items() if len(curve["points"]) > 1}
        _picture(shown, column, exponent, unit, folder / f"growth-{name}.png")


def _picture(curves: dict[str, Any], column: int, exponent: str, unit: str, path: Path) -> None:
    from matplotlib.figure import Figure

    across = 4
    down = -(-len(curves) // across)
    figure = Figure(figsize=(4 * across, 2.9 * down), facecolor="white", layout="constrained")
    panels = figure.subplots(down, across, squeeze=False).ravel()
    for panel, (title, curve) in zip(panels, curves.items(), strict=False):
        points = [(point[0], point[column]) for point in curve["points"]]
        xs, ys = zip(*points, strict=True)
        colour = COLOURS["seconds" if column == 1 else "megabytes"]
        slope = curve[exponent]
        if slope is not None:  # through the middle of the points that it was fitted to
            fitted = points[-max(3, len(points) // 2) :]
            middle = [sum(math.log(one[axis]) for one in fitted) / len(fitted) for axis in (0, 1)]
            panel.plot(xs, [math.exp(middle[1] + slope * (math.log(x) - middle[0])) for x in xs], "--", color="#b0b5bd")
        panel.plot(xs, ys, "o-", color=colour, markersize=5)
        panel.set(xscale="log", yscale="log", xlabel=curve["axis"])
        panel.set_title(title, fontsize=11, loc="left")
        low, high = min(ys), max(ys)
        if high / low < 30:  # a flat curve looks flat
            centre = math.sqrt(low * high)
            panel.set_ylim(centre / 6, centre * 6)
        if slope is not None:
            panel.text(
                0.04, 0.95, f"exponent {slope:.2f}", transform=panel.transAxes, va="top", fontsize=10, color="#444b57"
            )
        panel.grid(color="#e6e8ec", linewidth=0.8, which="major")
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=9)
        panel.minorticks_off()
    for panel in panels[len(curves) :]:
        panel.set_visible(False)
    figure.supylabel(unit, fontsize=11)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=80)


def write(found: dict[str, Any], docs: Path) -> None:
    """Puts the section below what `side_by_side.py` writes of the pages of both languages."""
    paths: dict[Literal["zh", "en"], Path] = {"zh": docs / "benchmarks.md", "en": docs / "en" / "benchmarks.md"}
    for language, path in paths.items():
        text = path.read_text(encoding="utf-8").partition(page.KEPT)[0].rstrip("\n")
        path.write_text(f"{text}\n\n{page.KEPT}\n{section(found, language)}", encoding="utf-8")


def section(found: dict[str, Any], language: Literal["zh", "en"]) -> str:
    """The section of the page, with its heading."""
    facts, is_chinese = found["machine"], language == "zh"
    where = f"{facts['processor']}, {facts['cores']} cores, {facts['date'][:10]}"
    images = "images" if is_chinese else "../images"
    rows = []
    for name, curve in found["curves"].items():
        (first, *_), (last, *_) = curve["points"][0], curve["points"][-1]
        times = [_time(curve["points"][end][1]) for end in (0, -1)]
        memory = curve["points"][-1][2]
        reason = REASONS.get(name, ("", ""))[is_chinese]
        cells = (
            NAMES[name] if is_chinese else name,
            f"{_number(first)}–{_number(last)} {AXES[curve['axis']] if is_chinese else curve['axis']}",
            " → ".join(times),
            "—" if curve["exponent"] is None else f"{curve['exponent']:.2f}",
            "—" if (memory or 0) < LEAST_MEGABYTES else f"{memory:,.0f} MB",
            "—" if curve["memory_exponent"] is None else f"{curve['memory_exponent']:.2f}",
            reason,
        )
        rows.append(f"| {' | '.join(cells)} |")
    table = "\n".join(rows)
    if is_chinese:
        return f"""
## 增长

CPU 时间和内存怎样随模型、批、文本、图片、图库、客户端和数据集增长。指数是双对数坐标里后一半点的斜率：1 是线性，0 是不变。
每个点在单独的进程里测量；内存是超出工作开始前的最大值，命令和服务则是整个进程的。测于 {where}。

```bash
# 需要空闲的机器，约 15 分钟
python benchmarks/growth.py --output docs
```

![CPU 时间的增长，双对数坐标]({images}/growth-cpu.png)

![内存的增长，双对数坐标]({images}/growth-memory.png)

| 什么 | 范围 | CPU 时间 | 指数 | 最多的内存 | 指数 | 超过线性的原因 |
| --- | --- | --- | ---: | ---: | ---: | --- |
{table}
"""
    return f"""
## Growth

How CPU time and memory grow with the model, the batch, the text, the picture, the gallery, the clients and the dataset. The exponent is the
slope of the upper half of the points, both axes logarithmic: 1 is linear, 0 is constant. Every point was measured in a process of its own;
memory is the most beyond what the process held when the work began, for commands that of the whole process. Measured on {where}.

```bash
# needs an idle machine; about 15 minutes
python benchmarks/growth.py --output docs
```

![Growth of CPU time, both axes logarithmic]({images}/growth-cpu.png)

![Growth of memory, both axes logarithmic]({images}/growth-memory.png)

| What | Range | CPU time | Exponent | Most memory | Exponent | Why faster than linear |
| --- | --- | --- | ---: | ---: | ---: | --- |
{table}
"""


def _number(value: float) -> str:
    return f"{value:,.0f}"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:,.1f} s"
    return f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"

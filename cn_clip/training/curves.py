"""The picture of a run, `curves.png`, by matplotlib: loss, recall of both directions and learning rate over the steps.

Only `monitor` imports this module, when it draws.
"""

# N points

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from cn_clip.files import atomic_write

# Steps (N,) and values (N,) by KIND/NAME, as `monitor.all_points` gives them.
Series = Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]

TRAIN_COLOUR, VALID_COLOUR, CHANCE_COLOUR, RATE_COLOUR = "#1f6fb4", "#d1495b", "#8d99ae", "#2a9d8f"
# R@1 is what runs are chosen by: the darkest. The mean is dashed, because it is made of the others.
RECALL_LINES = {
    "r1": ("R@1", "#3d1a78", "-"),
    "r5": ("R@5", "#7b5ea7", "-"),
    "r10": ("R@10", "#b9a6d6", "-"),
    "mean_recall": ("mean", "#e08e1b", "--"),
}
DIRECTIONS = {"text_to_image": "text → image", "image_to_text": "image → text"}


def draw(series: Series, path: Path, *, title: str) -> None:
    """Writes the PNG as a whole or not at all; raises OSError as files do."""
    figure = Figure(figsize=(11, 9), facecolor="white")
    # Fixed, for finding these numbers anew would draw every picture twice.
    figure.subplots_adjust(left=0.055, right=0.985, top=0.92, bottom=0.055, hspace=0.42, wspace=0.11)
    fill(figure, series)
    # The font of matplotlib has no Chinese characters, and a "$" would begin a formula.
    shown = title if title.isascii() else ""
    figure.suptitle(shown, x=0.01, ha="left", fontsize=13, fontweight="bold", parse_math=False)
    with atomic_write(path, "wb") as stream:
        figure.savefig(stream, format="png", dpi=110)


def fill(figure: Figure, series: Series) -> None:
    """Draws the four panels: the loss, the recall of both directions, the learning rate; all over the same steps."""
    panels = figure.subplot_mosaic("LL;TI;RR", height_ratios=[3, 2.6, 1.1])
    last = max([1.0, *(float(series[name][0][-1]) for name in ("train/loss", "valid/loss") if _has(series, name))])
    for panel in panels.values():
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(color="#e6e8ec", linewidth=0.8)
        panel.set_axisbelow(True)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    loss, rate = panels["L"], panels["R"]
    _line(loss, series, "train/loss", color=TRAIN_COLOUR, alpha=0.25, linewidth=0.8)
    _line(loss, series, "train/loss smoothed", color=TRAIN_COLOUR, linewidth=1.8, label="train, smoothed")
    _line(loss, series, "valid/loss", color=VALID_COLOUR, marker="o", label="valid")
    label = "ln(batch): guessing"
    _line(loss, series, "train/chance_loss", color=CHANCE_COLOUR, linestyle="--", linewidth=1.2, label=label)
    loss.set(title="loss (nats, inside batches)", ylim=(0, None))
    _legend(loss)
    _draw_recall(panels["T"], series, "text_to_image")
    _draw_recall(panels["I"], series, "image_to_text")
    _line(rate, series, "train/lr", color=RATE_COLOUR)
    rate.set(title="learning rate", xlabel="step", ylim=(0, None))
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for panel in panels.values():
        panel.set_xlim(-0.01 * last, 1.01 * last)


def _has(series: Series, name: str) -> bool:
    return name in series and len(series[name][0]) > 0


def _line(panel: Axes, series: Series, name: str, *, factor: float = 1.0, **style: Any) -> None:
    """A line through the points, or a dot where there is only one."""
    if _has(series, name):
        steps_N, values_N = series[name]
        style = {"marker": "o" if len(steps_N) == 1 else "", "markersize": 4, **style}
        panel.plot(steps_N, factor * values_N, **style)


def _draw_recall(panel: Axes, series: Series, way: str) -> None:
    last, highest = [], 0.0
    for name, (label, colour, style) in RECALL_LINES.items():
        key = f"valid/{way}_{name}"
        if _has(series, key):
            values_N = 100 * series[key][1]
            last.append(f"{label} {values_N[-1]:.1f}")
            highest = max(highest, float(np.nanmax(values_N)))
        _line(panel, series, key, factor=100, color=colour, linestyle=style, marker="o", markersize=3, label=label)
    # Both directions on one scale from 0 would be fairer to compare, but a low recall must be seen to rise.
    panel.set(title=f"recall {DIRECTIONS[way]} (%, whole validation set)", ylim=(0, min(102, max(10, 1.15 * highest))))
    if last:
        panel.set_xlabel("last: " + " · ".join(last), fontsize=9, color="#4a4f5a")
    else:
        panel.text(0.5, 0.5, "no validation yet", transform=panel.transAxes, ha="center", color=CHANCE_COLOUR)
    _legend(panel)


def _legend(panel: Axes) -> None:
    if panel.get_legend_handles_labels()[1]:
        panel.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none", fontsize=9)

"""The picture of a run, `curves.png`: loss, recall of both directions and learning rate over the steps."""

# N points

from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cn_clip.extras import require
from cn_clip.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = tuple[NDArray[np.float64], NDArray[np.float64]]

TRAIN_COLOUR, VALID_COLOUR, CHANCE_COLOUR, RATE_COLOUR = "#1f6fb4", "#d1495b", "#8d99ae", "#2a9d8f"
# R@1 is what runs are chosen by: the darkest. The mean is dashed, because it is made of the others.
RECALL_LINES = {
    "r1": ("R@1", "#3d1a78", "-"),
    "r5": ("R@5", "#7b5ea7", "-"),
    "r10": ("R@10", "#b9a6d6", "-"),
    "mean_recall": ("mean", "#e08e1b", "--"),
}
DIRECTIONS = {"text_to_image": "text → image", "image_to_text": "image → text"}


class History:
    """The values of a run that are drawn, by kind ("train", "valid") and name. The last value of a step counts."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)

    def add(self, kind: str, step: int, values: Mapping[str, float | None]) -> None:
        """Takes the values of one step; None and names that no panel shows are left out."""
        for name, value in values.items():
            if name in _DRAWN and value is not None:
                self._values[kind, name][step] = value

    def points(self, kind: str, name: str) -> Points:
        """Steps (N,) in order and values (N,); empty where nothing was added."""
        items = sorted(self._values.get((kind, name), {}).items())
        steps, values = zip(*items, strict=True) if items else ((), ())
        return np.array(steps, dtype=np.float64), np.array(values, dtype=np.float64)


_DRAWN = {"loss", "chance_loss", "lr"} | {f"{way}_{name}" for way in DIRECTIONS for name in RECALL_LINES}


def smoothed(values_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean over a window around each point, about a fortieth of all (9 at least); shorter at both ends."""
    half = max(4, len(values_N) // 80)
    sums = np.concatenate([[0.0], np.cumsum(values_N)])
    index = np.arange(len(values_N))
    start, end = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values_N))
    means: NDArray[np.float64] = (sums[end] - sums[start]) / (end - start)
    return means


def draw(history: History, path: Path, *, title: str) -> None:
    """Writes the PNG as a whole or not at all; raises MissingExtraError without matplotlib, OSError as files do."""
    require("matplotlib", extra="plot", purpose="the plot of loss and recall")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 9), facecolor="white")
    # Fixed, for finding these numbers anew would draw every picture twice.
    figure.subplots_adjust(left=0.055, right=0.985, top=0.92, bottom=0.055, hspace=0.42, wspace=0.11)
    _fill(figure, history)
    # The font of matplotlib has no Chinese characters, and a "$" would begin a formula.
    shown = title if title.isascii() else ""
    figure.suptitle(shown, x=0.01, ha="left", fontsize=13, fontweight="bold", parse_math=False)
    with atomic_write(path, "wb") as stream:
        figure.savefig(stream, format="png", dpi=110)


def _fill(figure: "Figure", history: History) -> None:
    panels = figure.subplot_mosaic("LL;TI;RR", height_ratios=[3, 2.6, 1.1])
    for panel in panels.values():
        _plain(panel)
    _draw_loss(panels["L"], history)
    _draw_recall(panels["T"], history, "text_to_image")
    _draw_recall(panels["I"], history, "image_to_text")
    _line(panels["R"], history.points("train", "lr"), color=RATE_COLOUR)
    panels["R"].set(title="learning rate", xlabel="step", ylim=(0, None))
    panels["R"].ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    _share_steps(panels.values(), history)


def _plain(panel: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator

    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#e6e8ec", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))


def _line(panel: "Axes", points: Points, **style: Any) -> None:
    """A line through the points, or a dot where there is only one."""
    if len(points[0]):
        panel.plot(*points, **{"marker": "o" if len(points[0]) == 1 else "", "markersize": 4, **style})


def _draw_loss(panel: "Axes", history: History) -> None:
    steps, losses = history.points("train", "loss")
    _line(panel, (steps, losses), color=TRAIN_COLOUR, alpha=0.25, linewidth=0.8)
    _line(panel, (steps, smoothed(losses)), color=TRAIN_COLOUR, linewidth=1.8, label="train, smoothed")
    _line(panel, history.points("valid", "loss"), color=VALID_COLOUR, marker="o", label="valid")
    chance = history.points("train", "chance_loss")
    _line(panel, chance, color=CHANCE_COLOUR, linestyle="--", linewidth=1.2, label="ln(batch): guessing")
    panel.set(title="loss (nats, inside batches)", ylim=(0, None))
    _legend(panel)


def _draw_recall(panel: "Axes", history: History, way: str) -> None:
    last, highest = [], 0.0
    for name, (label, colour, style) in RECALL_LINES.items():
        steps, values = history.points("valid", f"{way}_{name}")
        if len(values):
            last.append(f"{label} {100 * values[-1]:.1f}")
            highest = max(highest, 100 * float(np.nanmax(values)))
        _line(panel, (steps, 100 * values), color=colour, linestyle=style, marker="o", markersize=3, label=label)
    # Both directions on one scale from 0 would be fairer to compare, but a low recall must be seen to rise.
    panel.set(title=f"recall {DIRECTIONS[way]} (%, whole validation set)", ylim=(0, min(102, max(10, 1.15 * highest))))
    if last:
        panel.set_xlabel("last: " + " · ".join(last), fontsize=9, color="#4a4f5a")
    else:
        panel.text(0.5, 0.5, "no validation yet", transform=panel.transAxes, ha="center", color=CHANCE_COLOUR)
    _legend(panel)


def _legend(panel: "Axes") -> None:
    if panel.get_legend_handles_labels()[1]:
        panel.legend(loc="best", frameon=True, framealpha=0.85, edgecolor="none", fontsize=9)


def _share_steps(panels: Iterable["Axes"], history: History) -> None:
    ends = (history.points(kind, "loss")[0][-1:] for kind in ("train", "valid"))
    last = max([1.0, *(float(step) for end in ends for step in end)])
    for panel in panels:
        panel.set_xlim(-0.01 * last, 1.01 * last)

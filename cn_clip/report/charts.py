"""Curves and the confusion matrix as inline SVG; their colours are those of the page's style sheet."""

# N points, C classes

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cn_clip.report.markup import Markup, element, joined, number, shortened
from cn_clip.training.curves import Points

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 14, 12, 34
MOST_POINTS = 600
# Cells with their counts written in them, and the classes that a matrix shows at most.
MOST_WRITTEN, MOST_CLASSES = 12, 40
# Characters of a class beside its row, and in what a cell says: 1,600 cells say two classes each.
LABEL_LENGTH, TITLE_LENGTH = 8, 40


@dataclass(frozen=True)
class Line:
    """One curve. style: a class of the style sheet; shown in the legend with its last value, if it has a name."""

    name: str
    points: Points
    style: str
    marked: bool = False


def line_chart(title: Markup, lines: Sequence[Line], *, form: Callable[[float], str], from_zero: bool = False) -> str:
    """A figure of the lines that have points, over the steps; empty where none has any.

    form: writes values of the axis and the legend.
    """
    drawn = [line for line in lines if len(line.points[0])]
    if not drawn:
        return Markup("")
    steps = np.concatenate([line.points[0] for line in drawn])
    values = np.concatenate([line.points[1] for line in drawn])
    x_axis = ticks(0.0, max(1.0, float(steps.max())), count=5, whole=True)
    y_axis = ticks(0.0 if from_zero else float(values.min()), float(values.max()), count=5)
    frame = _Frame(0.0, max(1.0, float(steps.max())), y_axis[0], y_axis[-1])
    marks = [
        *(_grid_line(frame, value, form(value)) for value in y_axis),
        *(_step_tick(frame, step) for step in x_axis if step <= frame.x_high),
        element("text", "步 step", class_="tick", x=WIDTH - RIGHT, y=HEIGHT - 2, text_anchor="end"),
        *(_curve(frame, line) for line in drawn),
    ]
    said = "; ".join(f"{line.name}: {form(line.points[1][0])} → {form(line.points[1][-1])}" for line in drawn)
    picture = _svg(WIDTH, HEIGHT, said, marks)
    return element("figure", element("figcaption", title, _legend(drawn, form)), picture, class_="chart")


def ticks(low: float, high: float, *, count: int, whole: bool = False) -> list[float]:
    """Round values, about `count` of them, evenly apart, the first at most `low` and the last at least `high`."""
    size = max(abs(low), abs(high))
    span = high - low if high - low > 1e-9 * size + 1e-30 else 0.1 * max(size, 1.0)
    rough = span / max(count - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    factors = (1, 2, 5, 10) if whole else (1, 2, 2.5, 5, 10)
    step = next(factor * power for factor in factors if factor * power >= rough * 0.999)
    step = max(1.0, step) if whole else step
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [place * step for place in range(first, max(last, first + 1) + 1)]


def thinned(points: Points, *, most: int = MOST_POINTS) -> Points:
    """At most `most` of the points, the lowest and the highest of each stretch, so that no peak is lost."""
    steps_N, values_N = points
    if len(steps_N) <= most:
        return points
    kept: list[int] = []
    for stretch in np.array_split(np.arange(len(steps_N)), most // 2):
        ends = {int(stretch[values_N[stretch].argmin()]), int(stretch[values_N[stretch].argmax()])}
        kept += sorted(ends)
    return steps_N[kept], values_N[kept]


@dataclass(frozen=True)
class _Frame:
    x_low: float
    x_high: float
    y_low: float
    y_high: float

    def x(self, step: float) -> float:
        return LEFT + (step - self.x_low) / (self.x_high - self.x_low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (value - self.y_low) / (self.y_high - self.y_low) * (HEIGHT - TOP - BOTTOM)


def _svg(width: float, height: float, said: str, marks: Sequence[str]) -> Markup:
    return element("svg", *marks, viewBox=f"0 0 {number(width)} {number(height)}", role="img", aria_label=said)


def _grid_line(frame: _Frame, value: float, text: str) -> Markup:
    y = frame.y(value)
    line = element("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=y, y2=y)
    return joined([line, element("text", text, class_="tick", x=LEFT - 7, y=y + 4.5, text_anchor="end")])


def _step_tick(frame: _Frame, step: float) -> Markup:
    x = frame.x(step)
    anchor = "start" if step == 0 else "end" if x > WIDTH - RIGHT - 16 else "middle"
    text = element("text", f"{step:,.0f}", class_="tick", x=x, y=HEIGHT - BOTTOM + 17, text_anchor=anchor)
    return joined([element("line", class_="axis", x1=x, x2=x, y1=HEIGHT - BOTTOM, y2=HEIGHT - BOTTOM + 4), text])


def _curve(frame: _Frame, line: Line) -> Markup:
    steps_N, values_N = thinned(line.points)
    places = [(frame.x(step), frame.y(value)) for step, value in zip(steps_N, values_N, strict=True)]
    path = " ".join(f"{number(x)},{number(y)}" for x, y in places)
    marks = [element("polyline", class_=f"line {line.style}", points=path)]
    if (line.marked and len(places) <= 60) or len(places) == 1:
        marks += [element("circle", class_=f"dot {line.style}", cx=x, cy=y, r=3) for x, y in places]
    return joined(marks)


def _legend(lines: Sequence[Line], form: Callable[[float], str]) -> Markup:
    return element("span", *(_legend_entry(line, form) for line in lines if line.name), class_="legend")


def _legend_entry(line: Line, form: Callable[[float], str]) -> Markup:
    last = element("b", form(line.points[1][-1]))
    return element("span", element("i", class_=f"key {line.style}"), f"{line.name} ", last)


def confusion_chart(
    labels: Sequence[str], counts_CC: NDArray[np.int64], totals_C: NDArray[np.int64], said: str
) -> Markup:
    """The matrix as a drawing: a row for each class, a column for what it was taken for; darker is a larger share.

    labels: of the classes shown, at most MOST_CLASSES. totals_C: the pictures of each class, also those taken for
    classes that are not shown.
    """
    size = len(labels)
    cell = max(14.0, min(44.0, 560.0 / max(size, 1)))
    margin = 20 + 13.0 * max((min(len(label), LABEL_LENGTH) for label in labels), default=1)
    side = margin + size * cell + 4
    titles = [shortened(label, TITLE_LENGTH) for label in labels]
    marks = [element("rect", class_="paper", x=margin, y=margin, width=size * cell, height=size * cell)]
    for row, column in np.argwhere(counts_CC):
        count = int(counts_CC[row, column])
        x, y = margin + column * cell, margin + row * cell
        kind = "right" if row == column else "wrong"
        share = count / max(int(totals_C[row]), 1)
        words = element("title", f"{titles[row]} → {titles[column]}: {count} / {totals_C[row]}")
        box = {"x": x + 0.5, "y": y + 0.5, "width": cell - 1, "height": cell - 1}
        marks.append(element("rect", words, class_=kind, fill_opacity=0.12 + 0.88 * share, **box))
        if size <= MOST_WRITTEN:
            style = "count over" if share > 0.5 else "count"
            marks.append(element("text", str(count), class_=style, x=x + cell / 2, y=y + cell / 2 + 4))
    for index, label in enumerate(labels):
        middle = margin + (index + 0.5) * cell
        shown = shortened(label, LABEL_LENGTH)
        marks.append(element("text", shown, class_="name", x=margin - 6, y=middle + 4, text_anchor="end"))
        turn = f"translate({number(middle + 4)} {number(margin - 6)}) rotate(-90)"
        marks.append(element("text", shown, class_="name", transform=turn))
    # On a narrow screen it is scrolled rather than made too small to read.
    style = f"max-width:{number(side)}px;min-width:{number(min(side, 520))}px"
    return element("div", element("div", _svg(side, side, said, marks), style=style), class_="matrix")

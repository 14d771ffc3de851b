"""The report as one HTML file: what was read and computed goes in, the templates in `templates/` say it.

Nothing in the page is fetched from anywhere, and nothing runs.
"""

# N points, C classes

import base64
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from cn_clip import __version__
from cn_clip.clip.pictures import open_picture
from cn_clip.clip.transforms import in_8_bits
from cn_clip.data.pictures import load_picture
from cn_clip.language import both
from cn_clip.report.run_folder import DIRECTIONS, Run, is_finite, mean_recall
from cn_clip.training.monitor import Points, smoothed

if TYPE_CHECKING:
    from cn_clip.report.findings import Confusion, PairView, Retrieval

Part: TypeAlias = Mapping[str, Any]

TEMPLATES = Path(__file__).parent / "templates"
# What HTML forbids, and lone surrogates, which UTF-8 cannot hold.
_NO_TEXT = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
MOST_POINTS, MOST_CLASSES = 600, 40
# Bytes of JPEG: 24 queries of 10 pictures and their own, 12 mistakes and 12 pairs stay below 3 MB as base64.
LARGEST_SIDE, VIEW_BYTES = 224, 16_000
HIT_SIDE, HIT_BYTES = 144, 6_000
QUALITIES = (82, 68, 50)
RECALL_LINES = {"r1": ("R@1", "violet"), "r5": ("R@5", "lilac"), "r10": ("R@10", "blue")}
RECALL_LINES |= {"mean_recall": ("MR", "amber dashed")}
ACCURACY_LINES = {
    "text_to_image": ("以文搜图", "text → image", "violet"),
    "image_to_text": ("以图搜文", "image → text", "amber"),
}
# Dark blue over green to yellow: brightness alone tells the order, in grey print too.
_COLOURS = np.array([(68, 1, 84), (59, 82, 139), (33, 145, 140), (94, 201, 98), (253, 231, 37)], dtype=np.float32)
OPACITY = 0.62


def page(title: str, subtitle: str, parts: Mapping[str, Part]) -> str:
    """The whole document. parts: what the `…_part` functions give, by the names of their templates."""
    template = environment().get_template("page.html")
    return template.render(title=title, subtitle=subtitle, parts=parts, version=__version__)


@functools.cache
def environment(*folders: Path) -> Environment:
    """What fills in the templates, those of `folders` too: texts are escaped, what HTML forbids becomes U+FFFD.

    `both` gives a template's words in the reader's language.

    Floats are rounded to two decimals, as positions in drawings are; whatever is shown of them is a text.
    """
    made = Environment(
        loader=FileSystemLoader([TEMPLATES, *folders], encoding="utf-8"),
        autoescape=True,
        finalize=_shown,
        keep_trailing_newline=True,
        lstrip_blocks=True,
        trim_blocks=True,
        undefined=StrictUndefined,
    )
    made.filters |= {"percent": percent, "duration": duration}
    made.globals["both"] = both
    return made


def _shown(value: object) -> object:
    if isinstance(value, (float, np.floating)):
        return number(float(value))
    return _NO_TEXT.sub("\ufffd", value) if isinstance(value, str) and not isinstance(value, Markup) else value


def number(value: float) -> str:
    """At most two decimals, none where they are zero: for positions in drawings."""
    return f"{value:.2f}".rstrip("0").rstrip(".")


def percent(share: float) -> str:
    """A share in percent, with as many decimals as tell something."""
    value = share * 100
    return f"{value:.0f} %" if value >= 99.95 or value == 0 else f"{value:.1f} %" if value >= 10 else f"{value:.2f} %"


def duration(seconds: float) -> str:
    """`1 h 02 min`, `3 min 05 s` or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes_left:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


# --- curves


class Line(NamedTuple):
    """One curve. style: a class of the style sheet; shown in the legend with its last value, if it has a name."""

    name: str
    points: Points
    style: str
    marked: bool = False


@dataclass(frozen=True)
class Chart:
    """Curves over the steps, in the positions of a drawing.

    said: what it shows, for those who do not see it. y_ticks: (y, value); x_ticks: (x, step, anchor of the text).
    curves: (style, positions as SVG has them, positions with a dot). legend: (style, name, last value).
    """

    WIDTH: ClassVar[int] = 480
    HEIGHT: ClassVar[int] = 250
    LEFT: ClassVar[int] = 54
    RIGHT: ClassVar[int] = 14
    TOP: ClassVar[int] = 12
    BOTTOM: ClassVar[int] = 34

    said: str
    y_ticks: list[tuple[float, str]]
    x_ticks: list[tuple[float, str, str]]
    curves: list[tuple[str, str, list[tuple[float, float]]]]
    legend: list[tuple[str, str, str]]


def line_chart(lines: Sequence[Line], *, form: Callable[[float], str], from_zero: bool = False) -> Chart | None:
    """The lines that have points; None where none has any. form: writes values of the axis and the legend."""
    drawn = [line for line in lines if len(line.points[0])]
    if not drawn:
        return None
    values = np.concatenate([line.points[1] for line in drawn])
    last_step = max(1.0, *(float(line.points[0].max()) for line in drawn))
    y_axis = ticks(0.0 if from_zero else float(values.min()), float(values.max()), count=5)

    def x(step: float) -> float:
        return Chart.LEFT + step / last_step * (Chart.WIDTH - Chart.LEFT - Chart.RIGHT)

    def y(value: float) -> float:
        share = (value - y_axis[0]) / (y_axis[-1] - y_axis[0])
        return Chart.HEIGHT - Chart.BOTTOM - share * (Chart.HEIGHT - Chart.TOP - Chart.BOTTOM)

    x_ticks = []
    for step in ticks(0.0, last_step, count=5, whole=True):
        anchor = "start" if step == 0 else "end" if x(step) > Chart.WIDTH - Chart.RIGHT - 16 else "middle"
        if step <= last_step:
            x_ticks.append((x(step), f"{step:,.0f}", anchor))
    curves = []
    for line in drawn:
        positions = [(x(step), y(value)) for step, value in zip(*thinned(line.points), strict=True)]
        is_dotted = (line.marked and len(positions) <= 60) or len(positions) == 1
        path = " ".join(f"{number(left)},{number(top)}" for left, top in positions)
        curves.append((line.style, path, positions if is_dotted else []))
    return Chart(
        said="; ".join(f"{line.name}: {form(line.points[1][0])} → {form(line.points[1][-1])}" for line in drawn),
        y_ticks=[(y(value), form(value)) for value in y_axis],
        x_ticks=x_ticks,
        curves=curves,
        legend=[(line.style, line.name, form(line.points[1][-1])) for line in drawn if line.name],
    )


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
    return [multiple * step for multiple in range(first, max(last, first + 1) + 1)]


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


# --- the parts


def run_part(run: Run) -> Part:
    """How a run went."""
    losses, speeds = run.points("train", "loss"), run.points("train", "samples_per_second")
    memory = run.points("train", "peak_memory_gib")[1]
    chance = run.points("train", "chance_loss")
    charts = {
        "loss": line_chart(
            [
                Line("", losses, "raw"),
                Line(both("训练（平滑）", "train, smoothed"), (losses[0], smoothed(losses[1])), "blue"),
                Line(both("验证", "valid"), run.points("valid", "loss"), "red", marked=True),
                Line(both("随机猜", "chance"), chance, "chance"),
            ],
            form=_significant,
        ),
        "accuracy": line_chart(
            [
                Line(both(chinese, english), run.points("valid", f"{way}_acc", factor=100), style, marked=True)
                for way, (chinese, english, style) in ACCURACY_LINES.items()
            ],
            form=_significant,
            from_zero=True,
        ),
        "rate": line_chart([Line("", run.points("train", "lr"), "green")], form=_rate, from_zero=True),
        "speed": line_chart([Line("", speeds, "amber")], form=lambda value: f"{value:,.4g}", from_zero=True),
    }
    for way in DIRECTIONS:
        lines = [
            Line(name, run.points("valid", f"{way}_{key}", factor=100), style, marked=True)
            for key, (name, style) in RECALL_LINES.items()
        ]
        charts[way] = line_chart(lines, form=_significant, from_zero=True)
    columns = [f"{way}_{name}" for way in DIRECTIONS for name in RECALL_LINES]
    validations = [
        (record["step"], [value if is_finite(value := record.get(name)) else None for name in columns])
        for record in run.validations()
        if mean_recall(record) is not None
    ]
    return {
        "run": run,
        "best": run.best(),
        "last_loss": losses[1][-1] if len(losses[1]) else None,
        "speed": np.median(speeds[1]) if len(speeds[1]) else None,
        "memory": memory.max() if len(memory) else None,
        "charts": charts,
        "validations": validations,
    }


def _significant(value: float) -> str:
    return f"{value:.4g}"


def _rate(value: float) -> str:
    if not value:
        return "0"
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def retrieval_part(retrieval: "Retrieval") -> Part:
    """Recall of a split, and queries with small copies of their pictures."""
    shown = {
        hit.image
        for query in (*retrieval.best, *retrieval.median, *retrieval.worst)
        for hit in (*query.hits, query.right)
    }
    pictures = {}
    for index in sorted(shown):
        stored = retrieval.pictures[index]
        small = load_picture(
            stored.data, stored.where, lambda image: thumbnail(image, side=HIT_SIDE, num_bytes=HIT_BYTES)
        )
        pictures[index] = (stored.key, small)
    return {"retrieval": retrieval, "median_rank": float(np.median(retrieval.ranks_M)), "pictures": pictures}


@dataclass(frozen=True)
class Matrix:
    """A row for each class, a column for what it was taken for; darker is a larger share.

    cells: (row, column, count, pictures of the row's class, also those taken for classes that are not shown).
    """

    # Cells with their counts written in them; characters of a class beside its row.
    MOST_WRITTEN: ClassVar[int] = 12
    LABEL_LENGTH: ClassVar[int] = 8

    labels: Sequence[str]
    cells: list[tuple[int, int, int, int]]

    @property
    def is_written(self) -> bool:
        """Whether there is room for the counts in the cells."""
        return len(self.labels) <= self.MOST_WRITTEN

    @property
    def cell(self) -> float:
        """The side of a cell."""
        return max(14.0, min(44.0, 560.0 / max(len(self.labels), 1)))

    @property
    def margin(self) -> float:
        """What the labels take, to the left and above."""
        return 20 + 13.0 * max((min(len(label), self.LABEL_LENGTH) for label in self.labels), default=1)

    @property
    def side(self) -> float:
        """The side of the whole."""
        return self.margin + len(self.labels) * self.cell + 4


def zeroshot_part(confusion: "Confusion") -> Part:
    """Accuracy, what is confused with what, and one picture of each of the most frequent mistakes."""
    totals_C = confusion.counts_CC.sum(axis=1).tolist()
    chosen = most_confused(confusion.counts_CC, MOST_CLASSES)
    counts_CC = confusion.counts_CC[np.ix_(chosen, chosen)]
    cells = [
        (row, column, int(counts_CC[row, column]), totals_C[chosen[row]])
        for row, column in np.argwhere(counts_CC).tolist()
    ]
    mistakes = [
        (
            one,
            totals_C[one.true],
            thumbnail(open_picture(Path(one.sample), name=one.sample), side=HIT_SIDE, num_bytes=HIT_BYTES),
        )
        for one in confusion.mistakes
    ]
    tested = [
        (label, share)
        for label, share in zip(confusion.labels, confusion.accuracy.per_class, strict=True)
        if share is not None
    ]
    return {
        "confusion": confusion,
        "matrix": Matrix([confusion.labels[index] for index in chosen], cells),
        "mistakes": mistakes,
        "tested": sorted(tested, key=lambda one: one[1]),
    }


def most_confused(counts_CC: NDArray[np.int64], most: int) -> list[int]:
    """At most `most` classes in their order: those with the most mistakes, made or suffered, where there are more."""
    if len(counts_CC) <= most:
        return list(range(len(counts_CC)))
    wrong_CC = counts_CC * ~np.eye(len(counts_CC), dtype=bool)
    mistakes_C = wrong_CC.sum(axis=0) + wrong_CC.sum(axis=1)
    return sorted(np.argsort(-mistakes_C, kind="stable")[:most].tolist())


def pairs_part(views: "Sequence[PairView]") -> Part:
    """Pairs of picture and text: the picture, and the map of its regions laid over it."""
    found = []
    for view in views:
        small = flattened(view.image)
        small.thumbnail((LARGEST_SIDE, LARGEST_SIDE), Image.Resampling.LANCZOS)
        shown = (small, overlaid(small, view.map_HW))
        found.append((view, *(thumbnail(one, side=LARGEST_SIDE, num_bytes=VIEW_BYTES) for one in shown)))
    return {"views": found}


# --- pictures


class Thumbnail(NamedTuple):
    """A small JPEG as a data URI, and its size in pixels."""

    uri: str
    width: int
    height: int


def thumbnail(image: Image.Image, *, side: int, num_bytes: int) -> Thumbnail:
    """At most `side` pixels a side and `num_bytes` of JPEG, never larger than the picture."""
    shown = flattened(image)
    shown.thumbnail((side, side), Image.Resampling.LANCZOS)
    uri = f"data:image/jpeg;base64,{base64.b64encode(_jpeg(shown, num_bytes)).decode('ascii')}"
    return Thumbnail(uri, shown.width, shown.height)


def _jpeg(image: Image.Image, num_bytes: int) -> bytes:
    """Coarser, then smaller, until it fits."""
    while True:
        for quality in QUALITIES:
            stream = BytesIO()
            image.save(stream, format="JPEG", quality=quality, optimize=True)
            if stream.tell() <= num_bytes:
                return stream.getvalue()
        if max(image.size) <= 16:
            return stream.getvalue()
        image = image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.LANCZOS)


def flattened(image: Image.Image) -> Image.Image:
    """The picture in RGB, on white where it is transparent; not turned by EXIF, as models see it."""
    image = in_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        drawing = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", drawing.size, "white"), drawing).convert("RGB")
    return image.convert("RGB")


def overlaid(image: Image.Image, map_HW: NDArray[np.float32]) -> Image.Image:
    """The picture in grey under the map in colours, lowest value dark, highest bright; RGB, in the picture's size.

    Each region is one tile: a smooth map would promise more than there is.
    """
    low, high = float(map_HW.min()), float(map_HW.max())
    shares_HW = (map_HW - low) / (high - low) if high > low else np.zeros_like(map_HW)
    whole = Image.fromarray(shares_HW.astype(np.float32)).resize(image.size, Image.Resampling.NEAREST)
    region = np.clip(np.asarray(whole), 0.0, 1.0) * (len(_COLOURS) - 1)
    stops = np.arange(len(_COLOURS))
    channels = [np.interp(region, stops, _COLOURS[:, channel]) for channel in range(3)]
    colours = Image.fromarray(np.stack(channels, axis=-1).round().astype(np.uint8))
    return Image.blend(flattened(image).convert("L").convert("RGB"), colours, OPACITY)

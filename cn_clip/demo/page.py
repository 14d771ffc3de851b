"""The page that the demo ends in: the values for `templates/demo.html`, over the report's templates and curves."""

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cn_clip import __version__
from cn_clip.demo.emoji import Emoji
from cn_clip.demo.next_steps import MODEL
from cn_clip.language import both
from cn_clip.report.page import ACCURACY_LINES, Chart, Line, Thumbnail, environment, line_chart
from cn_clip.report.run_folder import Run, read_run
from cn_clip.training.monitor import smoothed
from cn_clip.zoo import PUBLISHED

TEMPLATES = Path(__file__).parent / "templates"
DIRECTIONS = ("text_to_image", "image_to_text")
Scores = dict[str, dict[str, float]]


@dataclass
class Found:
    """A held-out drawing whose name is the query: by stage, its rank from 1, and what was found, best first."""

    own: Emoji
    ranks: dict[str, int]
    hits: dict[str, list[Emoji]]

    def is_right(self, hit: Emoji) -> bool:
        """Whether it is the drawing of that name."""
        return hit.number == self.own.number


@dataclass
class Facts:
    """What the demo found out: recall in percent by direction, as `cn-clip recall` writes it, and more.

    after, changes: None if nothing was trained. changes: names that found their picture at a better, a worse, and the
    same rank after the training. zeroshot: a share in [0, 1].
    """

    steps: int
    num_learned: int
    num_held_out: int
    before: Scores = field(default_factory=dict)
    after: Scores | None = None
    zeroshot: float = 0.0
    changes: tuple[int, int, int] | None = None
    found: list[Found] = field(default_factory=list)
    seconds: float = 0.0


def legend() -> str:
    """Why a frame is green."""
    return both(
        "绿框：名称正是这条查询的那一张，也就是要找的",
        "Green frame: the one picture of that name, which is what was looked for",
    )


def page(
    facts: Facts, run: Path | None, commands: Sequence[str], own_folder: Sequence[str], drawings: Sequence[str]
) -> str:
    """The whole document. run: the folder of the training, if there was one. commands: of all steps, in order."""
    template = environment(TEMPLATES).get_template("demo.html")
    return template.render(
        facts=facts,
        charts=[] if run is None else curves(read_run(run)),
        commands=commands,
        own_folder=own_folder,
        drawings=drawings,
        legend=legend(),
        model=MODEL,
        megabytes=round((PUBLISHED[MODEL].num_bytes or 0) / 1e6),
        small=small,
        version=__version__,
    )


def curves(run: Run) -> list[Chart | None]:
    """Loss, and R@1 on the held-out pictures in percent, over the steps."""
    steps_N, losses_N = run.points("train", "loss")
    losses = [
        Line(both("训练（平滑）", "train, smoothed"), (steps_N, smoothed(losses_N)), "blue"),
        Line(both("没学过的图片", "held-out pictures"), run.points("valid", "loss"), "red", marked=True),
    ]
    recalls = [
        Line(both(chinese, english), run.points("valid", f"{way}_r1", factor=100), style, marked=True)
        for way, (chinese, english, style) in ACCURACY_LINES.items()
    ]
    return [line_chart(losses, form="{:.2f}".format), line_chart(recalls, form="{:.1f}".format)]


def small(drawing: Emoji) -> Thumbnail:
    """The picture for the page; its file is small enough as it is."""
    return Thumbnail(f"data:image/webp;base64,{base64.b64encode(drawing.picture).decode('ascii')}", 64, 64)

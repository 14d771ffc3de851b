"""The picture grid: queries at the left, what they found at the right, as a PNG; for the demo and `cn-clip search`."""

import contextlib
import zipfile
from collections.abc import Iterable, Sequence
from importlib import resources
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, TypeAlias

from PIL import Image, ImageDraw, ImageFont

from cn_clip.clip.pictures import opened
from cn_clip.errors import ConfigError
from cn_clip.files import atomic_write
from cn_clip.language import both

Font: TypeAlias = ImageFont.FreeTypeFont

# All lengths are in pixels.
MARGIN, GAP, NOTE_GAP, FRAME = 32, 12, 4, 6
QUERY_WIDTH, PICTURE, CELL_WIDTH = 340, 128, 172
TITLE_SIZE, QUERY_SIZE, CAPTION_SIZE = 34, 30, 18
LINE_SPACING = 1.3  # of the size of the letters
QUERY_LINES, CAPTION_LINES = 3, 2

PAPER, INK, FAINT, RULE, RIGHT = "#ffffff", "#1f2328", "#6e7781", "#d8dee4", "#1a9f4b"
NO_LINE_BEGINS_WITH = "，。、：；！？”’）》】,.:;!?)"
SYSTEM_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "SourceHanSansSC-Regular.otf",
    "wqy-zenhei.ttc",
    "wqy-microhei.ttc",
    "PingFang.ttc",
    "STHeiti Light.ttc",
    "msyh.ttc",
    "simhei.ttf",
)


class Hit(NamedTuple):
    """One found picture: file bytes or a PIL picture, its caption, and whether it is the right answer."""

    picture: bytes | Image.Image
    caption: str
    is_right: bool


class Row(NamedTuple):
    """A query and its hits in rank order. note: what is written below the query, such as the model that found them."""

    query: str
    hits: Sequence[Hit | tuple[bytes | Image.Image, str, bool]]
    note: str | None = None


def draw_grid(
    rows: Sequence[Row | tuple[str, Sequence[Hit | tuple[bytes | Image.Image, str, bool]]]],
    path: Path,
    *,
    title: str = "",
    legend: str = "",
) -> None:
    """Writes a PNG: a row for each query and its hits in rank order, a green frame round the right hits.

    Below a query is its note, else the rank of its first right hit, if there is one. A query is written once for the
    rows that follow each other with it. Long texts end in "…". title, legend: written above; the legend says what
    is right.
    Raises ConfigError without rows or without hits, DataError when the folder of `path` does not exist.
    """
    table = [(row.query, [Hit(*hit) for hit in row.hits], row.note) for row in (Row(*row) for row in rows)]
    num_hits = max((len(hits) for _, hits, _ in table), default=0)
    if not num_hits:
        raise ConfigError("picture grid: expected at least one query with one found picture")
    texts = [text for query, hits, note in table for text in (query, note or "", *(hit.caption for hit in hits))]
    sheet = _Sheet(len(table), num_hits, [*texts, title, legend], has_head=bool(title or legend))
    sheet.draw_head(title, legend)
    before = None
    for index, (query, hits, note) in enumerate(table):
        if note is None:
            rank = next((rank for rank, hit in enumerate(hits, start=1) if hit.is_right), None)
            note = "" if rank is None else both(f"第 {rank} 位", f"rank {rank}")
        is_new = query != before
        colour = RIGHT if any(hit.is_right for hit in hits) else FAINT
        sheet.draw_query(index, query if is_new else "", note, colour, is_ruled_off=bool(index) and is_new)
        before = query
        for column, hit in enumerate(hits):
            sheet.draw_hit(index, column, hit)
    with atomic_write(path, "wb") as stream:
        sheet.image.save(stream, "PNG", optimize=True)


class _Sheet:
    """The picture being drawn, and where its rows and cells lie."""

    def __init__(self, num_rows: int, num_hits: int, texts: Iterable[str], *, has_head: bool) -> None:
        data = _font_for("".join(texts))
        self.query_font, self.caption_font = _sized(data, QUERY_SIZE), _sized(data, CAPTION_SIZE)
        self.title_font = _sized(data, TITLE_SIZE)
        self.head = round((TITLE_SIZE + CAPTION_SIZE) * LINE_SPACING) + 2 * GAP if has_head else 0
        self.row_height = PICTURE + 2 * FRAME + 2 * GAP + round(CAPTION_LINES * CAPTION_SIZE * LINE_SPACING) + GAP
        width = 2 * MARGIN + QUERY_WIDTH + num_hits * CELL_WIDTH
        self.image = Image.new("RGB", (width, 2 * MARGIN + self.head + num_rows * self.row_height), PAPER)
        self.pen = ImageDraw.Draw(self.image)

    def top(self, row: int) -> int:
        """Where a row begins, below its rule."""
        return MARGIN + self.head + row * self.row_height

    def draw_head(self, title: str, legend: str) -> None:
        """Writes the title and, below it, the legend behind a small green frame."""
        self.pen.text((MARGIN, MARGIN), self._line(title, self.title_font), font=self.title_font, fill=INK)
        if legend:
            y, side = MARGIN + round(TITLE_SIZE * LINE_SPACING) + GAP // 2, CAPTION_SIZE + 2
            self.pen.rounded_rectangle((MARGIN, y + 3, MARGIN + side, y + 3 + side), 4, outline=RIGHT, width=3)
            line = self._line(legend, self.caption_font, less=side + GAP)
            self.pen.text((MARGIN + side + GAP, y), line, font=self.caption_font, fill=FAINT)

    def _line(self, text: str, font: Font, *, less: int = 0) -> str:
        return wrap(text, font, self.image.width - 2 * MARGIN - less, max_lines=1)[0]

    def draw_query(self, row: int, query: str, note: str, colour: str, *, is_ruled_off: bool) -> None:
        """Writes the query beside the middle of the row's pictures, the note under it; a rule above, or none."""
        if is_ruled_off:
            self.pen.line([(MARGIN, self.top(row)), (self.image.width - MARGIN, self.top(row))], fill=RULE, width=2)
        lines = wrap(query, self.query_font, QUERY_WIDTH - 2 * GAP, max_lines=QUERY_LINES) if query else []
        leading = QUERY_SIZE * LINE_SPACING
        height = len(lines) * leading + (CAPTION_SIZE * LINE_SPACING if note else 0)
        y = self.top(row) + GAP + FRAME + (PICTURE - height) / 2
        for line in lines:
            self.pen.text((MARGIN, y), line, font=self.query_font, fill=INK)
            y += leading
        self.pen.text((MARGIN, y + NOTE_GAP), note, font=self.caption_font, fill=colour)

    def draw_hit(self, row: int, column: int, hit: Hit) -> None:
        """Draws one picture whole, on a white square in its cell, with its caption, and a frame if it is right."""
        left = MARGIN + QUERY_WIDTH + column * CELL_WIDTH + (CELL_WIDTH - PICTURE) // 2
        top = self.top(row) + GAP + FRAME
        drawing = (opened(hit.picture) if isinstance(hit.picture, bytes) else hit.picture).convert("RGBA")
        scale = PICTURE / max(drawing.size)
        size = (max(1, round(drawing.width * scale)), max(1, round(drawing.height * scale)))
        square = Image.new("RGBA", (PICTURE, PICTURE), PAPER)
        corner = ((PICTURE - size[0]) // 2, (PICTURE - size[1]) // 2)
        square.alpha_composite(drawing.resize(size, Image.Resampling.LANCZOS), corner)
        self.image.paste(square.convert("RGB"), (left, top))
        if hit.is_right:
            box = (left - FRAME - 2, top - FRAME - 2, left + PICTURE + FRAME + 1, top + PICTURE + FRAME + 1)
            self.pen.rounded_rectangle(box, radius=FRAME + 4, outline=RIGHT, width=FRAME)
        middle, y = left + PICTURE / 2, float(top + PICTURE + FRAME + GAP)
        for line in wrap(hit.caption, self.caption_font, CELL_WIDTH - GAP, max_lines=CAPTION_LINES):
            x = middle - self.caption_font.getlength(line) / 2
            self.pen.text((x, y), line, font=self.caption_font, fill=INK if hit.is_right else FAINT)
            y += CAPTION_SIZE * LINE_SPACING


def wrap(text: str, font: Font, width: float, *, max_lines: int) -> list[str]:
    """Lines of at most `width` pixels, broken between any two characters but before closing punctuation.

    One closing mark may hang over. What does not fit into `max_lines` is cut, and the last line then ends in "…".
    """
    lines = [""]
    for character in " ".join(text.split()):
        fits = not lines[-1] or font.getlength(lines[-1] + character) <= width
        if fits or (character in NO_LINE_BEGINS_WITH and font.getlength(lines[-1]) <= width):
            lines[-1] += character
        elif len(lines) > max_lines:
            break
        else:
            lines.append(character.lstrip())
    if len(lines) <= max_lines:
        return lines
    last = lines[max_lines - 1]
    while last and font.getlength(last + "…") > width:
        last = last[:-1]
    return [*lines[: max_lines - 1], last + "…"]


def _font_for(text: str) -> bytes | str:
    """The embedded font, so that grids look the same everywhere; one of the system when it lacks a character."""
    packed = resources.files("cn_clip.data").joinpath("noto_sans_sc.zip").read_bytes()
    with zipfile.ZipFile(BytesIO(packed)) as archive:
        data, characters = archive.read("font.ttf"), archive.read("characters.txt").decode()
    if set(characters).issuperset(text.replace("\n", " ")):
        return data
    for name in SYSTEM_FONTS:
        with contextlib.suppress(OSError):  # not installed
            ImageFont.truetype(name, CAPTION_SIZE)
            return name
    return data


def _sized(font: bytes | str, size: int) -> Font:
    return ImageFont.truetype(BytesIO(font) if isinstance(font, bytes) else font, size)

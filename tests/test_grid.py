"""The picture grid: where frames and pictures lie, how texts are broken, which font writes them."""

import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor, ImageFont

from cn_clip.data import grid
from cn_clip.demo import emoji
from cn_clip.errors import ConfigError, DataError

FONT_ARCHIVE = Path(grid.__file__).parent / "noto_sans_sc.zip"
BLUE = Image.new("RGB", (64, 64), "blue")
GREEN = ImageColor.getrgb(grid.RIGHT)
WHITE = (255, 255, 255)


def font(size: int = 20) -> grid.Font:
    with zipfile.ZipFile(FONT_ARCHIVE) as archive:
        return ImageFont.truetype(BytesIO(archive.read("font.ttf")), size)


def drawn(rows: list[grid.Row], folder: Path) -> Image.Image:
    grid.draw_grid(rows, folder / "grid.png")
    with Image.open(folder / "grid.png") as image:
        assert image.format == "PNG"
        sheet: Image.Image = image.convert("RGB")
        return sheet


def picture_left(place: int) -> int:
    return grid.MARGIN + grid.QUERY_WIDTH + place * grid.CELL_WIDTH + (grid.CELL_WIDTH - grid.PICTURE) // 2


def test_pictures_stand_in_rank_order_with_a_green_frame_round_the_right_one(tmp_path: Path) -> None:
    red = Image.new("RGB", (10, 10), "red")
    image = drawn([("红", [grid.Hit(BLUE, "蓝", False), grid.Hit(red, "红", True)])], tmp_path)
    middle = grid.MARGIN + grid.GAP + grid.FRAME + grid.PICTURE // 2
    assert image.getpixel((picture_left(0) + 5, middle)) == (0, 0, 255)
    assert image.getpixel((picture_left(1) + 5, middle)) == (255, 0, 0)
    assert image.getpixel((picture_left(1) - grid.FRAME, middle)) == GREEN
    assert image.getpixel((picture_left(0) - grid.FRAME, middle)) == WHITE


def test_query_rank_and_caption_are_written(tmp_path: Path) -> None:
    def ink(query: str, caption: str, is_right: bool) -> tuple[int, int]:
        image = drawn([(query, [(BLUE, caption, is_right)])], tmp_path)
        query_part = image.crop((0, 0, grid.MARGIN + grid.QUERY_WIDTH - grid.GAP, image.height))
        below = grid.MARGIN + grid.GAP + grid.PICTURE + 2 * grid.FRAME + 2
        caption_part = image.crop((picture_left(0), below, image.width, image.height))
        return tuple(sum(part.convert("L").histogram()[:200]) for part in (query_part, caption_part))  # type: ignore[return-value]

    assert ink("", "", False) == (0, 0)
    query_only, caption_only = ink("猫", "", False), ink("", "猫", False)
    assert query_only[0] > 100
    assert query_only[1] == 0
    assert caption_only[0] == 0
    assert caption_only[1] > 40
    assert ink("猫", "", True)[0] > query_only[0] + 100  # the rank


def test_sheet_grows_with_rows_and_hits(tmp_path: Path) -> None:
    one = drawn([("a", [(BLUE, "", False)])], tmp_path)
    more = drawn([("a", [(BLUE, "", False)] * 3), ("b", [(BLUE, "", False)]), ("c", [])], tmp_path)
    assert more.width - one.width == 2 * grid.CELL_WIDTH
    assert (more.height - 2 * grid.MARGIN) == 3 * (one.height - 2 * grid.MARGIN)


def test_bytes_wide_and_transparent_pictures_are_shown_whole_on_white(tmp_path: Path) -> None:
    stream = BytesIO()
    Image.new("RGBA", (100, 50), (0, 0, 255, 255)).save(stream, "PNG")
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image = drawn([("x", [(stream.getvalue(), "", False), (clear, "", False)])], tmp_path)
    top = grid.MARGIN + grid.GAP + grid.FRAME
    centre = grid.PICTURE // 2
    assert image.getpixel((picture_left(0) + 1, top + centre)) == (0, 0, 255)
    assert image.getpixel((picture_left(0) + 1, top + 2)) == WHITE
    assert image.getpixel((picture_left(1) + centre, top + centre)) == WHITE


@pytest.mark.parametrize("rows", [[], [("猫", [])]])
def test_nothing_to_draw_is_refused(rows: list[grid.Row], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least one query with one found picture"):
        grid.draw_grid(rows, tmp_path / "grid.png")
    assert not list(tmp_path.iterdir())


def test_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        grid.draw_grid([("x", [(BLUE, "", False)])], tmp_path / "none" / "grid.png")


def test_wrap_breaks_between_characters_but_not_before_closing_punctuation() -> None:
    assert grid.wrap("红苹果", font(20), 60, max_lines=2) == ["红苹果"]
    assert grid.wrap("红苹果和青苹果", font(20), 60, max_lines=3) == ["红苹果", "和青苹", "果"]
    assert grid.wrap("红苹果，青苹果", font(20), 60, max_lines=3) == ["红苹果，", "青苹果"]
    assert grid.wrap("红苹果，，，，", font(20), 60, max_lines=3) == ["红苹果，", "，，，"]


def test_wrap_marks_what_it_cuts() -> None:
    assert grid.wrap("红苹果和青苹果", font(20), 60, max_lines=1) == ["红苹…"]
    assert grid.wrap("", font(20), 60, max_lines=1) == [""]


@given(st.text(alphabet="猫狗ab ，", max_size=40), st.integers(1, 3))
def test_wrapped_lines_keep_every_character_or_say_so(text: str, max_lines: int) -> None:
    lines = grid.wrap(text, font(20), 90, max_lines=max_lines)
    assert len(lines) <= max_lines
    if not lines[-1].endswith("…"):
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_embedded_font_has_its_licence_and_every_character_of_names_and_tags() -> None:
    with zipfile.ZipFile(FONT_ARCHIVE) as archive:
        assert "SIL OPEN FONT LICENSE" in archive.read("OFL.txt").decode()
        has = set(archive.read("characters.txt").decode())
    assert has >= {character for one in emoji.load() for text in (one.name, *one.tags) for character in text}
    empty = font().getmask(" ").getbbox()
    assert all(font().getmask(character).getbbox() != empty for character in "猫鬣A0，")


def test_embedded_font_is_taken_whenever_it_has_all_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    def truetype(name: str, size: int) -> None:
        if name != "wqy-zenhei.ttc":
            raise OSError("cannot open resource")

    monkeypatch.setattr(grid.ImageFont, "truetype", truetype)
    assert isinstance(grid._font_for("熊猫\n在吃竹子"), bytes)
    assert grid._font_for("龘") == "wqy-zenhei.ttc"


def test_character_that_no_font_has_is_drawn_as_a_box(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(grid, "SYSTEM_FONTS", ("no-such-font.ttf",))
    assert font().getmask("龘").getbbox() is not None
    drawn([("龘", [(BLUE, "龘", False)])], tmp_path)


def test_the_title_and_the_legend_stand_above_and_a_query_once_for_its_rows(tmp_path: Path) -> None:
    rows = [grid.Row("猫", [(BLUE, "", False)], "微调前"), grid.Row("猫", [(BLUE, "", True)], "微调后")]
    grid.draw_grid(rows, tmp_path / "grid.png", title="题目", legend="绿框：猫")
    with Image.open(tmp_path / "grid.png") as opened:
        image = opened.convert("RGB")
    bare = drawn([("猫", [(BLUE, "", False)]), ("狗", [(BLUE, "", True)])], tmp_path)
    head = image.height - bare.height
    assert head > grid.TITLE_SIZE + grid.CAPTION_SIZE
    # A rule parts different queries, and no rule the rows of one.
    row_height = (bare.height - 2 * grid.MARGIN) // 2
    rule = ImageColor.getrgb(grid.RULE)
    assert bare.getpixel((grid.MARGIN + 5, grid.MARGIN + row_height)) == rule
    assert image.getpixel((grid.MARGIN + 5, grid.MARGIN + head + row_height)) != rule
    above = image.crop((0, 0, image.width, grid.MARGIN + head)).getcolors(maxcolors=100_000) or []
    assert GREEN in {colour for _, colour in above}  # the frame of the legend

    def ink(top: int) -> int:
        part = image.crop((0, top, grid.MARGIN + grid.QUERY_WIDTH - grid.GAP, top + row_height))
        return sum(part.convert("L").histogram()[:100])

    first, second = (ink(grid.MARGIN + head + row * row_height) for row in (0, 1))
    assert first > 3 * second

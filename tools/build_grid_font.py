"""Builds the font of the picture grid, a part of Noto Sans SC; needs `pip install fonttools`.

    python tools/build_grid_font.py --font NotoSansSC_400Regular.ttf --licence LICENSE_FONT

Both files are in the npm package @expo-google-fonts/noto-sans-sc 0.4.3. The same input gives the same bytes.
"""

import json
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from cn_clip import command
from cn_clip.clip.templates import FOLDER
from cn_clip.demo import emoji
from cn_clip.files import atomic_write

OUTPUT = Path(__file__).parents[1] / "cn_clip" / "data" / "noto_sans_sc.zip"
NOTICE = """Noto Sans SC Regular, https://fonts.google.com/noto/specimen/Noto+Sans+SC
许可 / licence: SIL Open Font License 1.1 (OFL.txt)
改动 / changes: 只保留 characters.txt 中的字符，去掉微调与排版表。
only the characters of characters.txt are kept; hinting and layout tables are removed.
"""


@dataclass(frozen=True)
class Options:
    """Settings of the builder."""

    font: Path
    """the whole font, NotoSansSC_400Regular.ttf"""
    licence: Path
    """its licence, LICENSE_FONT"""
    output: Path = OUTPUT
    """the archive to write"""


def characters() -> str:
    """What the font is to show: ASCII, Chinese punctuation, the 3,755 commonest Han, and all texts of the demo."""
    wanted = {chr(code) for code in range(0x20, 0x7F)} | set("，。、：；！？“”‘’（）《》【】—…·×□")
    for row in range(0xB0, 0xD8):
        wanted.update(_gb2312_row(row))
    for one in emoji.load():
        wanted.update(one.name, one.group, *one.tags)
    for path in FOLDER.glob("*.json"):
        wanted.update(*json.loads(path.read_text(encoding="utf-8")))
    return "".join(sorted(wanted))


def _gb2312_row(row: int) -> str:
    """The 94 characters of one row of GB 2312."""
    return b"".join(bytes([row, cell]) for cell in range(0xA1, 0xFF)).decode("gb2312", errors="ignore")


def subset(font: Path, wanted: str) -> tuple[bytes, str]:
    """(the font with the wanted characters only, those of them that it has)."""
    from fontTools import subset as tools

    options = tools.Options(
        hinting=False,
        layout_features=[],
        desubroutinize=True,
        notdef_outline=True,
        recalc_timestamp=False,
        drop_tables=[*tools.Options().drop_tables, "GSUB", "GPOS", "GDEF", "BASE", "vhea", "vmtx", "VORG"],
    )
    loaded = tools.load_font(str(font), options)
    has = "".join(character for character in wanted if ord(character) in loaded.getBestCmap())
    maker = tools.Subsetter(options)
    maker.populate(text=has)
    maker.subset(loaded)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "font.ttf"
        tools.save_font(loaded, str(target), options)
        return target.read_bytes(), has


def run(options: Options) -> int:
    """Writes the archive and says what is in it."""
    data, has = subset(options.font, characters())
    members = {
        "NOTICE.txt": NOTICE.encode(),
        "OFL.txt": options.licence.read_bytes(),
        "characters.txt": has.encode(),
        "font.ttf": data,
    }
    stream = BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system, info.external_attr = 3, 0o644 << 16
            archive.writestr(info, content, compress_type=zipfile.ZIP_DEFLATED, compresslevel=9)
    with atomic_write(options.output, "wb") as target:
        target.write(stream.getvalue())
    print(f"{options.output}: {len(has)} characters, {len(stream.getvalue())} bytes")
    return 0


def main(args: Sequence[str] | None = None) -> None:
    """Runs the builder on the command line's options."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

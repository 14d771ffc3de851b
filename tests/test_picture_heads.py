"""What is read of a picture file before Pillow sees it: its size, and whether it costs far more than its pixels."""

import ast
import io
import time
from collections.abc import Callable
from pathlib import Path

import picture_bombs as bombs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import cn_clip
from cn_clip.clip import picture_files
from cn_clip.clip.picture_files import FORMATS, Head, look
from cn_clip.clip.pictures import decode, open_picture, opened
from cn_clip.data.pictures import check_picture
from cn_clip.data.pictures import open_picture as open_stored
from cn_clip.emoji_pack import load
from cn_clip.errors import DataError


def encoded(kind: str, size: tuple[int, int] = (33, 21), mode: str = "RGB", **given: object) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise(size, 64).convert(mode).save(stream, kind, **given)
    return stream.getvalue()


def frames(kind: str) -> bytes:
    stream = io.BytesIO()
    noise = [Image.effect_noise((33, 21), 64).convert("RGB") for _ in range(3)]
    noise[0].save(stream, kind, save_all=True, append_images=noise[1:])
    return stream.getvalue()


EXIF = Image.Exif()
EXIF[0x0112], EXIF[0x010E] = 6, "a description"
EXIF.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0comment"
HONEST: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: encoded("JPEG"),
    "JPEG of one channel": lambda: encoded("JPEG", mode="L"),
    "JPEG, progressive": lambda: encoded("JPEG", (640, 480), progressive=True, quality=95),
    "JPEG of CMYK": lambda: encoded("JPEG", mode="CMYK"),
    "JPEG with metadata": lambda: encoded("JPEG", exif=EXIF, icc_profile=bytes(200_000), comment=b"c" * 60_000),
    "JPEG with restarts": lambda: encoded("JPEG", (640, 480), restart_marker_blocks=1),
    "JPEG of several": lambda: frames("MPO"),
    "PNG": lambda: encoded("PNG"),
    "PNG with metadata": lambda: encoded("PNG", exif=EXIF, icc_profile=bytes(5000)),
    "PNG of one bit": lambda: encoded("PNG", mode="1"),
    "PNG, animated": lambda: frames("PNG"),
    "PNG, large": lambda: encoded("PNG", (1024, 700)),
    "GIF": lambda: encoded("GIF", mode="P"),
    "GIF with a comment": lambda: encoded("GIF", mode="P", comment=b"c" * 3000),
    "GIF, animated": lambda: frames("GIF"),
    "WEBP": lambda: encoded("WEBP"),
    "WEBP, lossless": lambda: encoded("WEBP", lossless=True),
    "WEBP with metadata": lambda: encoded("WEBP", mode="RGBA", exif=EXIF, icc_profile=bytes(5000)),
    "WEBP, animated": lambda: frames("WEBP"),
    "BMP": lambda: encoded("BMP"),
    "BMP of a palette": lambda: encoded("BMP", mode="P"),
}


@pytest.mark.parametrize("name", HONEST)
def test_the_size_of_an_honest_file_is_that_which_pillow_finds(name: str) -> None:
    data = HONEST[name]()
    with Image.open(io.BytesIO(data)) as image:
        expected = Head("JPEG" if image.format == "MPO" else str(image.format), *image.size)
    assert look(data) == expected
    decode(data)


def test_other_formats_are_left_to_pillow_and_decoded() -> None:
    for kind, size in (("TIFF", (33, 21)), ("PPM", (0, 0))):
        data = encoded(kind)
        assert look(data) == Head(kind, *size)
        assert decode(data).size == (33, 21)
    assert decode(encoded("TIFF", exif=EXIF, compression="tiff_deflate")).size == (21, 33)  # turned, as EXIF says
    assert all(look(one.picture) is not None for one in load()[:50])


BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "a long comment": (lambda: bombs.gif_comment(1_600_000), "bytes of comments"),
    "a longer comment": (lambda: bombs.gif_comment(7_400_000), "bytes of comments"),
    "many comments": (lambda: bombs.gif_comments(12_000), "bytes of comments"),
    "many blocks": (lambda: bombs.gif(b"!\x01" + b"\1x" * 70_000 + b"\0"), "blocks before its first frame"),
    "no blocks": (lambda: bombs.gif(b"x" * 70_000), "belong to no block"),
    "scans": (lambda: bombs.jpeg_scans(3000), "of 1048576 pixels with more than 500 scans"),
    "scans of many pixels": (lambda: bombs.jpeg_scans(130, 4096), "of 16777216 pixels with more than 119 scans"),
    "segments": (lambda: bombs.jpeg_with([bombs.segment(0xFE, b"x")] * 600), "more than 512 segments"),
    "EXIF in pieces": (lambda: bombs.jpeg_exif_pieces(30_000), "more than 512 segments"),
    "nothing in between": (lambda: bombs.jpeg_with([bombs.segment(0xFE, b""), b"x" * 70_000]), "belong to no segment"),
    "EXIF of one value": (lambda: bombs.jpeg_exif_directory(2000), "whose values overlap"),
    "the same in PNG": (lambda: bombs.png_exif_directory(2000), "whose values overlap"),
    "the same in TIFF": (lambda: bombs.tiff_directory(2000), "whose values overlap"),
    "chunks": (lambda: bombs.png_chunks(300_000), "chunks"),
    "profiles": (lambda: bombs.png_with(bombs.chunk(b"iCCP", b"x\0\0") * 9), "more than 8 colour profiles"),
    "two heads": (lambda: bombs.png_with(bombs.png_with(b"")[8:33]), "two heads"),
    "run lengths": (lambda: bombs.bmp_run_length(6000), "run-length coded BMP of 6000 x 6000"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_file_that_would_take_far_longer_than_its_pixels_is_refused_by_name(name: str, tmp_path: Path) -> None:
    make, message = BOMBS[name]
    data = make()
    begin = time.process_time()
    with pytest.raises(DataError, match=message):
        look(data)
    print(f"{name}: {len(data)} bytes, looked at in {time.process_time() - begin:.3f} s")
    (tmp_path / "holiday.jpg").write_bytes(data)
    with pytest.raises(DataError, match=rf"^holiday\.jpg: not decoded: .*{message}"):
        open_picture(tmp_path / "holiday.jpg", name="holiday.jpg")
    for check in (
        lambda: check_picture(data, "header"),
        lambda: check_picture(data, "decode"),
        lambda: open_stored(data),
    ):
        with pytest.raises(DataError, match=rf"^the picture of {len(data)} bytes is not decoded: .*{message}"):
            check()


def test_what_looks_like_scans_in_other_bytes_is_not_counted() -> None:
    inner = bombs.segment(0xE5, b"\xff\xda" * 1000)
    assert look(bombs.jpeg_with([inner])) == Head("JPEG", 8, 8)
    data = encoded("JPEG", progressive=True)
    assert look(data + b"\xff\xda\0\4xx" * 1000) == Head("JPEG", 33, 21)
    between = data.rindex(b"\xff\xda")
    assert look(data[:between] + inner + data[between:]) == Head("JPEG", 33, 21)


@pytest.mark.parametrize(
    "head", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"\xc5\xd0\xd3\xc6" + bytes(28)]
)
def test_a_program_in_the_name_of_a_picture_is_not_run(head: bytes, tmp_path: Path) -> None:
    data = head + b"(x) print\n%%EOF\n"
    (tmp_path / "holiday.jpg").write_bytes(data)
    with pytest.raises(DataError, match=r"holiday\.jpg: not a picture that can be decoded"):
        open_picture(tmp_path / "holiday.jpg", name="holiday.jpg")
    with pytest.raises(DataError, match="no known picture format"):
        check_picture(data, "header")


def test_a_format_is_one_of_the_list_and_no_program() -> None:
    assert not {"EPS", "WMF", "PDF", "FPX", "MIC"} & set(FORMATS)
    with Image.open(io.BytesIO(encoded("ICO", (16, 16)))) as image:
        assert image.format == "ICO"
    with pytest.raises(Image.UnidentifiedImageError):
        opened(encoded("ICO", (16, 16)))


def test_bytes_are_handed_to_those_who_decode_in_one_place() -> None:
    """Image.open, Image.OPEN, JpegImageFile, HeifImageFile or imread, by whatever name, anywhere but in two modules."""
    root, openers = Path(cn_clip.__file__).parent, {"JpegImageFile", "HeifImageFile", "imread", "Parser", "preinit"}
    found = set()
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = {one.name for one in node.names} if isinstance(node, ast.ImportFrom) else set()
            if isinstance(node, ast.Attribute):
                of_pillow = ast.unparse(node.value).endswith(("Image", "ImageFile"))
                names = {node.attr} & (openers | ({"open", "OPEN"} if of_pillow else set()))
            elif isinstance(node, ast.ImportFrom) and node.module == "PIL.Image":
                names &= openers | {"open", "OPEN"}
            if names & (openers | {"open", "OPEN"}):
                found.add(path.relative_to(root).as_posix())
    assert found == {"clip/picture_files.py", "clip/photo_files.py"}


SEEDS = [make() for make in HONEST.values() if len(make()) < 20_000] + [encoded("TIFF")]


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_no_damage_makes_the_look_fail_otherwise_or_a_size_that_pillow_does_not_find(data: st.DataObject) -> None:
    damaged = bytearray(data.draw(st.sampled_from(SEEDS)))
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, min(len(damaged), 400) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    for one in (bytes(damaged), cut):
        try:
            head = look(one)
        except DataError:
            continue
        if head is None or head.width * head.height > 10_000_000:
            continue
        try:
            with Image.open(io.BytesIO(one), formats=(head.format,)) as image:
                size = image.size
        except Exception:
            continue
        assert size[0] * size[1] <= head.width * head.height or head.format == "WEBP", head


def test_the_bounds_leave_room_for_what_programs_write() -> None:
    assert picture_files.MAX_SEGMENTS > 255 + 150  # a colour profile, and a depth map in extended XMP
    assert picture_files.MAX_SCANNED_PIXELS > 20 * 89_478_485

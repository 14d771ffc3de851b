"""A folder of pictures as phones, cameras and a NAS leave them, in a megabyte: every orientation, format and odd name.

PYTHONPATH=. python tests/phone_folder.py FOLDER
"""

import io
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
from photo_files import dng, heic, jpeg, mpo
from PIL import ExifTags, Image
from video_files import BLUE, GREEN, RED, write_sound, write_video

from cn_clip.demo import emoji

# What has to be done to the stored picture so that it is upright, by EXIF; and what was done to it before.
_STORED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
ORIENTATIONS = tuple(f"DCIM/朝向/IMG_{number}.JPG" for number in range(1, 9))
NUM_OTHERS = 12
# What `index build` counts in such a folder, and the pictures and frames that become items.
REASONS = {"damaged": 2, "empty": 1, "no_pictures": 1, "excluded": 3, "live": 2, "other": 2}
NUM_PICTURES = len(ORIENTATIONS) + NUM_OTHERS + 12
NUM_FRAMES = 4


def write_phone_folder(root: Path) -> Path:
    """Writes it; needs pillow-heif and av."""
    drawings = [Image.open(io.BytesIO(emoji.png(one))).convert("RGB") for one in emoji.load("twemoji")[:40:2]]
    for number, name in enumerate(ORIENTATIONS, start=1):
        _write(root / name, oriented(drawings[0].resize((480, 480)).crop((0, 60, 480, 420)), number))
    for number in range(NUM_OTHERS):
        _write(root / f"DCIM/其他/{number}.png", _png(drawings[1 + number]))
    _write_formats(root / "DCIM" / "100APPLE", drawings[13])
    _write_odd_names(root / "odd names 🙂", drawings[14])
    _write_rest(root, drawings[15])
    return root


def oriented(upright: Image.Image, number: int) -> bytes:
    """The JPEG of a camera that was held so: seen with its EXIF orientation, it is `upright`."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = number
    stored = upright.transpose(_STORED[number]) if number in _STORED else upright
    return jpeg(stored, quality=95, exif=exif)


def _write_formats(folder: Path, drawing: Image.Image) -> None:
    """Six pictures; two with the films of Live Photos, and a film of its own."""
    _write(folder / "IMG_0001.HEIC", heic(drawing))
    write_video(folder / "IMG_0001.MOV", [RED])
    _write(folder / "IMG_0002.JPG", jpeg(drawing))
    write_video(folder / "img_0002.mov", [RED])
    large = Image.new("RGB", (8064, 6048), "navy")  # 48 megapixels
    large.paste("gold", (1000, 1000, 5000, 4000))
    _write(folder / "IMG_0003.JPG", jpeg(large, quality=50))
    stream = io.BytesIO()
    drawing.save(stream, "AVIF")
    _write(folder / "IMG_0004.AVIF", stream.getvalue())
    _write(folder / "IMG_0005.DNG", dng(np.full((64, 96), 90, np.uint8), preview=jpeg(drawing), preview_size=(64, 64)))
    _write(folder / "IMG_0006.MPO", mpo(drawing, drawing.resize((32, 32))))
    write_video(folder / "VID_0007.MP4", [RED, GREEN, BLUE], rotation=90)
    write_video(folder / "VID_0008.mkv", [BLUE])
    write_sound(folder / "录音.m4a").rename(folder / "录音.mp4")


def _write_odd_names(folder: Path, drawing: Image.Image) -> None:
    """Six pictures of the same bytes."""
    names = [b" .png", "🎂 party.png".encode(), b"two\nlines.png", b"\xff\xfe.png", b"\xd5\xd5\xc6\xac.png"]
    names.append("很长的名字".encode() * 15 + b".png")
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        with open(os.path.join(os.fsencode(folder), name), "wb") as stream:
            stream.write(_png(drawing))


def _write_rest(root: Path, drawing: Image.Image) -> None:
    """What becomes no item: made by a NAS, broken, locked, or of another kind."""
    _write(root / "DCIM/@eaDir/IMG_1.JPG/SYNOPHOTO_THUMB_M.jpg", jpeg(drawing))
    _write(root / "System Volume Information/a.jpg", jpeg(drawing))
    _write(root / "#recycle/b.jpg", jpeg(drawing))
    _write(root / ".thumbnails/c.jpg", jpeg(drawing))
    _write(root / "broken/cut.jpg", jpeg(drawing)[:400])
    _write(root / "broken/text.heic", "不是图片".encode() * 9)
    _write(root / "broken/zero.jpg", b"")
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("a.jpg", b"")
    locked = bytearray(stream.getvalue())
    locked[6] |= 1  # the flag that says a password is needed
    locked[locked.index(b"PK\x01\x02") + 8] |= 1
    _write(root / "broken/locked.zip", bytes(locked))
    _write(root / "notes.txt", b"notes")


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


if __name__ == "__main__":
    write_phone_folder(Path(sys.argv[1]))

"""Recall of Emoji-Tiny on the drawings it has not seen, stored as cameras store them in each of the eight orientations.

python benchmarks/upright.py

Every row is an index, built and searched by the commands: its pictures carry that orientation, in the last row each
number of them in turn. "as stored" is what Chinese-CLIP's own preprocessing makes of the same files.
"""

import argparse
import contextlib
import io
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402
from PIL.Image import Transpose  # noqa: E402

from cn_clip import cli  # noqa: E402
from cn_clip.clip import Encoder  # noqa: E402
from cn_clip.demo import emoji  # noqa: E402
from cn_clip.retrieval.recall import recall_from_features  # noqa: E402
from cn_clip.retrieval.store import open_index  # noqa: E402

MIXED = 0
# What a camera that is held so does to the picture.
STORED = {
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_90,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_270,
}


def main() -> None:
    """Prints a table in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--orientations", type=int, nargs="+", default=[*range(1, 9), MIXED])
    given = parser.parse_args()
    pictures, encoder = emoji.load("twemoji"), Encoder("Emoji-Tiny", device="cpu")
    texts_ND = encoder.encode_texts([one.name for one in pictures])
    pairs = [(number, number) for number in range(len(pictures))]
    print("| EXIF orientation | R@1, index and search | R@1, as stored |\n| --- | --- | --- |", flush=True)
    for orientation in given.orientations:
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder, f"{number:04}.png") for number in range(len(pictures))]
            for number, (path, one) in enumerate(zip(paths, pictures, strict=True)):
                write(path, one.picture, orientation or number % 8 + 1)
            with contextlib.redirect_stdout(io.StringIO()):
                cli.main(["index", "build", folder, "--output", f"{folder}/.index", "--model", "Emoji-Tiny"])
            index = open_index(f"{folder}/.index")
            first = [hits[0].id for hits in index.search(texts_ND, 1)]
            found = 100 * np.mean([one == path.name for one, path in zip(first, paths, strict=True)])
            bare = recall_from_features(encoder.encode_images(paths), texts_ND, pairs).text_to_image.at[1]
        print(f"| {orientation or 'all eight in turn'} | {found:.1f} | {100 * bare:.1f} |", flush=True)


def write(path: Path, data: bytes, orientation: int) -> None:
    """The picture as a camera stores it that is held so."""
    with Image.open(io.BytesIO(data)) as image:
        stored = image.convert("RGBA")
    if orientation in STORED:
        stored = stored.transpose(STORED[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(path, exif=exif)


if __name__ == "__main__":
    main()

"""Originals that browsers do not show, as JPEGs: upright, no larger than a screen, decoded within the limits."""

import importlib.util
import io
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from photo_files import dng, heic, jpeg
from PIL import ExifTags, Image
from serving import WatchedBackend, served

from cn_clip.clip.encoder import Encoder
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.store import open_index
from cn_clip.retrieval.writer import NewItem, open_writer
from cn_clip.serve import items
from cn_clip.serve.limits import Limits

# Left half red, right half blue.
WIDE = Image.new("RGB", (300, 100), (200, 0, 0))
WIDE.paste((0, 0, 200), (150, 0, 300, 100))
# A picture of more pixels than this is refused.
MOST = 4_000_000


def tiff(image: Image.Image, orientation: int = 1) -> bytes:
    exif, stream = Image.Exif(), io.BytesIO()
    exif[ExifTags.Base.Orientation] = orientation
    image.save(stream, "TIFF", exif=exif)
    return stream.getvalue()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of an index."""
    root = tmp_path_factory.mktemp("photos") / "pictures"
    root.mkdir()
    files = {
        "turned.tif": tiff(WIDE, 6),
        "long.tif": tiff(WIDE.resize((3000, 1000))),
        "deep.tif": tiff(Image.fromarray(np.full((20, 30), 51_400, dtype=np.uint16))),
        "large.tif": tiff(Image.new("L", (2001, 2000))),
        "broken.tif": tiff(WIDE)[:600],
        "text.tif": "不是图片".encode() * 9,
        "turned.jpg": jpeg(WIDE),
        "sensor.dng": dng(np.full((1000, 1200), 90, dtype=np.uint8)),
        "film.mp4": b"film",
    }
    if importlib.util.find_spec("pillow_heif"):
        files["phone.heic"] = heic(WIDE)
    for name, data in files.items():
        (root / name).write_bytes(data)
    return root


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[httpx.Client]:
    path = folder.parent / "photos.index"
    with open_writer(path, Manifest(ModelInfo("tiny", "fingerprint", 4))) as writer:
        row = np.array([1, 0, 0, 0], dtype=np.float32)
        writer.commit(
            [NewItem(one.name, row, {"source": str(folder), "path": str(one)}) for one in sorted(folder.iterdir())]
        )
    limits = Limits(max_wait_ms=0, max_pixels=MOST, max_request_pixels=MOST)
    with (
        served(Encoder(WatchedBackend()), limits, index=open_index(path), with_originals=True) as address,
        httpx.Client(base_url=address, timeout=60) as client,
    ):
        yield client


def shown(client: httpx.Client, name: str) -> Image.Image:
    """What a browser gets to show."""
    answer = client.get(f"/v1/index/items/{name}?as=jpeg")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/jpeg"), answer.text[:200]
    image = Image.open(io.BytesIO(answer.content))
    assert image.format == "JPEG"
    return image.convert("RGB")


def looks(image: Image.Image, at: tuple[int, int]) -> list[int]:
    """The colour there, to the nearest hundred."""
    pixel = image.getpixel(at)
    assert isinstance(pixel, tuple)
    return [round(one, -2) for one in pixel]


def test_a_tiff_comes_upright(client: httpx.Client) -> None:
    image = shown(client, "turned.tif")
    # Orientation 6 is turned to the right: what was left comes to the top.
    assert image.size == (100, 300)
    assert looks(image, (50, 20)) == [200, 0, 0]
    assert looks(image, (50, 280)) == [0, 0, 200]


def test_a_large_one_comes_no_larger_than_a_screen(client: httpx.Client) -> None:
    assert shown(client, "long.tif").size == (2048, 683)


def test_grey_of_16_bits_is_not_white(client: httpx.Client) -> None:
    # 51400 / 256 = 200.8, of which 200 remain.
    assert shown(client, "deep.tif").getpixel((5, 5)) == (200, 200, 200)


def test_any_other_picture_may_be_asked_for_so(client: httpx.Client) -> None:
    assert shown(client, "turned.jpg").size == (300, 100)


def test_a_heic_and_a_raw_file_are_shown(client: httpx.Client) -> None:
    pytest.importorskip("pillow_heif")
    pytest.importorskip("rawpy")
    assert looks(shown(client, "phone.heic"), (280, 50)) == [0, 0, 200]
    # Of a RAW file without a preview, half its size.
    assert shown(client, "sensor.dng").size == (600, 500)


def test_the_file_of_a_raw_picture_is_a_download(client: httpx.Client, folder: Path) -> None:
    answer = client.get("/v1/index/items/sensor.dng")
    assert (answer.headers["content-type"], answer.content) == (items.OTHER, (folder / "sensor.dng").read_bytes())


def test_a_jpeg_that_the_client_has_is_not_made_again(client: httpx.Client, folder: Path) -> None:
    path = "/v1/index/items/turned.tif?as=jpeg"
    tag = client.get(path).headers["etag"]
    again = client.get(path, headers={"If-None-Match": tag})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    # The file itself has another, and so has the file once it was changed.
    assert client.get("/v1/index/items/turned.tif").headers["etag"] != tag
    (folder / "turned.tif").write_bytes(tiff(WIDE, 8))
    changed = client.get(path, headers={"If-None-Match": tag})
    assert (changed.status_code, changed.headers["etag"] == tag) == (200, False)
    (folder / "turned.tif").write_bytes(tiff(WIDE, 6))


@pytest.mark.parametrize(
    ("path", "param", "code", "message"),
    [
        ("film.mp4?as=jpeg", "as", "invalid_value", "a video is given only as it is"),
        ("turned.tif?as=png", "as", "invalid_value", "'jpeg'"),
        ("large.tif?as=jpeg", "id", "image_too_large", "at most 4000000 pixels a picture are read, this one has 2001"),
        ("broken.tif?as=jpeg", "id", "invalid_image", "id: the picture does not decode"),
        ("text.tif?as=jpeg", "id", "invalid_image", "bytes of no known format"),
    ],
)
def test_what_cannot_be_shown_is_refused(client: httpx.Client, path: str, param: str, code: str, message: str) -> None:
    answer = client.get(f"/v1/index/items/{path}")
    found = answer.json()["error"]
    assert (answer.status_code, found["param"], found["code"]) == (400, param, code)
    assert message in found["message"]
    # The next one is shown.
    assert shown(client, "turned.jpg").size == (300, 100)


def test_a_file_of_too_many_bytes_is_not_read(client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(items, "LARGEST_PICTURE", 100)
    found = client.get("/v1/index/items/turned.jpg?as=jpeg").json()["error"]
    assert (found["param"], found["code"]) == ("id", "image_too_large")

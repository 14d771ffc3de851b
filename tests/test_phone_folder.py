"""A folder as phones leave it: what is indexed, what is counted for which reason, eight orientations of a picture."""

import json
import os
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from phone_folder import NUM_FRAMES, NUM_PICTURES, ORIENTATIONS, REASONS, write_phone_folder
from serving import data_url, served

from cn_clip import cli
from cn_clip.clip import Encoder
from cn_clip.retrieval.store import open_index

pytest.importorskip("pillow_heif", reason="the extra photos is not installed")
pytest.importorskip("rawpy", reason="the extra photos is not installed")

MODEL = ("--model", "Emoji-Tiny", "--num-threads", "1")
# Pictures that are in the folder upright only.
OTHERS = "folder=DCIM/其他"
NUM_NEIGHBOURS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder."""
    return write_phone_folder(tmp_path_factory.mktemp("phone") / "photos")


@pytest.fixture(scope="module")
def built(folder: Path) -> tuple[Path, dict[str, Any]]:
    """The index, and what --json says of it."""
    index = folder.parent / "i"
    with pytest.MonkeyPatch.context() as patch:
        lines = list[dict[str, Any]]()
        patch.setattr("cn_clip.terminal.print_json", lines.append)
        cli.main(["index", "build", str(folder), "--output", str(index), *MODEL, "--json"])
    return index, lines[0]


def test_pictures_and_films_are_indexed_and_the_rest_is_counted_by_reason(built: tuple[Path, dict[str, Any]]) -> None:
    index, result = built
    assert result["skipped_by_reason"] == REASONS
    assert (result["num_items"], result["videos"], result["frames"]) == (NUM_PICTURES + NUM_FRAMES, 2, NUM_FRAMES)
    assert len(result["duplicates"]) == 5  # one picture under six odd names
    opened = open_index(index)
    apple = {str(one): opened.metadata(one) for one in opened.ids if str(one).startswith("DCIM/100APPLE/")}
    assert {one.rpartition("/")[2].partition("#")[0] for one in apple} == {
        *("IMG_0001.HEIC", "IMG_0002.JPG", "IMG_0003.JPG", "IMG_0004.AVIF", "IMG_0005.DNG", "IMG_0006.MPO"),
        *("VID_0007.MP4", "VID_0008.mkv"),
    }
    assert apple["DCIM/100APPLE/IMG_0002.JPG"]["live"] == "img_0002.mov"
    assert (apple["DCIM/100APPLE/IMG_0003.JPG"]["width"], apple["DCIM/100APPLE/IMG_0003.JPG"]["height"]) == (8064, 6048)
    odd = sorted(str(one).removeprefix("odd names 🙂/") for one in opened.ids if str(one).startswith("odd"))
    assert odd[:4] == [" .png", "bytes:%FF%FE.png", "bytes:two%0Alines.png", "gbk:照片.png"]


def test_each_orientation_is_the_same_picture_to_the_index(built: tuple[Path, dict[str, Any]]) -> None:
    index = open_index(built[0])
    rows_8D = np.stack([index.vector(name) for name in ORIENTATIONS])
    assert (rows_8D @ rows_8D.T).min() > 0.98  # JPEG rounds a turned block otherwise
    assert {(index.metadata(name)["width"], index.metadata(name)["height"]) for name in ORIENTATIONS} == {(480, 360)}


def test_each_orientation_finds_the_same_neighbours_by_command_line_and_http(
    built: tuple[Path, dict[str, Any]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = open_index(built[0])
    expected = [hit.id for hit in index.search(index.vector(ORIENTATIONS[0])[None], NUM_NEIGHBOURS, where=OTHERS)[0]]
    for name in ORIENTATIONS:
        args = ["--image", os.path.join(folder, name), "--k", str(NUM_NEIGHBOURS), "--where", OTHERS, "--json"]
        cli.main(["search", str(built[0]), *args, *MODEL])
        assert [hit["id"] for hit in json.loads(capsys.readouterr().out)["hits"]] == expected, name
    encoder = Encoder("Emoji-Tiny", num_threads=1, upright=True, decode="auto")
    with served(encoder, index=index) as address, httpx.Client(base_url=address, timeout=60) as client:
        for name in ORIENTATIONS:
            query = {"image": data_url((folder / name).read_bytes(), "jpeg")}
            answer = client.post("/v1/search", json={"query": query, "k": NUM_NEIGHBOURS, "where": OTHERS})
            assert [hit["id"] for hit in answer.json()["data"]] == expected, name

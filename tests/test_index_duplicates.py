"""`cn-clip index duplicates`: equal and nearly equal pictures are grouped, the best first, and others are not."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cn_clip import cli
from cn_clip.demo import emoji
from cn_clip.index import copies
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.writer import NewItem, open_writer

EMOJI = emoji.load("twemoji")
Find = Callable[..., dict[str, Any]]


def drawing(number: int, side: int) -> Image.Image:
    """An emoji on white."""
    with Image.open(io.BytesIO(emoji.png(EMOJI[number]))) as image:
        paper = Image.new("RGBA", image.size, "white")
        paper.alpha_composite(image.convert("RGBA"))
    return paper.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of nine drawings, and copies of two of them."""
    root = tmp_path_factory.mktemp("duplicates")
    folder = root / "pictures"
    (folder / "copies").mkdir(parents=True)
    for number in range(0, 180, 20):
        drawing(number, 300).save(folder / f"{number}.png")
    (folder / "copies" / "equal.png").write_bytes((folder / "20.png").read_bytes())
    drawing(20, 640).save(folder / "copies" / "large.png")
    drawing(20, 120).save(folder / "copies" / "small.jpg", quality=40)
    drawing(20, 300).crop((6, 6, 294, 294)).save(folder / "copies" / "cut.webp", quality=60)
    drawing(20, 300).transpose(Image.Transpose.ROTATE_90).save(folder / "copies" / "turned.png")
    drawing(60, 300).save(folder / "60-again.jpg", quality=30)
    model = ("--model", "Emoji-Tiny", "--num-threads", "1", "--num-workers", "0")
    cli.main(["index", "build", str(folder), "--output", str(root / "i"), *model, "--json"])
    return root / "i"


@pytest.fixture
def find(capsys: pytest.CaptureFixture[str]) -> Find:
    """Runs the command with --json."""

    def run(index: Path, *args: object) -> dict[str, Any]:
        capsys.readouterr()
        cli.main(["index", "duplicates", str(index), *map(str, args), "--json"])
        result: dict[str, Any] = json.loads(capsys.readouterr().out)
        return result

    return run


def names(result: dict[str, Any]) -> list[list[str]]:
    """The ids of each group."""
    return [[item["id"] for item in group["items"]] for group in result["groups"]]


def test_copies_are_grouped_the_best_first_and_other_drawings_are_not(index: Path, find: Find) -> None:
    result = find(index)
    assert names(result) == [
        ["60.png", "60-again.jpg"],
        ["copies/large.png", "20.png", "copies/equal.png", "copies/cut.webp", "copies/small.jpg"],
    ]
    of_60, of_20 = result["groups"]
    assert (of_60["because"], of_20["because"]) == ("size", "pixels")
    assert [item["equal"] for item in of_20["items"]] == [True, False, False, False, False]
    assert of_20["items"][0]["distance"] == 0
    assert all(item["cosine"] >= 0.9 and item["distance"] <= 20 for item in of_20["items"])
    assert result["num_more"] == 5
    assert result["bytes_more"] == sum(item["size"] for group in result["groups"] for item in group["items"][1:])


def test_both_measures_must_agree(index: Path, find: Find) -> None:
    assert names(find(index, "--max-distance", 0, "--min-cosine", 1)) == [["20.png", "copies/equal.png"]]
    # The outlines alone take two drawings for one.
    assert ["100.png", "80.png"] in names(find(index, "--min-cosine", 0))
    everything = find(index, "--min-cosine", 0, "--max-distance", 128)
    assert len(everything["groups"]) == 1
    assert len(everything["groups"][0]["items"]) == 15


def test_people_read_sizes_reasons_and_that_nothing_is_removed(index: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["index", "duplicates", str(index)])
    out = capsys.readouterr().out
    assert "  * copies/large.png  640 x 640  " in out
    assert "(most pixels)" in out
    assert "2 groups, 5 images besides the best of each" in out
    assert "nothing was removed" in out


def written(folder: Path, items: list[NewItem]) -> Path:
    """An index of items made by hand."""
    with open_writer(folder, Manifest(ModelInfo("m", "f", 2))) as writer:
        writer.commit(items)
    return folder


def jpeg(color: str) -> bytes:
    """A thumbnail."""
    stream = io.BytesIO()
    Image.linear_gradient("L").resize((40, 30)).convert("RGB").save(stream, "JPEG", comment=color.encode())
    return stream.getvalue()


def test_the_best_has_most_pixels_then_bytes_then_the_earliest_date_then_the_shortest_name(
    tmp_path: Path, find: Find
) -> None:
    size = {"width": 10, "height": 10, "size": 5}
    facts: dict[str, dict[str, Any]] = {
        "plain": size,
        "b": {**size, "date": "2021-05-03T10:00:00"},
        "aa": {**size, "date": "2021-05-03T10:00:00"},
        "early": {**size, "date": "2020"},
        "large": {**size, "size": 6},
        "wide": {"width": 101, "height": 1, "size": 1},
    }
    vector = np.array([1, 0], dtype=np.float32)
    items = [NewItem(name, vector, one, jpeg(name)) for name, one in facts.items()]
    result = find(written(tmp_path / "i", items))
    assert names(result) == [["wide", "large", "early", "b", "aa", "plain"]]
    for first, reason in ((0, "pixels"), (1, "size"), (2, "date"), (3, "name")):
        rest = written(tmp_path / str(first), [one for one in items if one.id in names(result)[0][first:]])
        assert find(rest)["groups"][0]["because"] == reason


def test_pictures_without_thumbnails_are_found_if_equal_and_frames_are_left_out(tmp_path: Path, find: Find) -> None:
    vector = np.array([1, 0], dtype=np.float32)
    items = [
        NewItem("a", vector, {"digest": "x"}),
        NewItem("b", vector, {"digest": "x"}),
        NewItem("c", vector, {"digest": "y"}),
        NewItem("damaged", vector, {}, b"no picture"),
        NewItem("v.mp4#t=1.0", vector, {"kind": "video"}, jpeg("1")),
        NewItem("v.mp4#t=2.0", vector, {"kind": "video"}, jpeg("2")),
    ]
    result = find(written(tmp_path / "i", items))
    assert names(result) == [["a", "b"]]
    assert (result["without_thumbnail"], result["frames"]) == (3, 2)
    assert result["groups"][0]["items"][1] == {
        **{"id": "b", "width": None, "height": None, "size": None, "date": None},
        **{"equal": True, "cosine": 1.0, "distance": None},
    }


def test_an_index_in_milvus_is_refused_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["index", "duplicates", "milvus://h:1/c"])
    assert "this command is for folders" in capsys.readouterr().err


def test_pairs_of_different_blocks_are_found(tmp_path: Path, find: Find, monkeypatch: pytest.MonkeyPatch) -> None:
    angles = np.array([0, 90, 180, 270, 1, 91, 181, 2, 45]) * np.pi / 180
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    index = written(tmp_path / "i", [NewItem(str(n), one, {}, jpeg(str(n))) for n, one in enumerate(vectors)])
    monkeypatch.setattr(copies, "BLOCK", 2)
    monkeypatch.setattr(copies, "PAIRS", 1)
    # 0.999 is the cosine of 2.6 degrees.
    assert names(find(index, "--min-cosine", 0.999)) == [["0", "4", "7"], ["1", "5"], ["2", "6"]]
    assert find(written(tmp_path / "none", []))["groups"] == []


def test_the_outline_says_where_it_grows_brighter() -> None:
    rising = Image.linear_gradient("L").transpose(Image.Transpose.ROTATE_90)  # brighter to the right
    across, down = np.split(copies.outline(rising), 2)
    assert (across.all(), down.any()) == (True, False)
    assert copies.outline(rising.resize((40, 30))).tolist() == copies.outline(rising).tolist()

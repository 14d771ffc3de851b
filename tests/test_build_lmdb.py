"""Building the LMDB of a dataset: the reference's lines and bytes, every bad record, and never half an output."""

import io
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_files import GOLDEN_LMDB, REPOSITORY, jsonl_line, picture, run_script, tree, tsv_line, write_split
from PIL import ExifTags, Image, ImageCms

from cn_clip.clip.transforms import ImageTransform
from cn_clip.data.building import write_shards
from cn_clip.data.checks import check_split
from cn_clip.data.lmdb_store import ImageStore, LmdbReader, PairStore
from cn_clip.data.pictures import shrunk
from cn_clip.data.shards import ShardPairs
from cn_clip.errors import ConfigError, DataError
from cn_clip.files import staged_folder
from cn_clip.preprocess.build_lmdb_dataset import Options, run, split_names

SCRIPT = "preprocess/build_lmdb_dataset.py"
GOOD_IMAGES = [tsv_line(1), tsv_line(2), tsv_line(3)]
GOOD_TEXTS = [jsonl_line(10, "红", [1, 2]), jsonl_line(11, "绿", [3])]


def insert(lines: list[bytes], line: bytes) -> list[bytes]:
    return [lines[0], line, *lines[1:]]


def built(folder: Path, split: str = "train") -> tuple[list[object], list[object]]:
    images, pairs = ImageStore(folder / "lmdb" / split / "imgs"), PairStore(folder / "lmdb" / split / "pairs")
    return list(images.ids), [pairs[index] for index in range(len(pairs))]


def test_the_command_prints_the_lines_of_the_reference_in_the_order_of_the_splits(tmp_path: Path) -> None:
    for split in ("valid", "train", "test"):
        write_split(tmp_path, GOOD_IMAGES, GOOD_TEXTS, split=split)
    result = run_script(SCRIPT, "--data_dir", tmp_path, "--splits", "valid,train,test")
    assert result.returncode == 0, result.stderr
    expected = ["Dataset splits to be processed: valid, train, test"]
    for split in ("valid", "train", "test"):
        expected.append(f"Finished serializing 3 {split} split pairs into {tmp_path}/lmdb/{split}/pairs.")
        expected.append(f"Finished serializing 3 {split} split images into {tmp_path}/lmdb/{split}/imgs.")
    assert result.stdout.splitlines() == [*expected, "done!"]


def test_a_second_build_says_that_it_overwrites_and_keeps_nothing_of_the_first(tmp_path: Path) -> None:
    write_split(tmp_path, GOOD_IMAGES, GOOD_TEXTS)
    arguments = ("--data_dir", tmp_path, "--splits", "train", "--lmdb_dir", tmp_path / "lmdb")
    assert run_script(SCRIPT, *arguments).returncode == 0
    write_split(tmp_path, [tsv_line(7)], [jsonl_line(10, "红", [7])])
    result = run_script(SCRIPT, *arguments)
    assert result.stdout.splitlines()[1] == f"We will overwrite an existing LMDB file {tmp_path}/lmdb/train"
    assert built(tmp_path) == ([7], [(7, 10, "红")])
    assert [path.name for path in (tmp_path / "lmdb").iterdir()] == ["train"]


def test_the_keys_and_values_are_those_of_the_reference(tmp_path: Path) -> None:
    run(Options(str(GOLDEN_LMDB), "train", str(tmp_path)))
    ours, golden = tmp_path / "train", GOLDEN_LMDB / "lmdb" / "train"
    for part in ("imgs", "pairs"):
        mine, theirs = LmdbReader(ours / part), LmdbReader(golden / part)
        assert list(mine.list_keys()) == list(theirs.list_keys())
    for key in LmdbReader(golden / "imgs").list_keys():
        assert LmdbReader(ours / "imgs").get(key) == LmdbReader(golden / "imgs").get(key)
    for index in range(4):
        stored = [LmdbReader(folder / "pairs").get(b"%d" % index) for folder in (ours, golden)]
        assert pickle.loads(stored[0] or b"") == pickle.loads(stored[1] or b"")


TRUNCATED_PNG = picture(size=(64, 64))[:60]
TRUNCATED_JPEG = picture(kind="JPEG", size=(64, 64))[:-200]
BAD_IMAGES = {
    "no tab": (b"9 QUJD\n", 2, "expected `id<TAB>base64`"),
    "truncated base64": (tsv_line(9)[:-3] + b"\n", 2, "image id 9: the base64 text of"),
    "no picture": (tsv_line(9, b"hello"), 2, "image id 9: the picture of 5 bytes does not decode"),
    "truncated png": (tsv_line(9, TRUNCATED_PNG), 2, "image id 9: the picture of 60 bytes does not decode"),
    "truncated jpeg": (tsv_line(9, TRUNCATED_JPEG), 2, "image id 9: the picture of"),
    "no bytes": (b"9\t\n", 2, "expected `id<TAB>base64`"),
    "duplicate id": (tsv_line("1"), 2, "duplicate image id 1, first in line 1; expected each picture once"),
    "invalid UTF-8": (b"\xff\xfe\t" + tsv_line(9).split(b"\t")[1], 2, "invalid UTF-8"),
}
BAD_TEXTS = {
    "missing picture": (jsonl_line(12, "蓝", [99]), 2, "text id 12: image_ids names picture 99, which is not in"),
    "picture twice": (jsonl_line(12, "蓝", [1, 1]), 2, "text id 12: image_ids names picture 1 twice"),
    "duplicate id": (jsonl_line("10", "蓝", [1]), 2, "duplicate text id 10, first in line 1"),
    "no object": (b"[]\n", 2, "expected a JSON object, got list"),
    "no field": (b'{"text_id": 12, "text": "a"}\n', 2, "the field 'image_ids' is missing"),
    "no string": (jsonl_line(12, None, [1]), 2, "text of text_id 12: expected a string, got null null"),
    "invalid UTF-8": (b'{"text_id": 12, "text": "\xff", "image_ids": []}\n', 2, "invalid UTF-8 at byte"),
}


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_picture_line_stops_the_build_with_file_line_and_nothing_written(tmp_path: Path, case: str) -> None:
    line, number, message = BAD_IMAGES[case]
    write_split(tmp_path, insert(GOOD_IMAGES, line), GOOD_TEXTS)
    with pytest.raises(DataError) as caught:
        run(Options(str(tmp_path), "train"))
    assert str(caught.value).startswith(f"{tmp_path}/train_imgs.tsv:{number}: ")
    assert message in str(caught.value)
    assert list((tmp_path / "lmdb").iterdir()) == []


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_bad_text_line_stops_the_build_with_file_line_and_nothing_written(tmp_path: Path, case: str) -> None:
    line, number, message = BAD_TEXTS[case]
    write_split(tmp_path, GOOD_IMAGES, insert(GOOD_TEXTS, line))
    with pytest.raises(DataError) as caught:
        run(Options(str(tmp_path), "train"))
    assert str(caught.value).startswith(f"{tmp_path}/train_texts.jsonl:{number}: ")
    assert message in str(caught.value)
    assert list((tmp_path / "lmdb").iterdir()) == []


@pytest.mark.parametrize("case", BAD_IMAGES)
def test_a_bad_picture_line_is_skipped_on_request(tmp_path: Path, case: str) -> None:
    write_split(tmp_path, insert(GOOD_IMAGES, BAD_IMAGES[case][0]), GOOD_TEXTS)
    run(Options(str(tmp_path), "train", on_error="skip"))
    assert built(tmp_path) == ([1, 2, 3], [(1, 10, "红"), (2, 10, "红"), (3, 11, "绿")])


@pytest.mark.parametrize("case", BAD_TEXTS)
def test_a_bad_text_line_is_skipped_on_request(tmp_path: Path, case: str) -> None:
    write_split(tmp_path, GOOD_IMAGES, insert(GOOD_TEXTS, BAD_TEXTS[case][0]))
    run(Options(str(tmp_path), "train", on_error="skip"))
    kept = [(1, 12, "蓝")] if case == "picture twice" else []
    assert built(tmp_path) == ([1, 2, 3], [(1, 10, "红"), (2, 10, "红"), *kept, (3, 11, "绿")])


def test_only_the_pair_with_the_missing_picture_is_skipped(tmp_path: Path) -> None:
    write_split(tmp_path, [tsv_line(1), tsv_line(3)], [jsonl_line(10, "红", [1, 2, 3])])
    run(Options(str(tmp_path), "train", on_error="skip"))
    assert built(tmp_path) == ([1, 3], [(1, 10, "红"), (3, 10, "红")])


def test_skipped_records_are_counted_listed_and_in_the_json(tmp_path: Path) -> None:
    write_split(tmp_path, [*GOOD_IMAGES, *[tsv_line(100 + i, b"bad") for i in range(25)]], GOOD_TEXTS)
    result = run_script(SCRIPT, "--data-dir", tmp_path, "--splits", "train", "--on-error", "skip", "--json")
    assert result.returncode == 0, result.stderr
    (split,) = json.loads(result.stdout)["splits"]
    assert (split["split"], split["pairs"], split["images"], len(split["skipped"])) == ("train", 3, 3, 25)
    assert split["skipped"][0]["file"] == f"{tmp_path}/train_imgs.tsv"
    assert (split["skipped"][0]["line"], split["skipped"][0]["id"]) == (4, 100)
    assert result.stderr.count("skipped: ") == 20
    assert "skipped 25 faults in split train" in result.stderr


@pytest.mark.parametrize("empty", ["train_imgs.tsv", "train_texts.jsonl"])
def test_an_empty_file_stops_the_build(tmp_path: Path, empty: str) -> None:
    write_split(tmp_path, GOOD_IMAGES, [jsonl_line(1, "红")])
    (tmp_path / empty).write_bytes(b"")
    with pytest.raises(DataError, match=f"{empty}: the file is empty; expected lines of"):
        run(Options(str(tmp_path), "train"))
    with pytest.raises(DataError, match="no split has a usable record left"):
        run(Options(str(tmp_path), "train", on_error="skip"))
    assert list((tmp_path / "lmdb").iterdir()) == []


def test_a_split_without_a_sound_record_is_left_out_and_the_others_built(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write_split(tmp_path, [b""], GOOD_TEXTS, split="valid")
    write_split(tmp_path, GOOD_IMAGES, GOOD_TEXTS)
    run(Options(str(tmp_path), "valid,train", on_error="skip"))
    assert [path.name for path in (tmp_path / "lmdb").iterdir()] == ["train"]
    assert "skipped split valid: no picture or no sentence is left of it" in capfd.readouterr().err


def test_texts_without_pictures_are_a_test_set_and_build(tmp_path: Path) -> None:
    write_split(tmp_path, GOOD_IMAGES, [jsonl_line(1, "红", [])], split="test")
    run(Options(str(tmp_path), "test"))
    assert built(tmp_path, "test") == ([1, 2, 3], [])


def test_a_stopped_build_leaves_the_old_one_and_exits_with_1(tmp_path: Path) -> None:
    write_split(tmp_path, GOOD_IMAGES, GOOD_TEXTS)
    run(Options(str(tmp_path), "train"))
    before = tree(tmp_path / "lmdb")
    write_split(tmp_path, insert(GOOD_IMAGES, b"broken\n"), GOOD_TEXTS)
    result = run_script(SCRIPT, "--data_dir", tmp_path, "--splits", "train")
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1, result.stderr
    assert f"{tmp_path}/train_imgs.tsv:2: expected `id<TAB>base64`" in result.stderr
    assert tree(tmp_path / "lmdb") == before


def test_a_killed_build_leaves_the_old_one_and_the_next_clears_up(tmp_path: Path) -> None:
    write_split(tmp_path, GOOD_IMAGES, GOOD_TEXTS)
    run(Options(str(tmp_path), "train"))
    before = tree(tmp_path / "lmdb")
    program = (
        "import sys; from pathlib import Path; from cn_clip.files import staged_folder\n"
        "with staged_folder(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('x'); print('writing', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "lmdb" / "train")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        process.send_signal(signal.SIGKILL)
    after = tree(tmp_path / "lmdb")
    assert {name: after[name] for name in before} == before
    assert sum(name.endswith("/half") for name in after) == 1
    write_split(tmp_path, [tsv_line(5)], [jsonl_line(1, "红", [5])])
    run(Options(str(tmp_path), "train"))
    assert built(tmp_path) == ([5], [(5, 1, "红")])
    assert [path.name for path in (tmp_path / "lmdb").iterdir()] == ["train"]


def test_a_file_is_never_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("thesis")
    with (
        pytest.raises(DataError, match=r"precious\.txt: exists and is no folder"),
        staged_folder(tmp_path / "precious.txt"),
    ):
        pytest.fail("work began")
    assert tree(tmp_path) == {"precious.txt": b"thesis"}


def test_the_folder_a_command_runs_in_is_not_replaced_and_other_relative_names_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    monkeypatch.chdir(tmp_path / "in")
    with pytest.raises(DataError, match=r"^\.: is the folder this command runs in"), staged_folder(Path(".")):
        pytest.fail("work began")
    monkeypatch.chdir(tmp_path)
    for name in ("in", "in/../in", "./new"):
        with staged_folder(Path(name)) as folder:
            (folder / "file").write_text(name)
    assert tree(tmp_path) == {"in/file": b"in/../in", "new/file": b"./new"}


def test_a_link_to_a_folder_stays_and_its_folder_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").write_text("old")
    (tmp_path / "link").symlink_to("disk")
    with staged_folder(tmp_path / "link") as folder:
        (folder / "new").write_text("new")
    assert tree(tmp_path / "disk") == {"new": b"new"}
    assert (tmp_path / "link").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"]


def test_missing_inputs_are_named_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere: the data_dir does not exist"):
        run(Options(str(tmp_path / "nowhere"), "train"))
    write_split(tmp_path, GOOD_IMAGES, GOOD_TEXTS)
    with pytest.raises(DataError, match=r"valid_imgs.tsv: no such file"):
        run(Options(str(tmp_path), "train,valid"))
    assert not (tmp_path / "lmdb").exists()


@pytest.mark.parametrize("splits", ["", "train,", "../train", ".hidden"])
def test_a_bad_list_of_splits_is_refused(splits: str) -> None:
    with pytest.raises(ConfigError, match="--splits"):
        split_names(splits)


def test_splits_are_taken_in_order_and_once() -> None:
    assert split_names("b, a,b") == ["b", "a"]


@pytest.mark.parametrize("num_workers", [0, 3])
def test_the_header_check_lets_a_truncated_picture_pass_and_none_lets_all_pass(
    tmp_path: Path, num_workers: int
) -> None:
    write_split(tmp_path, [*GOOD_IMAGES, tsv_line(9, TRUNCATED_PNG)], GOOD_TEXTS)
    run(Options(str(tmp_path), "train", check_pictures="header", num_workers=num_workers))
    write_split(tmp_path, [*GOOD_IMAGES, tsv_line(9, b"any")], GOOD_TEXTS)
    with pytest.raises(DataError, match=":4: image id 9"):
        run(Options(str(tmp_path), "train", check_pictures="header", num_workers=num_workers))
    run(Options(str(tmp_path), "train", check_pictures="none", num_workers=num_workers))
    assert built(tmp_path)[0] == [1, 2, 3, 9]


@pytest.mark.parametrize("mode", ["RGBA", "P", "L", "CMYK", "I;16", "1", "LA", "F"])
def test_pictures_of_every_mode_are_sound(tmp_path: Path, mode: str) -> None:
    import io

    from PIL import Image

    stream = io.BytesIO()
    Image.new(mode, (3, 3)).save(stream, "TIFF")
    write_split(tmp_path, [tsv_line(1, stream.getvalue())], [jsonl_line(1, "红", [1])])
    run(Options(str(tmp_path), "train"))
    assert built(tmp_path)[0] == [1]


# --- smaller pictures


def photo(size: tuple[int, int], *, mode: str = "RGB", kind: str = "JPEG", **how: Any) -> bytes:
    """Clouds and edges, the same each time."""
    rng = np.random.default_rng(size[0])
    clouds = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    stream = io.BytesIO()
    clouds.convert(mode).save(stream, kind, **({"quality": 92} if kind == "JPEG" else {}) | how)
    return stream.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize(
    ("data", "kind", "mode", "size"),
    [
        (photo((640, 480)), "JPEG", "RGB", (341, 256)),
        (photo((480, 2000), mode="L"), "JPEG", "L", (256, 1067)),
        (photo((640, 480), mode="CMYK"), "JPEG", "CMYK", (341, 256)),
        (photo((640, 480), kind="PNG"), "PNG", "RGB", (341, 256)),
        (photo((640, 480), mode="RGBA", kind="PNG"), "PNG", "RGBA", (341, 256)),
        (photo((640, 480), mode="P", kind="GIF"), "PNG", "P", (341, 256)),
        (photo((640, 480), kind="WEBP", lossless=True), "PNG", "RGB", (341, 256)),
        (photo((640, 480), kind="BMP"), "PNG", "RGB", (341, 256)),
    ],
    ids=["JPEG", "grey", "CMYK", "PNG", "RGBA", "GIF", "lossless WebP", "BMP"],
)
def test_a_larger_picture_is_stored_with_the_shorter_side_asked_for(
    data: bytes, kind: str, mode: str, size: tuple[int, int]
) -> None:
    small = shrunk(data, 256)
    assert len(small) < len(data)
    image = opened(small)
    assert (image.format, image.mode, image.size) == (kind, mode, size)
    expected = opened(data).resize(size, Image.Resampling.BICUBIC)
    difference = np.abs(np.asarray(image, dtype=float) - np.asarray(expected, dtype=float))
    assert difference.mean() < (1 if kind == "JPEG" else 1e-9)  # of 255
    pixels = [ImageTransform(224).bytes(opened(one)).astype(float) for one in (data, small)]
    assert mode == "P" or np.abs(pixels[0] - pixels[1]).mean() < 2


@pytest.mark.parametrize("size", [(256, 256), (300, 256), (5, 4), (256, 5000)])
def test_a_picture_no_larger_than_asked_for_keeps_its_bytes(size: tuple[int, int]) -> None:
    data = photo(size)
    assert shrunk(data, 256) is data
    assert shrunk(data, 10_000) is data


def test_what_would_not_be_smaller_or_is_grey_of_16_bits_keeps_its_bytes() -> None:
    coarse = photo((260, 260), quality=10)
    assert shrunk(coarse, 256) == coarse
    deep = io.BytesIO()
    Image.fromarray(np.full((400, 400), 5000, dtype=np.uint16)).save(deep, "PNG")
    assert shrunk(deep.getvalue(), 256) == deep.getvalue()


def test_colours_that_a_png_has_not_stay_and_damaged_exif_says_nothing() -> None:
    stream = io.BytesIO()
    Image.new("CMYK", (400, 300), (1, 2, 3, 4)).save(stream, "TIFF")
    assert shrunk(stream.getvalue(), 64) == stream.getvalue()
    data = photo((640, 480), kind="PNG", exif=b"Exif\0\0no directory stands here")
    assert min(opened(shrunk(data, 256)).size) == 256


def test_orientation_and_colour_profile_stay_and_other_metadata_goes() -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make] = 6, "a camera"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for kind in ("JPEG", "PNG"):
        small = opened(shrunk(photo((640, 480), kind=kind, exif=exif, icc_profile=profile), 256))
        assert small.size == (341, 256)  # not turned, as the pictures of training are not
        assert dict(small.getexif()) == {ExifTags.Base.Orientation: 6}
        assert small.info["icc_profile"] == profile


@pytest.mark.parametrize("data", [b"", b"no picture", photo((640, 480))[:3000]], ids=["empty", "text", "cut"])
def test_what_cannot_be_read_is_said(data: bytes) -> None:
    with pytest.raises(DataError, match=r"does not decode|is empty"):
        shrunk(data, 256)


def test_a_split_is_built_of_smaller_pictures_and_checks_as_sound(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large, small = photo((640, 480)), photo((200, 150))
    images = [tsv_line(1, large), tsv_line(2, small), tsv_line(3, picture())]
    write_split(tmp_path, images, GOOD_TEXTS)
    for num_workers in (0, 2):
        run(Options(str(tmp_path), "train", shrink=256, num_workers=num_workers))
        stored = ImageStore(tmp_path / "lmdb" / "train" / "imgs")
        assert [stored.picture(number) for number in (1, 2, 3)] == [shrunk(large, 256), small, picture()]
        assert "Made 1 of 3 pictures of train smaller, to 256 pixels on the shorter side." in capsys.readouterr().out
    result = check_split(tmp_path, "train", tmp_path / "lmdb" / "train")
    assert (result.faults, result.num_shrunk) == ([], 1)
    assert "1 pictures of the LMDB are smaller than in the tsv file (cn-clip dataset build --shrink)" in result.notes
    write_split(tmp_path, [tsv_line(1, photo((641, 480))), *images[1:]], GOOD_TEXTS)
    (fault,) = check_split(tmp_path, "train", tmp_path / "lmdb" / "train").faults
    assert "image id 1 (line 1 of the tsv file) is not the picture of the tsv file" in fault.message


def test_a_picture_that_cannot_be_made_smaller_is_a_fault_like_others(tmp_path: Path) -> None:
    images = [tsv_line(1, photo((640, 480))[:3000]), tsv_line(2), tsv_line(3)]
    write_split(tmp_path, images, GOOD_TEXTS)
    with pytest.raises(DataError, match=r"train_imgs.tsv:1: image id 1: the picture of 3000 bytes does not decode"):
        run(Options(str(tmp_path), "train", shrink=256, check_pictures="none"))
    assert not (tmp_path / "lmdb" / "train").exists()
    run(Options(str(tmp_path), "train", shrink=256, check_pictures="none", on_error="skip"))
    assert built(tmp_path)[0] == [2, 3]


def test_shards_hold_smaller_pictures(tmp_path: Path) -> None:
    large = photo((640, 480))
    write_split(tmp_path, [tsv_line(1, large), tsv_line(2), tsv_line(3)], GOOD_TEXTS)
    run(Options(str(tmp_path), "train"))
    settings: dict[str, Any] = {"pairs_per_shard": 2, "num_shards": None, "seed": 1, "overwrite": False}
    shards = write_shards(tmp_path / "lmdb/train", tmp_path / "out", **settings, shrink=256)
    assert (shards.num_pairs, shards.num_shrunk) == (3, 1)
    pairs = ShardPairs(shards.pattern)
    found = {pair.image_id: pair.picture for pair in map(pairs.__getitem__, range(3))}
    assert found == {1: shrunk(large, 256), 2: picture(), 3: picture()}

"""Torch datasets and the loader: order, values, ids of both kinds, and errors that name the picture."""

import base64
import errno
import logging
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import GOLDEN_LMDB, CodePoints, jsonl_line, picture
from PIL import Image
from torch import Tensor
from unreadable_files import unreadable

from cn_clip.clip.transforms import MEAN, STD, ImageTransform
from cn_clip.data.datasets import LmdbPairs, PairBatch, PairDataset, make_loader
from cn_clip.data.lmdb_store import Pair, SplitWriter
from cn_clip.data.pictures import ClassFolders, LmdbPictures, PictureDataset, PictureFiles, batches
from cn_clip.data.records import read_texts
from cn_clip.errors import ConfigError, DataError, UnreadableError

REFERENCE = GOLDEN_LMDB / "lmdb" / "train"

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def to_tensor(image: Image.Image) -> Tensor:
    """Stands in for the transform of a model: the colour of the first pixel as (3, 1, 1)."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)[:1, :1]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def fail(_image: Image.Image) -> Tensor:
    raise OSError("broken data stream")


def make_split(folder: Path, *, broken: bool = False) -> Path:
    with SplitWriter(folder) as writer:
        for number in range(8):
            data = b"not a picture" if broken and number == 5 else picture((number, 0, 0))
            writer.put_image(number, base64.b64encode(data))
            writer.put_pair(Pair(number, f"t{number}", chr(ord("a") + number)))
    return folder


def test_pairs_of_the_reference_come_as_pictures_and_tokens(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        dataset = PairDataset(LmdbPairs(REFERENCE), to_tensor, CodePoints(12))
    assert caplog.messages == ["train LMDB file contains 4 images and 4 pairs."]
    pair = dataset[1]
    assert pair.pixels.flatten().tolist() == [251, 239, 190]
    assert "".join(map(chr, pair.tokens.tolist())) == "“浅黄”的 Block\0"
    ids = [(pair.image_id, pair.text_id) for pair in (dataset[index] for index in range(len(dataset)))]
    assert ids == [(10, 1), (9, 2), (10, 2), ("a-7", "t-3")]


def test_the_name_in_the_log_can_be_given(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        LmdbPairs(REFERENCE, split="val")
    assert caplog.messages == ["val LMDB file contains 4 images and 4 pairs."]


def test_pictures_come_in_key_order_with_ids_of_both_kinds() -> None:
    pictures = LmdbPictures(REFERENCE / "imgs")
    assert [pictures[index].key for index in range(len(pictures))] == [10, 100, 9, "a-7"]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_come_in_order_with_ids_as_lists(tmp_path: Path, num_workers: int) -> None:
    folder = make_split(tmp_path / "train")
    dataset = PictureDataset(LmdbPictures(folder / "imgs"), to_tensor)
    loader = make_loader(dataset, 3, num_workers)
    batches = list(loader)
    assert len(loader) == 3
    assert [ids for ids, _ in batches] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    assert [image[:, 0].flatten().tolist() for _, image in batches] == [[0, 1, 2], [3, 4, 5], [6, 7]]


@pytest.mark.parametrize("num_threads", [0, 1, 3])
def test_threads_decode_the_same_batches(tmp_path: Path, num_threads: int) -> None:
    folder = make_split(tmp_path / "train") / "imgs"
    found = list(batches(LmdbPictures(folder), ImageTransform(2), 3, num_threads))
    assert [ids for ids, _ in found] == [[0, 1, 2], [3, 4, 5], [6, 7]]
    alone = PictureDataset(LmdbPictures(folder), ImageTransform(2).array)
    expected = np.stack([alone[index][1] for index in range(8)])
    assert expected[:, 0, 0, 0] == pytest.approx([(red / 255 - MEAN[0]) / STD[0] for red in range(8)], abs=1e-6)
    assert [pixels.shape for _, pixels in found] == [(3, 3, 2, 2), (3, 3, 2, 2), (2, 3, 2, 2)]
    np.testing.assert_array_equal(np.concatenate([pixels for _, pixels in found]), expected)


@pytest.mark.parametrize("num_threads", [0, 2])
def test_threads_stop_at_a_picture_that_does_not_decode_with_folder_and_id(tmp_path: Path, num_threads: int) -> None:
    folder = make_split(tmp_path / "train", broken=True)
    found = batches(LmdbPictures(folder / "imgs"), ImageTransform(2), 4, num_threads)
    assert next(found)[0] == [0, 1, 2, 3]
    with pytest.raises(DataError, match=f"^{folder}/imgs: image id 5: the picture of 13 bytes does not decode"):
        next(found)


@pytest.mark.parametrize(("batch_size", "num_threads"), [(0, 0), (1, -1)])
def test_impossible_settings_of_batches_are_refused(batch_size: int, num_threads: int) -> None:
    with pytest.raises(ConfigError, match="batch size of 1 or more and 0 or more workers"):
        batches(PictureFiles(["a"]), ImageTransform(2), batch_size, num_threads)
    with pytest.raises(DataError, match="the dataset is empty"):
        batches(PictureFiles([]), ImageTransform(2), 1, 1)


def test_a_sampler_sets_the_order_and_drop_last_drops(tmp_path: Path) -> None:
    dataset = PairDataset(LmdbPairs(make_split(tmp_path / "train")), to_tensor, CodePoints(4))
    (batch,) = make_loader(dataset, 2, sampler=[3, 1, 7], drop_last=True)
    assert isinstance(batch, PairBatch)
    assert (batch.pixels[:, 0].flatten().tolist(), batch.tokens[:, 0].tolist()) == ([3, 1], [100, 98])
    assert (batch.image_id, batch.text_id, batch.num_skipped) == ([3, 1], ["t3", "t1"], [0, 0])


def test_a_spawned_worker_reads_the_pickled_dataset(tmp_path: Path) -> None:
    dataset = PairDataset(LmdbPairs(make_split(tmp_path / "train")), to_tensor, CodePoints(4))
    pair = pickle.loads(pickle.dumps(dataset))[3]
    assert (pair.pixels.flatten().tolist(), pair.tokens.tolist()) == ([3, 0, 0], [100, 0, 0, 0])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_picture_that_does_not_decode_stops_with_folder_and_id(tmp_path: Path, num_workers: int) -> None:
    folder = make_split(tmp_path / "train", broken=True)
    loader = make_loader(PairDataset(LmdbPairs(folder), to_tensor, CodePoints()), 2, num_workers)
    with pytest.raises(DataError) as caught:
        list(loader)
    assert str(caught.value) == (
        f"{folder}/imgs: image id 5: the picture of 13 bytes does not decode (no known picture format)"
    )


def test_an_error_inside_the_transform_names_the_picture(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="imgs: image id 0: broken data stream"):
        PictureDataset(LmdbPictures(make_split(tmp_path / "train") / "imgs"), fail)[0]


def test_skipping_puts_the_next_pair_in_place_and_counts_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = PairDataset(
        LmdbPairs(make_split(tmp_path / "train", broken=True)), to_tensor, CodePoints(), on_error="skip"
    )
    pair = dataset[5]
    assert (pair.pixels[0].item(), pair.tokens[0].item(), pair.image_id, pair.num_skipped) == (6, ord("g"), 6, 1)
    assert "image id 5" in caplog.text
    assert [batch[-1] for batch in make_loader(dataset, 4)] == [[0, 0, 0, 0], [0, 1, 0, 0]]


def test_skipping_everything_stops(tmp_path: Path) -> None:
    dataset = PairDataset(LmdbPairs(make_split(tmp_path / "train")), fail, CodePoints(), on_error="skip")
    with pytest.raises(DataError, match="image id 7: broken data stream; nor can any other"):
        dataset[0]


def test_a_split_without_pairs_is_refused(tmp_path: Path) -> None:
    with SplitWriter(tmp_path / "test") as writer:
        writer.put_image(1, base64.b64encode(picture()))
    with pytest.raises(DataError, match="pairs: holds no pair"):
        LmdbPairs(tmp_path / "test")


def test_workers_use_one_thread_each(tmp_path: Path) -> None:
    class Threads(torch.utils.data.Dataset[tuple[int]]):
        def __len__(self) -> int:
            return 1

        def __getitem__(self, index: int) -> tuple[int]:
            return (torch.get_num_threads(),)

    assert list(make_loader(Threads(), 1, 1)) == [([1],)]


def test_a_program_that_an_error_ends_waits_for_no_worker() -> None:
    code = """
from cn_clip.data.datasets import make_loader
loader = make_loader([(number,) for number in range(99)], 2, 1)
batches = iter(loader)  # its worker lives as long as the loader, which the error leaves in use
assert next(batches) == ([0, 1],)
raise SystemExit(3)
"""
    assert subprocess.run([sys.executable, "-c", code], timeout=120, check=False).returncode == 3


@pytest.mark.parametrize(("batch_size", "num_workers"), [(0, 0), (1, -1)])
def test_impossible_loader_settings_are_refused(tmp_path: Path, batch_size: int, num_workers: int) -> None:
    with pytest.raises(ConfigError, match="batch size of 1 or more"):
        make_loader(PictureDataset(PictureFiles(["a"]), to_tensor), batch_size, num_workers)


def test_picture_files_come_with_their_paths(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture((9, 8, 7)))
    dataset = PictureDataset(PictureFiles([tmp_path / "a.png", str(tmp_path / "gone.png")]), to_tensor)
    path, image = dataset[0]
    assert (path, image.flatten().tolist()) == (str(tmp_path / "a.png"), [9, 8, 7])
    with pytest.raises(DataError, match=r"gone.png: cannot be read \(No such file"):
        dataset[1]


def test_class_folders_are_labelled_in_sorted_order(tmp_path: Path) -> None:
    for name, colour in (("002/b.PNG", 2), ("000/z.png", 0), ("000/a/c.png", 1), ("010/x.png", 10)):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture((colour, 0, 0)))
    for name in ("000/notes.txt", "000/._z.png", ".cache/x.png", "x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    folders = ClassFolders(tmp_path)
    assert folders.classes == ["000", "002", "010"]
    names = [(os.path.relpath(path, tmp_path), label) for path, label in folders.samples]
    assert names == [("000/z.png", 0), ("000/a/c.png", 0), ("002/b.PNG", 1), ("010/x.png", 2)]
    dataset = PictureDataset(folders, to_tensor)
    assert [image[0].item() for _, image in (dataset[index] for index in range(4))] == [0, 1, 2, 10]


def test_class_folders_without_a_class_or_a_picture_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="gone: no such folder"):
        ClassFolders(tmp_path / "gone")
    with pytest.raises(DataError, match="holds no sub-folder"):
        ClassFolders(tmp_path)
    (tmp_path / "000").mkdir()
    with pytest.raises(DataError, match="000: holds no picture"):
        ClassFolders(tmp_path)


def test_a_class_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path) -> None:
    for name in ("a", "b", "b/c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(picture((1, 2, 3)))
    with (
        unreadable(errno.ESTALE, tmp_path / "b" / "c"),
        pytest.raises(UnreadableError, match=r"b/c: cannot be read just now \(.*, errno"),
    ):
        ClassFolders(tmp_path)
    assert len(ClassFolders(tmp_path)) == 3


def test_texts_are_read_as_written_and_numbers_become_text(tmp_path: Path) -> None:
    path = tmp_path / "valid_texts.jsonl"
    path.write_bytes(jsonl_line(1, "“A”红") + jsonl_line("x", 12) + b'{"text_id": "3", "text": 1.5}\n')
    assert read_texts(path) == [(1, "“A”红"), ("x", "12"), (3, "1.5")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[]", "expected a JSON object"),
        (b'{"text": "a"}', "the field 'text_id' is missing"),
        (b'{"text_id": 1}', "the field 'text' is missing"),
        (b'{"text_id": 1, "text": ["a"]}', "text of text_id 1: expected a string, got list"),
        (b'{"text_id": 1.5, "text": "a"}', "expected an integer or string id"),
        (b"\xff", "invalid UTF-8"),
    ],
)
def test_a_bad_text_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "valid_texts.jsonl"
    path.write_bytes(jsonl_line(1) + line + b"\n")
    with pytest.raises(DataError) as caught:
        read_texts(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert message in str(caught.value)


def test_an_empty_text_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(b"\n")
    with pytest.raises(DataError, match=r"t.jsonl: the file is empty"):
        read_texts(tmp_path / "t.jsonl")

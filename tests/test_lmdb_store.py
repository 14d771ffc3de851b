"""The LMDB layout: what the reference wrote is read, what is written has its layout, nothing else is let in."""

import errno
import io
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import lmdb
import pytest
from dataset_files import GOLDEN_LMDB
from PIL import Image
from unreadable_files import unreadable

from cn_clip.data.lmdb_store import (
    ImageStore,
    LmdbReader,
    LmdbWriter,
    Pair,
    PairStore,
    SplitWriter,
    is_split_folder,
    unpickle_pair,
)
from cn_clip.errors import DataError, UnreadableError

REFERENCE = GOLDEN_LMDB / "lmdb" / "train"  # written by build_lmdb_dataset.py of cn_clip 1.6.0 from the files beside it


def raw_items(folder: Path) -> dict[bytes, bytes]:
    with lmdb.open(str(folder), readonly=True, lock=False) as env, env.begin() as transaction:
        return dict(transaction.cursor())


def write_raw(folder: Path, items: dict[bytes, bytes]) -> Path:
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**20) as env, env.begin(write=True) as transaction:
        for key, value in items.items():
            transaction.put(key, value)
    return folder


def small_split(folder: Path) -> Path:
    with SplitWriter(folder) as writer:
        writer.put_image(10, b"QUJD")
        writer.put_image("a", b"-_-_")
        writer.put_pair(Pair(10, 1, "红"))
        writer.put_pair(Pair("a", "t", "蓝"))
    return folder


def test_pictures_written_by_the_reference_are_read_in_key_order() -> None:
    store = ImageStore(REFERENCE / "imgs")
    assert store.ids == [10, 100, 9, "a-7"]
    assert (len(store), store.num_images) == (4, 4)
    colours = [Image.open(io.BytesIO(store.picture(i))).convert("RGB").getpixel((0, 0)) for i in (10, 9, "a-7")]
    assert colours == [(255, 0, 0), (251, 239, 190), (0, 0, 255)]


def test_pairs_written_by_the_reference_are_read_in_order() -> None:
    store = PairStore(REFERENCE / "pairs")
    assert [store[index] for index in range(len(store))] == [
        (10, 1, "红色的方块"),
        (9, 2, "“浅黄”的 Block"),
        (10, 2, "“浅黄”的 Block"),
        ("a-7", "t-3", "蓝"),
    ]


def test_the_layout_is_the_one_the_reference_reads(tmp_path: Path) -> None:
    small_split(tmp_path / "train")
    assert raw_items(tmp_path / "train" / "imgs") == {b"10": b"QUJD", b"a": b"-_-_", b"num_images": b"2"}
    pairs = raw_items(tmp_path / "train" / "pairs")
    assert pairs.pop(b"num_samples") == b"2"
    assert {key: pickle.loads(value) for key, value in pairs.items()} == {b"0": (10, 1, "红"), b"1": ("a", "t", "蓝")}
    assert type(pickle.loads(pairs[b"0"])) is tuple


def test_the_map_grows_beyond_its_first_size_and_stays_small_on_disk(tmp_path: Path) -> None:
    with LmdbWriter(tmp_path / "imgs", b"num_images", map_bytes=2**16) as writer:
        for number in range(50):
            writer.put(str(number).encode(), bytes([number]) * 40_000)
        writer.put(b"large", b"x" * 20_000_000)
    reader = LmdbReader(tmp_path / "imgs")
    assert reader.get(b"49") == b"1" * 40_000
    assert len(reader.get(b"large") or b"") == 20_000_000
    assert reader.stored_count(b"num_images") == 51
    assert (tmp_path / "imgs" / "data.mdb").stat().st_size < 24_000_000


def test_both_base64_alphabets_give_the_picture(tmp_path: Path) -> None:
    store = ImageStore(small_split(tmp_path / "train") / "imgs")
    assert store.picture(10) == b"ABC"
    assert store.picture("a") == b"\xfb\xff\xbf"


def test_one_folder_is_opened_by_many_readers_of_a_process(tmp_path: Path) -> None:
    folder = small_split(tmp_path / "train") / "imgs"
    first, second = ImageStore(folder), ImageStore(f"{tmp_path}/train/../train/imgs")
    assert first.picture(10) == second.picture(10) == b"ABC"
    del first
    assert second.picture(10) == b"ABC"


def test_a_rebuilt_folder_is_read_anew(tmp_path: Path) -> None:
    old = ImageStore(small_split(tmp_path / "train") / "imgs")
    (tmp_path / "train").rename(tmp_path / "old")
    with SplitWriter(tmp_path / "train") as writer:
        writer.put_image(10, b"QUFB")
    assert ImageStore(tmp_path / "train" / "imgs").picture(10) == b"AAA"
    assert old.picture(10) == b"ABC"


def test_a_pickled_store_reads_again(tmp_path: Path) -> None:
    folder = small_split(tmp_path / "train")
    images, pairs = pickle.loads(pickle.dumps((ImageStore(folder / "imgs"), PairStore(folder / "pairs"))))
    assert images.picture(10) == b"ABC"
    assert pairs[1] == Pair("a", "t", "蓝")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_reads_with_its_own_handle(tmp_path: Path) -> None:
    store = ImageStore(small_split(tmp_path / "train") / "imgs")
    another = ImageStore(tmp_path / "train" / "imgs")
    parents_handle = store._reader._env()
    child = os.fork()
    if child == 0:
        good = store.picture(10) == b"ABC" == another.picture(10) and store._reader._env() is not parents_handle
        os._exit(0 if good else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert store.picture(10) == b"ABC"


@pytest.mark.parametrize("says", [1, 3])
def test_pictures_are_not_listed_when_they_are_not_as_many_as_promised(tmp_path: Path, says: int) -> None:
    items = {b"7": b"QUJD", b"8": b"QUJD", b"num_images": str(says).encode()}
    store = ImageStore(write_raw(tmp_path / "imgs", items))
    for ask in (lambda: store.ids, lambda: len(store)):
        with pytest.raises(DataError) as caught:
            ask()
        assert str(caught.value) == (
            f"{tmp_path / 'imgs'}: num_images says {says}, but it holds 2 pictures; build the dataset again"
        )
    assert (store.listed, store.picture(7)) == ([7, 8], b"ABC")  # for checks, and for pairs that name one


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_an_lmdb_that_cannot_be_read_now_is_not_called_absent(tmp_path: Path, number: int) -> None:
    folder = small_split(tmp_path / "train")
    with unreadable(number, folder, stat=True):
        for ask in (lambda: ImageStore(folder / "imgs"), lambda: is_split_folder(folder)):
            with pytest.raises(UnreadableError, match=rf"data\.mdb: cannot be read just now \(.*, errno {number}\)"):
                ask()
    with pytest.raises(DataError, match="no LMDB is here"):
        ImageStore(tmp_path / "absent")


def test_a_missing_picture_names_folder_and_id(tmp_path: Path) -> None:
    store = ImageStore(small_split(tmp_path / "train") / "imgs")
    assert store.base64(11) is None
    with pytest.raises(DataError, match=r"imgs: image id 11: no such picture") as raised:
        store.picture(11)
    assert (raised.value.path, raised.value.id) == (store.folder, 11)


def test_damaged_base64_names_folder_and_id(tmp_path: Path) -> None:
    store = ImageStore(write_raw(tmp_path / "imgs", {b"7": b"QUJ", b"num_images": b"1"}))
    with pytest.raises(DataError, match=r"imgs: image id 7: the base64 text of 3 characters is truncated") as raised:
        store.picture(7)
    assert (raised.value.path, raised.value.id) == (store.folder, 7)


class _Evil:
    def __reduce__(self) -> Any:
        return os.system, ("touch /tmp/never",)


@pytest.mark.parametrize(
    "value",
    [_Evil(), (1, 2, _Evil()), (1, 2), (1, 2, 3), [1, 2, "a"], "abc", (1.0, 2, "a"), (True, 2, "a"), (1, "", "a")],
)
def test_a_pickle_that_is_not_the_triple_is_refused(value: object) -> None:
    with pytest.raises(DataError):
        unpickle_pair(pickle.dumps(value))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_the_triple_is_read_in_every_pickle_protocol(protocol: int) -> None:
    assert unpickle_pair(pickle.dumps((1, "2", "文字"), protocol=protocol)) == Pair(1, 2, "文字")


@pytest.mark.parametrize("data", [b"", b"\x80\x04", b"garbage", b"cos\nsystem\n(S'true'\ntR."])
def test_bytes_that_are_no_pickle_are_refused(data: bytes) -> None:
    with pytest.raises(DataError, match="refused"):
        unpickle_pair(data)


def test_a_refused_pair_names_folder_and_index(tmp_path: Path) -> None:
    store = PairStore(write_raw(tmp_path / "pairs", {b"0": pickle.dumps([1]), b"num_samples": b"2"}))
    with pytest.raises(DataError, match=r"pairs: pair 0: expected a pickled"):
        store[0]
    with pytest.raises(DataError, match=r"pairs: pair 1: it is missing"):
        store[1]
    with pytest.raises(IndexError):
        store[2]


def test_a_folder_without_an_lmdb_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere: no LMDB is here .*\.\.\./lmdb/train/imgs"):
        ImageStore(tmp_path / "nowhere")
    with pytest.raises(DataError, match="expected a number under 'num_images'"):
        ImageStore(small_split(tmp_path / "train") / "pairs")


def test_a_file_that_is_no_lmdb_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data.mdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(DataError, match="cannot be read as an LMDB"):
        ImageStore(tmp_path)


def test_a_file_cut_short_is_refused_instead_of_crashing(tmp_path: Path) -> None:
    folder = write_raw(tmp_path / "imgs", {b"1": b"A" * 100_000, b"num_images": b"1"})
    os.truncate(folder / "data.mdb", 40_000)
    with pytest.raises(DataError, match=r"data.mdb: cut short, 40000 of \d+ bytes"):
        ImageStore(folder)


def changed(folder: Path, page: int, offset: int, value: bytes) -> None:
    with (folder / "data.mdb").open("r+b") as stream:
        stream.seek(page * 4096 + offset)
        stream.write(value)


def leaf_of(folder: Path) -> tuple[int, list[int]]:
    """The number of the leaf page, and where its nodes are."""
    data = (folder / "data.mdb").read_bytes()
    for page in range(2, len(data) // 4096):
        number, _, flags, lower, _ = struct.unpack_from("<QHHHH", data, page * 4096)
        if (number, flags) == (page, 2):
            return page, list(struct.unpack_from(f"<{(lower - 16) // 2}H", data, page * 4096 + 16))
    raise AssertionError("no leaf")


@pytest.mark.parametrize("what", ["pointer", "key", "value", "long value", "page of the value", "lower"])
def test_a_damaged_page_near_the_end_is_refused_instead_of_crashing(tmp_path: Path, what: str) -> None:
    picture = b"QUJD" * (3000 if "value" in what and what != "value" else 1)
    folder = write_raw(tmp_path / "imgs", {b"1": picture, b"num_images": b"1"})
    assert LmdbReader(folder).get(b"1") == picture
    (folder / "other").write_bytes((folder / "data.mdb").read_bytes())
    (folder / "other").rename(folder / "data.mdb")  # the first one stays open
    page, nodes = leaf_of(folder)
    at, value = {
        "pointer": (16, struct.pack("<H", 0x80A0)),
        "key": (nodes[0] + 6, struct.pack("<H", 60_000)),
        "value": (nodes[0], struct.pack("<HH", 0, 1)),
        "long value": (nodes[0], struct.pack("<HH", 0, 1)),
        "page of the value": (nodes[0] + 8 + 1, struct.pack("<Q", 100)),
        "lower": (12, struct.pack("<H", 4097)),
    }[what]
    changed(folder, page, at, value)
    with pytest.raises(DataError, match=rf"data\.mdb: page {page} is damaged; copy or build it again"):
        ImageStore(folder)


def test_a_split_folder_holds_both_parts(tmp_path: Path) -> None:
    assert is_split_folder(small_split(tmp_path / "train"))
    assert is_split_folder(REFERENCE)
    assert not is_split_folder(tmp_path)


def fail_while_writing(folder: Path) -> None:
    with SplitWriter(folder) as writer:
        writer.put_image(1, b"QUJD")
        raise ZeroDivisionError


def test_an_error_while_writing_is_the_one_that_comes_out(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        fail_while_writing(tmp_path / "train")
    assert raw_items(tmp_path / "train" / "imgs") == {}

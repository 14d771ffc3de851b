"""WebDataset shards: names, headers, samples, errors that name shard and member, and training from them."""

import gzip
import io
import json
import logging
import os
import pickle
import re
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_files import picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from cn_clip.data.datasets import PairDataset, make_loader
from cn_clip.data.shards import ShardPairs, expand_braces, is_shards, shard_paths, tar_members
from cn_clip.errors import ConfigError, DataError
from cn_clip.training.sampling import EpochNumbers, ShardSampler

pytestmark = pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")


def write_tar(path: Path, members: "Mapping[str, bytes] | list[tuple[str, bytes]]", *, format: int = 0) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(number: int, name: str | None = None) -> dict[str, bytes]:
    key = name or f"{number:04d}"
    return {f"{key}.png": picture((number, 0, 0)), f"{key}.txt": f"第{number}张".encode()}


def colour(image: Image.Image) -> Tensor:
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)[:1, :1]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1)


def tokenize(texts: list[str], context_length: int) -> Tensor:
    rows = [[ord(character) for character in text][:context_length] for text in texts]
    return torch.tensor([row + [0] * (context_length - len(row)) for row in rows])


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}/{0..1}", ["a/0", "a/1", "b/0", "b/1"]),
        ("x{a,b{1..2},}y", ["xay", "xb1y", "xb2y", "xy"]),
        ("{{0..1},{7..8}}", ["0", "1", "7", "8"]),
        ("{one}.tar", ["{one}.tar"]),
        ("{one{0..1}}", ["{one0}", "{one1}"]),
        ("{open", ["{open"]),
        ("shut}", ["shut}"]),
    ],
)
def test_braces_expand_as_in_a_shell(text: str, expanded: list[str]) -> None:
    assert expand_braces(text) == expanded


@given(st.text(alphabet="{},.ab01", max_size=12))
def test_braces_of_any_shape_expand_to_something(text: str) -> None:
    assert expand_braces(text)


@pytest.mark.parametrize("text", ["{0..1000000}", "{0..9999}{0..999}"])
def test_too_many_shards_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="more than 1,000,000 shards"):
        expand_braces(text)


def test_values_that_name_shards_are_told_from_lmdb_folders(tmp_path: Path) -> None:
    for value in ("a/{000..099}.tar", "a/*", "A.TAR", "a.tar.gz", "a::b", "{a,b}.tar"):
        assert is_shards(value), value
    strange = tmp_path / "lmdb{1}"
    strange.mkdir()
    for value in ("data/lmdb/train", str(strange), "tar"):
        assert not is_shards(value), value


def test_paths_come_from_braces_globs_and_lists_in_order(tmp_path: Path) -> None:
    for name in ("0.tar", "1.tar", "x.tar", "y[1].tar"):
        write_tar(tmp_path / name, {})
    names = [Path(path).name for path in shard_paths(f"{tmp_path}/{{1..0}}.tar::{tmp_path}/x*.tar")]
    assert names == ["1.tar", "0.tar", "x.tar"]
    assert shard_paths(f"{tmp_path}/y[1].tar") == [f"{tmp_path}/y[1].tar"]


def test_paths_that_cannot_be_are_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {})
    (tmp_path / "0.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"1\.tar: no such shard"):
        shard_paths(f"{tmp_path}/{{0..1}}.tar")
    with pytest.raises(DataError, match=r"0\.tar\.gz: is compressed"):
        shard_paths(f"{tmp_path}/0.tar.gz")
    with pytest.raises(ConfigError, match=r"names .*/0\.tar twice"):
        shard_paths(f"{tmp_path}/0.tar::{tmp_path}/0.tar")
    for value in ("https://a.b/{0..1}.tar", "pipe:cat 0.tar"):
        with pytest.raises(ConfigError, match="expected local tar files"):
            shard_paths(value)


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=90)


@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=1100)), max_size=5),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_those_that_tarfile_finds(members: list[tuple[str, bytes]], format: int) -> None:
    with tempfile.NamedTemporaryFile() as stream:
        write_tar(Path(stream.name), [(f"folder/{name}", data) for name, data in members], format=format)
        with tarfile.open(stream.name) as tar:
            theirs = [(info.name, info.offset_data, info.size) for info in tar]
        assert [tuple(member) for member in tar_members(stream.file, "x")] == theirs


def test_folders_and_links_are_no_members_and_ustar_prefixes_are_read(tmp_path: Path) -> None:
    long = "d" * 90 + "/" + "f" * 50 + ".txt"
    with tarfile.open(tmp_path / "a.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        for kind, name in ((tarfile.DIRTYPE, "d"), (tarfile.SYMTYPE, "s.txt"), (tarfile.LNKTYPE, "h.txt")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, "0001.txt", 0
            tar.addfile(info)
        tar.addfile(tarfile.TarInfo(long))
    with open(tmp_path / "a.tar", "rb") as stream:
        assert [member.name for member in tar_members(stream, "x")] == [long]


def test_pairs_come_with_text_and_ids_from_txt_or_json(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        {
            "./x/0001.PNG": picture((1, 0, 0)),
            "./x/0001.txt": " 红色\n".encode(),
            "__index__.json": b"{}",
            "._0001.png": b"",
            "0002.json": json.dumps({"caption": "绿色", "image_id": "7", "text_id": "t"}).encode(),
            "0002.jpg": picture((0, 255, 0), kind="JPEG"),
            "0002.cls": b"3",
            "0003.txt": "蓝色".encode(),
            "0003.json": b'{"text": "not this", "image_id": null, "text_id": 4}',
            "0003.webp": picture((0, 0, 255), kind="WEBP"),
        },
    )
    pairs = ShardPairs(str(shard))
    assert [tuple(pairs[number])[1:4] for number in range(len(pairs))] == [
        ("红色", f"{shard}/x/0001", f"{shard}/x/0001"),
        ("绿色", 7, "t"),
        ("蓝色", f"{shard}/0003", 4),
    ]
    assert pairs[0].picture == picture((1, 0, 0))
    assert pairs[1].picture == picture((0, 255, 0), kind="JPEG")


def test_members_of_a_sample_need_not_lie_together(tmp_path: Path) -> None:
    parts = {**sample(1), **sample(2)}
    shard = write_tar(tmp_path / "a.tar", {name: parts[name] for name in sorted(parts, key=lambda n: n[::-1])})
    pairs = ShardPairs(str(shard))
    assert [pairs[number].text for number in range(2)] == ["第1张", "第2张"]


def faulty(tmp_path: Path, kind: str) -> tuple[Path, str, int]:
    """A shard with a fault, what the error says of it, and the number of whole samples."""
    path, whole = tmp_path / "000.tar", {**sample(1), **sample(2)}
    if kind in ("text", "picture"):
        left = {"text": "x.png", "picture": "x.txt"}[kind]
        write_tar(path, {**sample(1), left: b"?", **sample(2)})
        return path, rf"000\.tar: sample 'x' has no {kind}", 2
    if kind == "twice":
        write_tar(path, [*sample(1).items(), ("0001.jpg", b"?"), *sample(2).items()])
        return path, r"000\.tar: member '0001\.jpg': the sample has '0001\.png' already", 2
    data = write_tar(path, whole).read_bytes()
    if kind == "gzip":
        path.write_bytes(gzip.compress(data))
        return path, r"000\.tar: is compressed, so samples", 0
    if kind == "empty":
        path.write_bytes(b"")
        return path, r"000\.tar: cut short at byte 0", 0
    if kind == "cut member":
        path.write_bytes(data[: 3 * 1024 + 512 + 5])
        return path, r"000\.tar: cut short, member '0002\.txt' has 5 of 7 bytes", 1
    if kind == "cut end":
        path.write_bytes(data[: 4 * 1024])
        return path, r"000\.tar: cut short at byte 4096, the end mark is missing", 2
    path.write_bytes(data[:2048] + b"\1" + data[2049:])
    return path, r"000\.tar: byte 2048: expected the header of a tar member, its checksum is wrong", 1


KINDS = ["text", "picture", "twice", "gzip", "empty", "cut member", "cut end", "damaged"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_faulty_shard_stops_naming_shard_and_member(tmp_path: Path, kind: str) -> None:
    path, message, _ = faulty(tmp_path, kind)
    with pytest.raises(DataError, match=message):
        ShardPairs(str(path))


@pytest.mark.parametrize("kind", KINDS)
def test_a_faulty_shard_gives_its_whole_samples_when_faults_are_skipped(
    tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, message, num_whole = faulty(tmp_path, kind)
    other = write_tar(tmp_path / "001.tar", sample(3))
    pairs = ShardPairs(f"{path}::{other}", on_error="skip")
    assert pairs.shard_sizes == [num_whole, 1]
    assert pairs[num_whole].text == "第3张"
    assert re.search(message, caplog.text)
    assert f"skipped {1 + (kind == 'cut member')} faults of the shards in all" in caplog.text


def test_a_shard_without_a_sample_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", {"notes.md": b""})
    with pytest.raises(DataError, match=r"0\.tar: holds no sample; expected members such as 0001\.jpg"):
        ShardPairs(f"{tmp_path}/0.tar")
    with pytest.raises(DataError, match=r"0\.tar: holds no pair"):
        ShardPairs(f"{tmp_path}/0.tar", on_error="skip")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"x.txt": b"\xff"}, r"sample 'x': its .txt is not UTF-8 \(byte 0\)"),
        ({"x.txt": b" \n"}, "sample 'x': its text is empty"),
        ({"x.json": b"{"}, "sample 'x': not valid JSON"),
        ({"x.json": b'{"title": "a"}'}, "sample 'x': expected a string under text or caption in its .json, got None"),
        ({"x.json": b'{"text": 5}'}, ".*got 5"),
        ({"x.json": b'{"text": "a", "image_id": 1.5}'}, "sample 'x': image_id in its .json: expected an integer"),
    ],
)
def test_a_text_that_is_none_is_named_when_it_is_read(tmp_path: Path, parts: dict[str, bytes], message: str) -> None:
    pairs = ShardPairs(str(write_tar(tmp_path / "0.tar", {"x.png": picture(), **parts})))
    with pytest.raises(DataError, match=rf"0\.tar: {message}"):
        pairs[0]


def test_a_shard_that_goes_or_shrinks_while_in_use_is_named(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "0.tar", sample(1))
    pairs = ShardPairs(str(shard))
    os.truncate(shard, 600)
    with pytest.raises(DataError, match=r"0\.tar: sample '0001': the file became shorter"):
        pairs[0]
    shard.unlink()
    with pytest.raises(DataError, match=r"0\.tar: sample '0001': cannot be read \(No such file"):
        pickle.loads(pickle.dumps(pairs))[0]


def shards(folder: Path, sizes: list[int], *, broken: int | None = None) -> ShardPairs:
    numbers = iter(range(sum(sizes)))
    for shard, size in enumerate(sizes):
        members: dict[str, bytes] = {}
        for number in (next(numbers) for _ in range(size)):
            members |= {**sample(number), **({f"{number:04d}.png": b"?"} if number == broken else {})}
        write_tar(folder / f"{shard:03d}.tar", members)
    return ShardPairs(f"{folder}/{{000..{len(sizes) - 1:03d}}}.tar")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loading_processes_read_the_samples_that_the_sampler_names(tmp_path: Path, num_workers: int) -> None:
    pairs = shards(tmp_path, [5, 7, 4])
    sampler = ShardSampler(pairs.shard_sizes, 3, seed=1, num_workers=num_workers)
    sampler.epoch, sampler.start = 2, 1
    pairs[0]  # opens a file in this process, whose position must not be shared
    dataset = PairDataset(pairs, colour, tokenize, context_length=8)
    batches = list(make_loader(dataset, 3, num_workers, sampler=EpochNumbers(sampler)))
    assert [batch[0][:, 0].flatten().tolist() for batch in batches] == sampler.batches()
    assert all(chr(code) == "第" for batch in batches for code in batch[1][:, 0].tolist())


def test_an_unreadable_picture_is_replaced_from_the_same_shard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = PairDataset(shards(tmp_path, [2, 3, 2], broken=4), colour, tokenize, on_error="skip")
    with caplog.at_level(logging.WARNING):
        pair = dataset[4]
    assert (pair.pixels[0].item(), pair.num_skipped, pair.image_id) == (2, 1, f"{tmp_path}/001.tar/0002")
    assert "001.tar: sample '0004': the picture of 1 bytes does not decode" in caplog.text


def test_only_a_few_files_stay_open(tmp_path: Path) -> None:
    pairs = shards(tmp_path, [1] * 20)
    for _ in range(2):
        assert [pairs[number].text for number in range(20)] == [f"第{number}张" for number in range(20)]
    assert len(os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []) < 60
    assert len(pairs._files._files) == 8

"""WebDataset shards: names, headers, samples, errors that name shard and member, and training from them."""

import base64
import gzip
import io
import itertools
import json
import logging
import os
import pickle
import re
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_files import CodePoints, jsonl_line, picture, run_script, tree, tsv_line, write_split
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from cn_clip.data import tars
from cn_clip.data.datasets import LmdbPairs, PairDataset, make_loader
from cn_clip.data.lmdb_store import Pair, SplitWriter
from cn_clip.data.paths import spelled
from cn_clip.data.shards import ShardPairs
from cn_clip.data.tars import expand_braces, is_shards, shard_paths, tar_members
from cn_clip.errors import ConfigError, DataError
from cn_clip.preprocess import write_shards
from cn_clip.training.inputs import EpochNumbers, ShardSampler, training_data
from cn_clip.training.params import Options

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


@settings(deadline=None)
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
    (tmp_path / "link.tar").symlink_to("0.tar")
    for again in (f"{tmp_path}/./0.tar", f"{tmp_path}/link.tar"):  # one file: each pair would come twice
        with pytest.raises(ConfigError, match=r"names .*/0\.tar twice"):
            shard_paths(f"{tmp_path}/0.tar::{again}")
    for value in ("https://a.b/{0..1}.tar", "pipe:cat 0.tar"):
        with pytest.raises(ConfigError, match="expected local tar files"):
            shard_paths(value)


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=90)


@settings(deadline=None)
@given(
    st.lists(st.tuples(NAMES, st.binary(max_size=1100)), max_size=5),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)
def test_members_are_those_that_tarfile_finds(members: list[tuple[str, bytes]], format: int) -> None:
    with tempfile.NamedTemporaryFile() as stream:
        write_tar(Path(stream.name), [(f"folder/{name}", data) for name, data in members], format=format)
        with tarfile.open(stream.name) as tar:
            theirs = [(spelled(info.name), info.offset_data, info.size) for info in tar]
        assert [tuple(member) for member in tar_members(stream.file, "x")] == theirs


def header(kind: bytes, name: bytes, size: bytes) -> bytes:
    """A tar header with any size field, right checksum."""
    block = name.ljust(124, b"\0") + size.ljust(12, b"\0") + b" " * 20 + kind + b"\0" * 100 + b"ustar\x0000"
    block = block.ljust(512, b"\0")
    return block[:148] + b"%06o\0 " % sum(block) + block[156:]


def members_of(path: Path, data: bytes) -> list[tuple[str, int, int]]:
    path.write_bytes(data + bytes(1024))
    with open(path, "rb") as stream:
        return [tuple(member) for member in itertools.islice(tar_members(stream, "x.tar"), 10)]


@pytest.mark.parametrize("size", [b"-0000001000", b"+0000001000", b"0o1000", b"1_000", b"9"])
def test_a_size_that_is_no_octal_number_is_refused(tmp_path: Path, size: bytes) -> None:
    assert members_of(tmp_path / "0.tar", header(b"0", b"a.txt", b" 1 ") + bytes(512)) == [("a.txt", 512, 1)]
    with pytest.raises(DataError, match=r"x\.tar: byte 0: expected the header of a tar member, .* is no octal number"):
        members_of(tmp_path / "0.tar", header(b"0", b"a.txt", size))


def extended(kind: bytes, data: bytes, *, size: bytes = b"0") -> bytes:
    """An extended header, and a member of 0 bytes by its own header."""
    padded = data + bytes(-len(data) % 512)
    return header(kind, b"x", b"%o" % len(data)) + padded + header(b"0", b"a.txt", size)


@pytest.mark.parametrize("kind", [b"L", b"x"])
def test_an_extended_header_beyond_a_mebibyte_is_refused(tmp_path: Path, kind: bytes) -> None:
    with pytest.raises(DataError, match="byte 512: an extended header of 1048577 bytes; expected at most 1048576"):
        members_of(tmp_path / "0.tar", extended(kind, bytes(2**20 + 1)))


@pytest.mark.parametrize(
    "records", [b"9" * 5000 + b" path=a\n", b"00000016 path=a\n", b"9 path=a", b"2 ", b"x path=a\n", b"-1 a=b\n", b"0 "]
)
def test_a_damaged_extended_header_is_refused(tmp_path: Path, records: bytes) -> None:
    with pytest.raises(DataError, match=r"x\.tar: byte 512: the extended header of a tar member is damaged"):
        members_of(tmp_path / "0.tar", extended(b"x", records))


class Counted(bytes):
    """Bytes that count those copied out of them."""

    copied = 0

    def __getitem__(self, place: Any) -> Any:
        found = super().__getitem__(place)
        if isinstance(place, slice):
            Counted.copied += len(found)
            return Counted(found)
        return found


def test_many_records_take_time_in_proportion(tmp_path: Path) -> None:
    records = b"4 =\n" * 2**18  # the most that an extended header holds
    assert members_of(tmp_path / "0.tar", extended(b"x", records)) == [("a.txt", 2**20 + 1024, 0)]
    # A copy of the rest for each record would be 128 MiB.
    assert tars._pax_records(Counted(records[: 2**15]), "x.tar") == {"": ""}
    assert Counted.copied < 2**16


def test_a_size_in_an_extended_header_counts_as_tarfile_has_it(tmp_path: Path) -> None:
    data = extended(b"x", b"12 size=600\n") + bytes(1024) + header(b"0", b"b.txt", b"0")
    found = members_of(tmp_path / "0.tar", data)
    assert found == [("a.txt", 1536, 600), ("b.txt", 3072, 0)]
    with tarfile.open(tmp_path / "0.tar") as tar:
        assert [(info.name, info.offset_data, info.size) for info in tar] == found
    for wrong in (b"11 size=-5\n", b"12 size=5_0\n"):
        with pytest.raises(DataError, match="the extended header of a tar member is damaged"):
            members_of(tmp_path / "0.tar", extended(b"x", wrong))


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
        ({"x.json": b"{"}, "sample 'x': not valid JSON"),
        ({"x.json": b'{"title": "a"}'}, "sample 'x': expected a string under text or caption in its .json, got None"),
        ({"x.json": b'{"text": [5]}'}, r".*got \[5\]"),
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
    dataset = PairDataset(pairs, colour, CodePoints(8))
    batches = list(make_loader(dataset, 3, num_workers, sampler=EpochNumbers(sampler)))
    assert [batch[0][:, 0].flatten().tolist() for batch in batches] == sampler.batches()
    assert all(chr(code) == "第" for batch in batches for code in batch[1][:, 0].tolist())


# In a process of its own, for forking one that runs tests may take the test runner down.
FORKING = """
import os, sys
from pathlib import Path
from test_shards import shards
pairs = shards(Path(sys.argv[1]), [3])
assert pairs[0].text == "第0张"
(stream,) = pairs._files._files.values()
before = stream.tell()
child = os.fork()
if child == 0:
    os._exit(0 if pairs[2].text == "第2张" else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), stream.tell() == before)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_does_not_move_the_position_of_its_parents_files(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    command = [sys.executable, "-W", "ignore", "-c", FORKING, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("0 True\n", "")


def test_an_unreadable_picture_is_replaced_from_the_same_shard(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dataset = PairDataset(shards(tmp_path, [2, 3, 2], broken=4), colour, CodePoints(), on_error="skip")
    with caplog.at_level(logging.WARNING):
        pair = dataset[4]
    assert (pair.pixels[0].item(), pair.num_skipped, pair.image_id) == (2, 1, f"{tmp_path}/001.tar/0002")
    assert "001.tar: sample '0004': the picture of 1 bytes does not decode" in caplog.text


def test_only_a_few_files_stay_open(tmp_path: Path) -> None:
    def num_open() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

    pairs, before = shards(tmp_path, [1] * 20), num_open()
    for _ in range(2):
        assert [pairs[number].text for number in range(20)] == [f"第{number}张" for number in range(20)]
    assert num_open() <= before + 8
    assert len(pairs._files._files) == 8


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 pairs of 12 pictures, built."""
    folder = tmp_path_factory.mktemp("dataset")
    kinds = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
    pictures = [tsv_line(n, picture((20 * n, 0, 255 - 20 * n), kind=kinds[n % 6], size=(70, 66))) for n in range(11)]
    texts = [jsonl_line(f"t{n}", f"第{n}句 “话”", [n % 11] if n else [0, "a-b"]) for n in range(23)]
    write_split(folder, [*pictures, tsv_line("a-b", picture())], texts)
    built = run_script("preprocess/build_lmdb_dataset.py", "--data_dir", folder, "--splits", "train")
    assert built.returncode == 0, built.stderr
    return folder


def test_shards_hold_every_pair_of_the_dataset_with_its_bytes(dataset: Path, tmp_path: Path) -> None:
    command = ("preprocess/write_shards.py", "--data_dir", dataset, "--output", tmp_path / "out", "--num-shards", 5)
    result = run_script(*command)
    assert result.returncode == 0, result.stderr
    assert (
        f"MB\nTrain on them with: cn-clip train --train-data '{tmp_path}/out/{{000000..000004}}.tar'\n" in result.stdout
    )
    files = [f"{shard:06d}.tar" for shard in range(5)]
    assert sorted(os.listdir(tmp_path / "out")) == [*files, "sizes.json"]
    sizes = json.loads((tmp_path / "out/sizes.json").read_text())
    assert sizes == dict(zip(files, [5, 5, 5, 5, 4], strict=True))
    ours, theirs = ShardPairs(f"{tmp_path}/out/{{000000..000004}}.tar"), LmdbPairs(dataset / "lmdb/train")
    read = [ours[number][:4] for number in range(24)]
    stored = [theirs[number][:4] for number in range(24)]
    assert sorted(read, key=str) == sorted(stored, key=str)
    assert read != stored
    with tarfile.open(tmp_path / "out/000001.tar") as tar:
        names = tar.getnames()
    assert re.fullmatch(r"000001000000\.(png|jpg|webp|gif|bmp|tif)", names[0])
    assert names[1:3] == ["000001000000.txt", "000001000000.json"]


def test_the_same_seed_writes_the_same_bytes_and_json_sums_up(dataset: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        flags = ("--output", tmp_path / name, "--pairs-per-shard", 10, "--seed", seed, "--json")
        result = run_script("preprocess/write_shards.py", "--lmdb", dataset / "lmdb/train", *flags)
        assert result.returncode == 0, result.stderr
        total = sum(path.stat().st_size for path in (tmp_path / name).iterdir())
        pattern = f"{tmp_path / name}/{{000000..000002}}.tar"
        assert json.loads(result.stdout) == {"train_data": pattern, "shards": 3, "pairs": 24, "bytes": total}
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert tree(tmp_path / "a") != tree(tmp_path / "c")


def test_shards_are_replaced_only_when_asked_and_other_files_never(dataset: Path, tmp_path: Path) -> None:
    command = ("preprocess/write_shards.py", "--data_dir", dataset, "--output", tmp_path / "out")
    assert run_script(*command, "--num-shards", 3).returncode == 0
    before = tree(tmp_path / "out")
    refused = run_script(*command)
    assert (refused.returncode, tree(tmp_path / "out")) == (1, before)
    assert "holds 4 files already; give --overwrite or choose another --output" in refused.stderr
    assert run_script(*command, "--overwrite").returncode == 0
    assert sorted(os.listdir(tmp_path / "out")) == ["000000.tar", "sizes.json"]
    (tmp_path / "out/thesis.doc").write_bytes(b"precious")
    refused = run_script(*command, "--overwrite")
    assert refused.returncode == 1
    assert "holds other things (thesis.doc)" in refused.stderr
    assert (tmp_path / "out/thesis.doc").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        ([], 2, "give --data-dir (and --split), or --lmdb"),
        (["--data-dir=x", "--lmdb=y"], 2, "give --data-dir (and --split), or --lmdb"),
        (["--lmdb=y", "--num-shards=2", "--pairs-per-shard=2"], 2, "--pairs-per-shard and --num-shards contradict"),
        (["--lmdb=y", "--num-shards=0"], 2, "--num-shards: expected at least 1, got 0"),
        (["--data-dir={dataset}", "--split=valid"], 1, "lmdb/valid/imgs: no LMDB is here"),
        (["--data-dir={dataset}", "--num-shards=25"], 1, "--num-shards 25: more than the 24 pairs"),
    ],
)
def test_shards_that_cannot_be_written_leave_no_folder(
    dataset: Path, tmp_path: Path, flags: list[str], status: int, message: str
) -> None:
    given_flags = [flag.format(dataset=dataset) for flag in flags]
    result = run_script("preprocess/write_shards.py", *given_flags, "--output", tmp_path / "out")
    assert result.returncode == status
    assert message in result.stderr
    assert not list(tmp_path.iterdir())


def test_a_picture_that_no_tool_opens_stops_the_command_naming_it(tmp_path: Path) -> None:
    with SplitWriter(tmp_path / "train") as writer:
        writer.put_image(5, base64.b64encode(b"not a picture"))
        writer.put_pair(Pair(5, 1, "图"))
    result = run_script("preprocess/write_shards.py", "--lmdb", tmp_path / "train", "--output", tmp_path / "out")
    assert result.returncode == 1
    assert "imgs: image id 5: the picture of 13 bytes does not decode" in result.stderr
    assert os.listdir(tmp_path) == ["train"]


def test_empty_and_numeric_texts_come_back_as_from_an_lmdb(tmp_path: Path) -> None:
    for number, (name, text) in enumerate({"x.txt": b"", "y.txt": b" \n", "z.json": b'{"text": 2024}'}.items()):
        shard = write_tar(tmp_path / f"{number}.tar", {f"{name[0]}.png": picture(), name: text})
        assert ShardPairs(str(shard))[0].text == ("2024" if number == 2 else "")


def test_a_text_that_training_would_refuse_stops_the_command_naming_it(tmp_path: Path) -> None:
    pair, said = Pair(5, "t7", "红\ud83d色"), "text id 't7': its text is not valid Unicode"
    with SplitWriter(tmp_path / "train") as writer:
        writer.put_image(5, base64.b64encode(picture()))
        writer.put_pair(Pair(5, 1, "图"))
        writer.put_pair(pair)
    result = run_script("preprocess/write_shards.py", "--lmdb", tmp_path / "train", "--output", tmp_path / "out")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert f"pairs: {said}" in result.stderr
    assert os.listdir(tmp_path) == ["train"]


def test_a_file_in_the_place_of_the_shards_is_kept(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"precious")
    flags = ("--data_dir", dataset, "--output", tmp_path / "out", "--overwrite")
    result = run_script("preprocess/write_shards.py", *flags)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert tree(tmp_path) == {"out": b"precious"}


def test_progress_of_writing_shards_moves_with_each_pair(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[int] = []
    monkeypatch.setattr("cn_clip.progress.Step.advance", lambda self, n=1: steps.append(n))
    write_shards.run(write_shards.Options(str(tmp_path / "out"), str(dataset), num_shards=2))
    assert steps == [1] * 24


TINY = ["--vision-model=ViT-Tiny-64", "--text-model=BERT-Tiny-chinese", "--num-threads=1", "--device=cpu"]
TINY += ["--precision=fp32", "--warmup=2", "--log-interval=1", "--batch-size=4", "--use-augment"]


@pytest.fixture(scope="module")
def value(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The --train-data of four shards of the dataset."""
    folder = tmp_path_factory.mktemp("shards") / "out"
    result = run_script(
        "preprocess/write_shards.py", "--data_dir", dataset, "--output", folder, "--num-shards", 4, "--json"
    )
    value: str = json.loads(result.stdout)["train_data"]
    return value


def train(value: str, logs: Path, *flags: str) -> "tuple[list[str], str]":
    """Losses of the steps, and the log."""
    result = run_script("training/main.py", f"--train-data={value}", f"--logs={logs}", *TINY, *flags)
    assert result.returncode == 0, result.stderr
    return re.findall(r"\| Loss: ([\d.]+)", result.stderr), result.stderr


@pytest.mark.long
def test_training_from_shards_resumes_in_an_epoch_as_if_it_had_not_stopped(value: str, tmp_path: Path) -> None:
    flags = ("--num-workers=2", "--max-steps=7")
    whole, log = train(value, tmp_path, *flags, "--save-step-frequency=3", "--keep-checkpoints=-1", "--name=whole")
    assert "train: 4 shards contain 24 pairs." in log
    assert "0 pairs, others each epoch, are left out" in log
    assert len(whole) == 7
    begin = tmp_path / "whole/checkpoints/epoch_1_3.pt"
    resumed, _ = train(value, tmp_path, *flags, f"--resume={begin}", "--name=again")
    assert resumed == whole[3:]


def test_training_refuses_what_the_shards_cannot_give(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"4 shards for 5 loading processes \(1 x 5 by --num-workers\)"):
        training_data(Options(value, num_workers=5, batch_size=4), 32, torch.device("cpu"))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="--batch-size 7 in each of 4 processes: larger than the 24 pairs"):
        training_data(Options(value, num_workers=1, batch_size=7), 32, torch.device("cpu"))
    with pytest.raises(DataError, match=r"000004\.tar: no such shard"):
        training_data(Options(value.replace("3}", "4}"), num_workers=1, batch_size=4), 32, torch.device("cpu"))

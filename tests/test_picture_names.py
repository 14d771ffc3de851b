"""One list says which files count as pictures, for every command that walks a folder."""

import io
import logging
from pathlib import Path

import pytest
from PIL import Image, features

from cn_clip.clip.picture_names import PICTURE_SUFFIXES, SUFFIXES_OF, begins_as_picture
from cn_clip.data.bulk_pictures import open_collection
from cn_clip.data.captions import pictures_from_names
from cn_clip.data.pictures import ClassFolders
from cn_clip.data.records import Fault
from cn_clip.data.shards import ShardPairs
from cn_clip.index.sources import open_source

Image.init()
FORMATS = [kind for kind in SUFFIXES_OF if kind in Image.SAVE]


def encoded(kind: str) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 30, 40)).save(stream, kind)
    return stream.getvalue()


@pytest.mark.parametrize("kind", FORMATS)
def test_the_beginning_of_every_format_is_known(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    assert begins_as_picture(encoded(kind)[:16])


@pytest.mark.parametrize("head", [b"", b'{"text_id": 1}', b"\0\0\0 ftypisom", b"RIFF\0\0\0\0WAVE", b"P7 x"])
def test_what_begins_otherwise_is_no_picture(head: bytes) -> None:
    assert not begins_as_picture(head)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A class folder with a file of every suffix, one without, three that are no pictures, and links to folders."""
    place = tmp_path / "all" / "0"
    place.mkdir(parents=True)
    for number, suffix in enumerate(PICTURE_SUFFIXES):
        (place / f"{number}图{suffix.upper() if number % 2 else suffix}").write_bytes(encoded("PNG"))
    (place / "98图").write_bytes(encoded("JPEG"))
    (place / "LICENSE").write_bytes(b"all rights reserved")
    (place / "a.txt").write_bytes(b"")
    (place / "b.txt").write_bytes(b"")
    (place / ".hidden.png").write_bytes(b"")
    (place / ".hidden").mkdir()
    (place / ".hidden" / "97图.png").write_bytes(encoded("PNG"))
    (tmp_path / "other disk").mkdir()
    (tmp_path / "other disk" / "96图.png").write_bytes(encoded("PNG"))
    (place / "link").symlink_to(tmp_path / "other disk")
    (place / "second link").symlink_to(tmp_path / "other disk")
    (place / "link to itself").symlink_to(place)
    return tmp_path / "all"


def test_every_command_takes_the_same_files_and_counts_the_others(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("pyarrow")
    expected = {str(path.relative_to(folder)) for path in (folder / "0").glob("[0-9]*图*")} | {"0/link/96图.png"}
    assert len(expected) == len(PICTURE_SUFFIXES) + 2
    with caplog.at_level(logging.WARNING):
        taken = {
            "zeroshot, linear-probe, evaluate": [path for path, _ in ClassFolders(folder).samples],
            "dataset from-folder": [
                "" if isinstance(one, Fault) else str(one.path) for one in pictures_from_names(folder)
            ],
            "features --engine ray": [str(folder / str(one)) for one in open_collection(str(folder)).ids],
        }
    for command, paths in taken.items():
        assert {str(Path(path).relative_to(folder)) for path in paths} == expected, command
    assert len(caplog.messages) == 3
    for message in caplog.messages:
        assert message.startswith(f"{folder}: ")
        assert message.endswith("skipped 3 files that are not images by name: 2 .txt, 1 without suffix")
    source = open_source(folder)
    # The index reads every file without a suffix, and lists LICENSE among those that do not decode.
    assert {str(one.id) for one in source.candidates} - {"0/LICENSE"} == expected
    assert {one.id for one in source.skipped} == {"0/a.txt", "0/b.txt"}


@pytest.mark.parametrize("suffix", PICTURE_SUFFIXES)
def test_shards_may_hold_pictures_of_every_suffix(tmp_path: Path, suffix: str) -> None:
    import tarfile

    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name, data in ((f"a{suffix.upper()}", encoded("PNG")), ("a.txt", "猫".encode())):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert ShardPairs(str(tmp_path / "0.tar"))[0].picture == encoded("PNG")

"""What is known of a file before it is parsed: when it counts as whole, and as absent."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from cn_clip import digests
from cn_clip.digests import VERIFIED, facts_of, is_file, is_folder, is_there, is_whole
from cn_clip.errors import DataError, UnreadableError


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of several chunks, old enough to be remembered."""
    monkeypatch.setattr(digests, "SETTLED_S", -3600)
    monkeypatch.setattr(digests, "_CHUNK_BYTES", 1000)
    (tmp_path / "f").write_bytes(bytes(range(256)) * 20)
    return tmp_path / "f"


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose bytes are read."""
    seen: list[Path] = []

    def facts(path: Path) -> digests.FileFacts:
        seen.append(path)
        return facts_of(path)

    monkeypatch.setattr(digests, "facts_of", facts)
    return seen


def test_a_file_is_whole_if_no_bit_has_changed(file: Path) -> None:
    expected = facts_of(file)
    assert (expected.bytes, is_whole(file, expected)) == (5120, True)
    data = bytearray(file.read_bytes())
    data[4000] ^= 1
    file.write_bytes(data)
    assert not is_whole(file, expected)
    file.write_bytes(data[:-1])
    assert not is_whole(file, expected)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        is_whole(file, expected)


def test_a_file_found_whole_is_not_read_again(file: Path, reads: list[Path]) -> None:
    expected, other = facts_of(file), file.with_name("g")
    other.write_bytes(b"g")
    assert is_whole(file, expected)
    assert is_whole(other, facts_of(other))
    assert is_whole(file, expected)
    assert reads == [file, other]
    assert not is_whole(file, digests.FileFacts(5120, "0" * 32))  # the memory is of another digest


def test_a_changed_file_is_read_again_though_its_time_was_set_back(file: Path, reads: list[Path]) -> None:
    expected, before = facts_of(file), file.stat()
    assert is_whole(file, expected)
    file.write_bytes(b"x" * 5120)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not is_whole(file, expected)
    assert reads == [file, file]


def test_a_file_changed_a_moment_ago_is_not_remembered(
    file: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(digests, "SETTLED_S", 3600)
    expected = facts_of(file)
    assert is_whole(file, expected)
    assert is_whole(file, expected)
    assert (reads, file.with_name(VERIFIED).exists()) == ([file, file], False)


@pytest.mark.parametrize("memory", ["", "[]", "{", '{"f": [1]}', '{"f": null, "gone": [1]}', "\xff", "[" * 100_000])
def test_a_damaged_memory_is_no_memory(file: Path, memory: str, reads: list[Path]) -> None:
    file.with_name(VERIFIED).write_text(memory, encoding="latin-1")
    for _ in range(2):
        assert is_whole(file, facts_of(file))
    assert reads == [file]
    assert "gone" not in file.with_name(VERIFIED).read_text()


def test_without_room_for_a_memory_a_file_is_whole_all_the_same(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file.with_name(VERIFIED).mkdir()
    assert is_whole(file, facts_of(file))
    assert is_whole(file, facts_of(file))


def test_only_what_the_system_calls_absent_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "f").write_bytes(b"")
    assert [is_there(tmp_path / "f"), is_file(tmp_path / "f"), is_folder(tmp_path / "f")] == [True, True, False]
    assert [is_there(tmp_path), is_file(tmp_path), is_folder(tmp_path)] == [True, False, True]
    assert [is_there(tmp_path / "g"), is_there(tmp_path / "f" / "g")] == [False, False]
    for number in (errno.EACCES, errno.EIO, errno.ESTALE, errno.ENAMETOOLONG):

        def fail(*_: object, number: int = number) -> Any:
            raise OSError(number, os.strerror(number))

        with monkeypatch.context() as patch:
            patch.setattr(os, "stat", fail)
            for ask in (is_there, is_file, is_folder):
                with pytest.raises(UnreadableError) as caught:
                    ask(tmp_path / "f")
        assert str(caught.value) == (
            f"{tmp_path / 'f'}: cannot be read just now ({os.strerror(number)}, errno {number}); is the disk there?"
        )
        assert (caught.value.strerror, isinstance(caught.value, DataError)) == (os.strerror(number), True)

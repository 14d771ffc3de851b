"""Where the members of a tar file are, by its headers alone; `shards` reads pairs with it."""

import os
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

from cn_clip.data.names import spelled
from cn_clip.errors import DataError, Where

_RECORD_LENGTH = re.compile(rb"([0-9]{1,7}) ")
_MAX_EXTENDED_BYTES = 2**20
_COMPRESSED_BEGIN = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_BLOCK = 512


class Member(NamedTuple):
    """A regular file in a tar: its name, as `names.spelled` spells it, and where its bytes are."""

    name: str
    offset: int
    size: int


def compressed(path: str) -> DataError:
    """The error for a tar that is packed."""
    return DataError("is compressed, so samples in it cannot be read by their places; unpack it to a .tar", at=path)


def tar_members(stream: BinaryIO, path: str) -> Iterator[Member]:
    """The regular files of a tar in order; reads headers alone.

    Raises DataError at a damaged header, at a member cut short, and where the end mark is missing.
    """
    num_bytes, offset = stream.seek(0, os.SEEK_END), 0
    extended: dict[str, str] = {}  # what the extended headers before a member say of it
    if read_at(stream, 0, 6).startswith(_COMPRESSED_BEGIN):
        raise compressed(path)
    while True:
        header = read_at(stream, offset, _BLOCK)
        if len(header) < _BLOCK:
            raise DataError(f"cut short at byte {num_bytes}, the end mark is missing; copy or write it again", at=path)
        if not any(header):
            return
        kind, name, size = _parse_header(header, Where(path, part=f"byte {offset}"))
        if kind not in b"LKxg":
            name, size = extended.get("path") or name, int(extended.get("size") or size)
        size = 0 if kind in b"123456" else size  # links, folders and devices have no bytes
        offset += _BLOCK
        if offset + size > num_bytes:
            what = f"member {name!r} has {num_bytes - offset} of {size} bytes"
            raise DataError(f"cut short, {what}; copy or write it again", at=path)
        if kind in b"Lx":
            extended |= _extended(kind, stream, offset, size, Where(path, part=f"byte {offset}"))
        elif kind in b"07\0":
            yield Member(spelled(name), offset, size)
        if kind not in b"LKxg":
            extended = {}
        offset += -(-size // _BLOCK) * _BLOCK


def read_at(stream: BinaryIO, offset: int, size: int) -> bytes:
    """Up to `size` bytes from a place; moves the position of the stream."""
    stream.seek(offset)
    return stream.read(size)


def _parse_header(header: bytes, where: Where) -> tuple[bytes, str, int]:
    """(kind, name, size) of a member."""
    try:
        if sum(header[:148]) + 8 * ord(" ") + sum(header[156:]) != _number(header[148:156]):
            raise ValueError("its checksum is wrong")
        kind, size = header[156:157], _number(header[124:136])
    except ValueError as error:
        raise DataError(f"expected the header of a tar member, {error}; write it again", at=where) from error
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        name = f"{_text(header[345:500])}/{name}"
    return kind, name, size


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU's base 256, for files of 8 GiB and more
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip() or b"0"
    if digits.strip(b"01234567"):  # int() takes a sign and more: a negative size would lead back, for ever
        raise ValueError(f"{digits!r} is no octal number")
    return int(digits, 8)


def _text(field: bytes) -> str:
    return field.split(b"\0")[0].decode("utf-8", "surrogateescape")


def _extended(kind: bytes, stream: BinaryIO, offset: int, size: int, where: Where) -> dict[str, str]:
    """The name, in GNU's way; name, size and more in POSIX's way."""
    if size > _MAX_EXTENDED_BYTES:
        raise DataError(f"an extended header of {size} bytes; expected at most {_MAX_EXTENDED_BYTES}", at=where)
    data = read_at(stream, offset, size)
    records = {"path": _text(data)} if kind == b"L" else _pax_records(data, where)
    if not re.fullmatch("[0-9]{0,19}", records.get("size", "")):
        raise _damaged_extension(where)
    return records


def _pax_records(data: bytes, where: Where) -> dict[str, str]:
    """Records `LENGTH KEY=VALUE` and a line end, where LENGTH counts the whole record; values may hold line ends."""
    records: dict[str, str] = {}
    place = 0
    while place < len(data):
        length = _RECORD_LENGTH.match(data, place)
        end = place + int(length[1]) if length else 0
        if length is None or not length.end() < end <= len(data):
            raise _damaged_extension(where)
        key, _, value = data[length.end() : end - 1].partition(b"=")
        records[_text(key)] = value.decode("utf-8", "surrogateescape")
        place = end
    return records


def _damaged_extension(where: Where) -> DataError:
    return DataError("the extended header of a tar member is damaged; write the file again", at=where)

"""Damages bytes, JSON and containers at random, the same for the same seed: what the readers are fed."""

import io
import json
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

Mutation = Callable[[random.Random, bytes], bytes]

_ODD_NUMBERS = (0, 1, -1, 127, 128, 255, 256, 32767, 65535, 2**31 - 1, 2**31, 2**32 - 1, 2**53 + 1, 2**63 - 1, 2**64)
_ODD_TEXTS = ("", " ", "\0", "../../etc/passwd", "/dev/zero", "猫" * 300, "\ud800", "NaN", "-0", "a\nb", "%s{}", "𠮷")
_ODD_BYTES = (b"\0", b"\xff", b"\n", b"{", b"}", b'"', b"\\", b",", b"[", b"\xef\xbb\xbf", b"\xc4\xe3", b"\xed\xa0\x80")


def odd_value(rng: random.Random, *, plain: bool = False) -> Any:
    """A value that a field hardly ever has. plain: of what JSON can hold."""
    nested: Any = []
    for _ in range(rng.choice((1, 3, 60))):
        nested = [nested]
    values = [None, True, False, -1, 0.5, 1e308, -0.0, float("nan"), float("inf"), 10**30, [], {}, {"a": 1}, nested]
    values += [*_ODD_NUMBERS, *_ODD_TEXTS]
    if not plain:
        values += [b"\xff\xfe", (1, 2), {1: 2}]
    return rng.choice(values)


def odd_tree(rng: random.Random, tree: Any, odd: Callable[[random.Random], Any] = odd_value) -> Any:
    """A copy of nested dictionaries and lists in which one entry is another value, is missing, or comes twice."""
    if not isinstance(tree, (dict, list)) or not tree or rng.random() < 0.15:
        return odd(rng)
    keys: Sequence[Any] = list(tree) if isinstance(tree, dict) else range(len(tree))
    key = rng.choice(keys)
    copy: Any = dict(tree) if isinstance(tree, dict) else list(tree)
    act = rng.random()
    if act < 0.15:
        del copy[key]
    elif act < 0.25:
        if isinstance(copy, dict):
            copy[f"{key}{rng.choice(_ODD_TEXTS)}"] = copy[key]
        else:
            copy.insert(key, copy[rng.choice(keys)])
    else:
        copy[key] = odd_tree(rng, tree[key], odd)
    return copy


def odd_bytes(rng: random.Random, data: bytes) -> bytes:
    """The bytes with one to four damages of the kinds that disks, copies and attackers make."""
    result = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        _DAMAGES[rng.randrange(len(_DAMAGES))](rng, result)
    return bytes(result)


def _place(rng: random.Random, data: bytearray) -> int:
    """Any place; heads and tails, which say how to read the rest, come more often."""
    size = len(data)
    if not size:
        return 0
    near = rng.randrange(min(size, 256))
    return rng.choice((near, size - 1 - near, rng.randrange(size)))


def _flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice((1, 1, 8))):
        if data:
            data[_place(rng, data)] ^= 1 << rng.randrange(8)


def _set(rng: random.Random, data: bytearray) -> None:
    place = _place(rng, data)
    piece = rng.choice(_ODD_BYTES) * rng.choice((1, 1, 4, 64))
    data[place : place + len(piece)] = piece


def _number(rng: random.Random, data: bytearray) -> None:
    place, form = _place(rng, data), rng.choice(("<I", ">I", "<Q", "<H", ">H"))
    piece = struct.pack(form, rng.choice(_ODD_NUMBERS) % (1 << (8 * struct.calcsize(form))))
    data[place : place + len(piece)] = piece


def _page(rng: random.Random, data: bytearray) -> None:
    size = rng.choice((16, 512, 4096))
    begin = rng.randrange(len(data) // size + 1) * size
    data[begin : begin + size] = rng.choice((b"\0", b"\xff")) * len(data[begin : begin + size])


def _cut(rng: random.Random, data: bytearray) -> None:
    del data[rng.choice((_place(rng, data), len(data) - 1, len(data) // 2)) :]


def _take_out(rng: random.Random, data: bytearray) -> None:
    place = _place(rng, data)
    del data[place : place + rng.choice((1, 2, 16, 512))]


def _double(rng: random.Random, data: bytearray) -> None:
    place = _place(rng, data)
    piece = data[place : place + rng.choice((1, 16, 512, 4096))]
    data[_place(rng, data) : 0] = piece * rng.choice((1, 1, 16))


def _append(rng: random.Random, data: bytearray) -> None:
    data += rng.choice((b"\0" * 512, b"x", bytes(data[:4096]), rng.randbytes(64)))


_DAMAGES = (_flip, _flip, _flip, _set, _number, _number, _page, _cut, _take_out, _double, _append)


# --- containers: what a checksum or a length would refuse at once is made to fit again -------------------------------


def odd_json(rng: random.Random, data: bytes) -> bytes:
    """JSON with another value somewhere; bytes that are no JSON are damaged as they are."""
    try:
        tree = json.loads(data)
    except ValueError:
        return odd_bytes(rng, data)
    return json.dumps(odd_tree(rng, tree, lambda one: odd_value(one, plain=True))).encode()


def odd_lines(rng: random.Random, data: bytes) -> bytes:
    """Lines of which one is another JSON value, comes twice, or is missing."""
    lines = data.split(b"\n")
    place, act = rng.randrange(len(lines)), rng.random()
    if act < 0.1:
        lines.insert(place, lines[rng.randrange(len(lines))])
    elif act < 0.2:
        del lines[place]
    elif act < 0.8:
        lines[place] = odd_json(rng, lines[place])
    else:
        lines[place] = odd_bytes(rng, lines[place])
    return b"\n".join(lines)


def odd_zip(rng: random.Random, data: bytes) -> bytes:
    """A zip of which one member is damaged, renamed or missing, with checksums that fit."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {one.filename: archive.read(one) for one in archive.infolist()}
    name = rng.choice(list(members))
    act = rng.random()
    if act < 0.1:
        del members[name]
    elif act < 0.15:
        members[f"{name}2"] = members.pop(name)
    else:
        members[name] = odd_bytes(rng, members[name])
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for one, content in members.items():
            archive.writestr(zipfile.ZipInfo(one), content, archive.compression)  # without the time
    return stream.getvalue()


def odd_tar(rng: random.Random, data: bytes) -> bytes:
    """A tar with a damaged header whose checksum fits, or with a member of another name or other bytes."""
    result = bytearray(data)
    heads = [place for place in range(0, len(result), 512) if result[place + 257 : place + 262] == b"ustar"]
    if not heads:
        return odd_bytes(rng, data)
    place = rng.choice(heads)
    head = bytearray(result[place : place + 512])
    for _ in range(rng.choice((1, 2))):
        _DAMAGES[rng.randrange(6)](rng, head)
    head = head[:512].ljust(512, b"\0")
    head[148:156] = b" " * 8
    head[148:156] = f"{sum(head):06o}\0 ".encode()
    result[place : place + 512] = head
    return bytes(result)


def odd_safetensors(rng: random.Random, data: bytes) -> bytes:
    """safetensors with another value somewhere in its head."""
    length = int.from_bytes(data[:8], "little")
    head = odd_json(rng, data[8 : 8 + length])
    return len(head).to_bytes(8, "little") + head + data[8 + length :]


def either(*mutations: Mutation) -> Mutation:
    """One of these, by chance."""
    return lambda rng, data: rng.choice(mutations)(rng, data)


def small_tar(members: dict[str, bytes]) -> bytes:
    """A tar of these members."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for name, data in members.items():
            about = tarfile.TarInfo(name)
            about.size = len(data)
            archive.addfile(about, io.BytesIO(data))
    return stream.getvalue()

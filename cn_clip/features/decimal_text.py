"""Rows of comma-separated JSON numbers to float32, many at once; feature_files reads vectors with it."""

# R rows, L numbers a row, T = R * L tokens, each one number

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]
Positions = NDArray[np.int64]
Mask = NDArray[np.bool_]

_JSON_NUMBER = re.compile(rb"[ \t\r\n]*-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?[ \t\r\n]*")
_COMMA, _SPACE, _MINUS, _ZERO, _POINT = b", -0."
_DIGITS_READ = 24
_ASCII_ZEROS = np.uint64(0x3030303030303030)
# Entry n keeps the first n characters of an 8-byte little-endian word.
_KEEP = np.array([(1 << 8 * n) - 1 for n in range(9)], dtype=np.uint64)
# The digits read give the value to 4 units of 2**-53; a wider bracket that rounds to one float32 proves the rounding.
_BRACKET = 1e-15


def parse_rows(rows: Sequence[bytes]) -> NDArray[np.float32]:
    """The numbers of each row ("0.5, -0.25, 1e-05"), each rounded as float32(float(token)); (R, L), one row at least.

    Four times as fast as `json` for "0.…" with up to 24 digits, which is what features are; any other token, and any
    value so close to the middle of two float32 numbers that the digits alone do not decide, goes through `float`.
    Too large for float32 gives infinity. Raises ValueError for a token that is no JSON number and for rows of
    different lengths.
    """
    text = b",".join(rows)
    buffer = np.frombuffer(text + b"\0" * (_DIGITS_READ + 8), dtype=np.uint8)
    ends = np.append(np.flatnonzero(buffer[: len(text)] == _COMMA), len(text))
    row_ends = np.cumsum([len(row) + 1 for row in rows]) - 1
    if not np.array_equal(ends[len(ends) // len(rows) - 1 :: len(ends) // len(rows)], row_ends):
        raise ValueError("rows of different lengths")
    starts = np.concatenate([[0], ends[:-1] + 1])
    values, certain = _fixed_point(buffer, starts, ends)
    certain &= (values * (1 - _BRACKET)).astype(np.float32) == (values * (1 + _BRACKET)).astype(np.float32)
    for token in np.flatnonzero(~certain).tolist():
        values[token] = _parse_one(text[starts[token] : ends[token]])
    with np.errstate(over="ignore"):
        return values.astype(np.float32).reshape(len(rows), -1)


def _fixed_point(buffer: NDArray[np.uint8], starts: Positions, ends: Positions) -> tuple[NDArray[np.float64], Mask]:
    """Values of the tokens of the form -0.digits, and which tokens have that form; the other values mean nothing."""
    starts = starts + (buffer[starts] == _SPACE)
    negative = buffer[starts] == _MINUS
    starts = starts + negative
    digits = starts + 2
    count = ends - digits
    good = (buffer[starts] == _ZERO) & (buffer[starts + 1] == _POINT) & (count >= 1) & (count <= _DIGITS_READ)
    words = np.ndarray(len(buffer) - 7, dtype="<u8", buffer=buffer, strides=(1,))
    high, middle, low = (_eight_digits(words, digits, count, offset, good) for offset in (0, 8, 16))
    values = (high * np.uint64(10**8) + middle) / 1e16 + low / 1e24
    return np.where(negative, -values, values), good


def _eight_digits(words: Words, digits: Positions, count: Positions, offset: int, good: Mask) -> Words:
    """The number in 8 characters at `offset` of each token, padded with zeros; clears `good` where one is no digit."""
    packed = words[np.minimum(digits + offset, len(words) - 1)] ^ _ASCII_ZEROS
    packed &= _KEEP[np.clip(count - offset, 0, 8)]
    # Adding 0x76 carries a byte above 9 into its top bit.
    good &= ((packed + np.uint64(0x7676767676767676)) | packed) & np.uint64(0x8080808080808080) == 0
    # Pairs of digits, then fours, then eight, inside one word.
    packed = packed * np.uint64(10) + (packed >> np.uint64(8))
    even = (packed & np.uint64(0x000000FF000000FF)) * np.uint64(0x000F424000000064)
    odd = ((packed >> np.uint64(16)) & np.uint64(0x000000FF000000FF)) * np.uint64(0x0000271000000001)
    number: Words = (even + odd) >> np.uint64(32)
    return number


def _parse_one(token: bytes) -> float:
    if _JSON_NUMBER.fullmatch(token) is None:
        raise ValueError(f"expected a number, got {token[:40]!r}")
    return float(token)

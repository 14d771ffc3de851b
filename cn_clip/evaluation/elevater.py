"""Files of the ELEVATER benchmark."""

import json
from pathlib import Path

from cn_clip.errors import DataError


def read_index(path: Path, num_pictures: int) -> list[int]:
    """ELEVATER's order of the pictures; raises DataError for anything but a JSON list of all numbers, each once."""
    try:
        order = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read ({error}); expected a JSON list of picture numbers") from error
    if not isinstance(order, list):
        raise DataError(f"{path}: holds a {type(order).__name__}; expected a JSON list of picture numbers")
    for number in order:
        if type(number) is not int or not 0 <= number < num_pictures:
            raise DataError(f"{path}: expected picture numbers from 0 to {num_pictures - 1}, got {number!r}")
    if len(order) != num_pictures or len(set(order)) != num_pictures:
        raise DataError(
            f"{path}: expected each of the numbers of {num_pictures} pictures once, got {len(order)} numbers, "
            f"{len(set(order))} different ones; is it the index of this dataset?"
        )
    return order

"""A whole split as retrieval sees it: every picture and every text once, and which belong together."""

from collections.abc import Sequence
from dataclasses import dataclass

from cn_clip.data.lmdb_store import PairStore
from cn_clip.data.records import RecordId
from cn_clip.errors import DataError


@dataclass(frozen=True)
class Split:
    """Ids of the pictures, texts as written, (picture number, text number) of each pair in order."""

    image_ids: Sequence[RecordId]
    texts: list[str]
    pairs: list[tuple[int, int]]


def read_split(pairs: PairStore, image_ids: Sequence[RecordId]) -> Split:
    """Numbers pictures as in `image_ids` and texts by their first pair.

    Raises DataError for a pair whose picture is not in the split.
    """
    rows = [pairs[index] for index in range(len(pairs))]
    texts = {pair.text_id: pair.text for pair in rows}
    text_numbers = {text_id: number for number, text_id in enumerate(texts)}
    image_numbers = {image_id: number for number, image_id in enumerate(image_ids)}
    for number, pair in enumerate(rows):
        if pair.image_id not in image_numbers:
            raise DataError(f"pair {number} names the picture {pair.image_id!r}, which is missing", at=pairs.folder)
    numbers = [(image_numbers[pair.image_id], text_numbers[pair.text_id]) for pair in rows]
    return Split(image_ids, list(texts.values()), numbers)

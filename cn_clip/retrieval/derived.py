"""The files derived from a segment, which make answers quicker and never other ones: which there are, and how they are
written.

They lie in the folder of the segment, listed by the manifest. One that is missing or damaged is done without; the
writer and `index check --repair` make it again. A new kind is a row of `KINDS`.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from cn_clip.digests import FileFacts, facts_of
from cn_clip.files import atomic_write
from cn_clip.retrieval import codes, columns, ids
from cn_clip.retrieval.manifest import Manifest, SegmentFacts
from cn_clip.retrieval.parts import Part
from cn_clip.retrieval.segments import DIGEST, DIGESTS, MappedFile, Segment, digests_of


@dataclass(frozen=True)
class Kind:
    """A derived file by its name.

    write: writes that of a segment, given its facts, which consists of parts of others, or of one whole segment; where
    these have such a file, it may copy from it. is_wanted: whether an index wants it of a segment of so many rows.
    fits: whether one that is as long as it was written is of this segment at all.
    """

    name: str
    write: Callable[[Sequence[Part], IO[Any], SegmentFacts], None]
    is_wanted: Callable[[Manifest, int], bool]
    fits: Callable[[Segment, MappedFile], bool] = lambda _segment, _file: True


def _wants_codes(facts: Manifest, num_rows: int) -> bool:
    return facts.engine == "quantized" and num_rows >= codes.SMALLEST


KINDS: tuple[Kind, ...] = (
    Kind(ids.NAME, ids.write, lambda _, num_rows: num_rows >= ids.SMALLEST),
    Kind(columns.NAME, columns.write, lambda _, num_rows: num_rows >= columns.SMALLEST),
    Kind(codes.NAME, codes.write, _wants_codes, codes.fits),
)


def wanted(facts: Manifest, num_rows: int) -> set[str]:
    """The names of the derived files that an index wants of a segment of so many rows."""
    return {kind.name for kind in KINDS if kind.is_wanted(facts, num_rows)}


def unfit(segment: Segment) -> set[str]:
    """The names of derived files that are missing, not as long as they were written, or of other vectors."""
    found = segment.lacking
    for kind in KINDS:
        file = segment.derived(kind.name)
        if file is not None and not kind.fits(segment, file):
            found.add(kind.name)
    return found


def write_derived(
    folder: Path, parts: Sequence[Part], names: Collection[str], segment: SegmentFacts
) -> dict[str, FileFacts]:
    """Writes derived files of the segment in `folder`, each whole or not at all; returns what the manifest says of
    them.

    segment: what the manifest says of the segment without them.

    Raises DataError for a damaged part, OSError.
    """
    facts: dict[str, FileFacts] = {}
    for kind in KINDS:
        if kind.name in names:
            path = folder / kind.name
            with atomic_write(path, "wb") as stream:
                kind.write(parts, stream, segment)
            digests = folder / (kind.name + DIGESTS)
            with atomic_write(digests, "wb") as stream:
                stream.write(digests_of(path).astype(DIGEST).tobytes())
            facts |= {one.name: facts_of(one) for one in (path, digests)}
    return facts

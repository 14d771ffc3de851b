"""Renews an index whose pictures were seen otherwise than those of a new one: `cn-clip index build … --renew`.

Only what would be seen otherwise is computed again: turned pictures, or all when they are to be decoded otherwise.
"""

import contextlib
from collections.abc import Sequence

from cn_clip.clip.orientation import orientation_of
from cn_clip.clip.picture_names import HEAD_BYTES, format_of
from cn_clip.clip.pictures import opened
from cn_clip.errors import ConfigError, DataError
from cn_clip.index.ingest import Ingest
from cn_clip.index.origins import Origins
from cn_clip.index.sources import Candidate
from cn_clip.language import both, counted
from cn_clip.retrieval.addresses import Writer
from cn_clip.retrieval.manifest import PictureFacts

# Pillow turns TIFFs by itself, and always did; the turns of HEIC are part of the format.
_NEVER_TURNED = ("HEIF", "TIFF", "GIF", "BMP", "PPM", "JPEG2000")


class Renewal:
    """One renewal. before: how the pictures of the index were seen; wanted: how they are to be seen."""

    def __init__(self, before: PictureFacts, wanted: PictureFacts) -> None:
        self.before, self.wanted = before, wanted
        self.num_gone = 0

    def begin(self, ingest: Ingest, pending: Sequence[Candidate], address: object) -> list[Candidate]:
        """What is to be read: `pending`, and all other pictures of the index that are still there.

        Raises ConfigError where vectors came from a feature file, DataError where no picture is there any more.
        """
        ingest.is_outdated = is_turned if self.before.decode == self.wanted.decode else lambda data: True
        read, origins = {one.id for one in pending}, Origins()
        more: list[Candidate] = []
        for item_id, metadata in ingest.writer.items():
            if item_id in read or metadata.get("kind") == "video":
                continue
            vector_D, picture = origins.find(item_id, metadata)
            if vector_D is not None:
                raise ConfigError(
                    f"--renew: the vectors of {metadata.get('source')} came from features, not from pictures; compute "
                    "the features again and build the index from them",
                    at=address,
                )
            if picture is None:
                self.num_gone += 1
                continue
            more.append(picture)
        if self.num_gone and not more and not pending:
            raise DataError(
                f"none of the {self.num_gone} pictures is there any more: see that the disk is there", at=address
            )
        # They are read after all.
        ingest.summary.unchanged = max(0, ingest.summary.unchanged - len(more))
        return [*pending, *more]

    def end(self, writer: Writer) -> None:
        """Notes that all pictures of the index are seen as wanted."""
        writer.describe(engine=None, source=writer.manifest.source, pictures=self.wanted)

    def told(self) -> str:
        """What came of it, in one sentence."""
        gone = both(
            f"；{self.num_gone} 张图片已不在，向量照旧",
            f"; {counted(self.num_gone, 'item')} whose images are gone stay as they were",
        )
        done = both("已更新：图片按人看到的方向", "renewed: images are upright")
        return f"{done} (--decode {self.wanted.decode}){gone if self.num_gone else ''}"


def is_turned(data: bytes) -> bool:
    """Whether a picture is seen otherwise once it is upright; False for what cannot be read."""
    kind = format_of(data[:HEAD_BYTES])
    if kind in _NEVER_TURNED or (kind == "PNG" and b"eXIf" not in data and b"Orientation" not in data):
        return False
    with contextlib.suppress(Exception), opened(data) as image:  # Pillow's plugins raise errors of many types
        return orientation_of(image) != 1
    return False

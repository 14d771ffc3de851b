"""What of a segment goes into another one: the files derived from a segment are made of such parts."""

from dataclasses import dataclass

import numpy as np

from cn_clip.retrieval.segments import Mask, Segment


@dataclass(frozen=True)
class Part:
    """Rows of a segment, in their order. kept_N: which."""

    segment: Segment
    kept_N: Mask

    @classmethod
    def whole(cls, segment: Segment) -> "Part":
        """All of its rows."""
        return cls(segment, np.ones(len(segment), dtype=np.bool_))

    @property
    def num_rows(self) -> int:
        """How many are kept."""
        return int(np.count_nonzero(self.kept_N))

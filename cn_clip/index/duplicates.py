"""Lists equal and nearly equal pictures of an index: `cn-clip index duplicates photos.index`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from cn_clip import command, settings
from cn_clip.index.options import IndexFolder
from cn_clip.option_types import Json
from cn_clip.settings import Range


@dataclass(frozen=True, kw_only=True)
class Options:
    """Lists equal and nearly equal pictures in groups, the best of each first: most pixels, then the largest file, the
    earliest date and the shortest name. Nothing is removed.

    Equal are pictures of the same bytes; nearly equal those whose vectors and small pictures are both alike.
    """

    index: IndexFolder
    """The folder of the index"""
    min_cosine: Annotated[float, Range(least=0, most=1)] = 0.9
    """Least cosine of the vectors of nearly equal pictures; lower finds more"""
    max_distance: Annotated[int, Range(least=0, most=128)] = 20
    """Most bits of 128 in which the outlines of their thumbnails may differ (dHash); higher finds more"""
    json: Json = False

    def __post_init__(self) -> None:
        settings.check(self)


def run(options: Options) -> None:
    """Lists; raises DataError for an index that cannot be read."""
    from cn_clip.index import copies

    copies.tell(options, command.Speaker(quiet=options.json))


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

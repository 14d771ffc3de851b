"""Checks every byte of an index, and repairs what can be: `cn-clip index check photos.index --repair`."""

from collections.abc import Sequence
from dataclasses import dataclass

from cn_clip import command, settings
from cn_clip.index.options import AddOptions, IndexFolder


@dataclass(frozen=True, kw_only=True)
class Options(AddOptions):
    """Lists what is damaged; exits with status 1 when something is and stays so, or items are lost.

    With --repair the graph is made from the vectors, and vectors from the pictures, as they are now, where these still
    are. Beyond repair are the manifest and the list of removed items. The index as it was is kept in a folder inside.
    """

    index: IndexFolder
    """The folder of the index"""
    repair: bool = False
    """Repair; items of which neither vector nor picture is left are dropped and counted"""
    discard: bool = False
    """Keep nothing of what --repair takes away"""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.check(self, [settings.needs("discard", "repair", refused=True)])


def run(options: Options) -> int:
    """Checks and repairs; raises DataError when the manifest or the list of removed items is beyond repair."""
    from cn_clip.index import repairing

    say, keep_aside = command.Speaker(quiet=options.json), not options.discard
    return repairing.check(options.index, options, say, also_repair=options.repair, keep_aside=keep_aside)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

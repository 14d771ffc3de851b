"""Checks every byte of an index, and repairs what can be: `cn-clip index check photos.index --repair`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cn_clip import command, settings
from cn_clip.errors import ConfigError
from cn_clip.index.options import AddOptions, IndexFolder

if TYPE_CHECKING:
    from cn_clip.retrieval.inspection import Damage


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
    from cn_clip.retrieval import addresses, inspection

    say, folder = command.Speaker(quiet=options.json), addresses.address_of(options.index)
    if not isinstance(folder, Path):
        raise ConfigError("Milvus looks after its own files; this command is for folders", at=folder)
    facts, found = inspection.inspect(folder)
    for damage in found:
        say(f"损坏 / damaged: {folder / damage.path}: {damage.reason}")
    result = None
    if found and options.repair:
        result = repairing.repair(options, folder, facts, found, say, keep_aside=not options.discard)
    if options.repair and not found:
        repairing.tidy(folder)
    if not found:
        say(f"完好 / whole: {folder}, {facts.num_items} items")
    if found and not options.repair:
        say("用 --repair 修复 / --repair repairs what can be")
    remaining = result.remaining if result else found
    lost = result.lost if result else []
    num_lost = len(lost) + (result.num_nameless if result else 0)
    say.result(
        {
            "index": options.index,
            "num_items": result.num_items if result else facts.num_items,
            "damaged": [_as_dict(one) for one in found],
            "repaired": result is not None,
            "remaining": [_as_dict(one) for one in remaining],
            "lost": lost,
            "num_lost": num_lost,
            "num_without_thumbnails": result.num_bare if result else 0,
            "kept_aside": str(result.aside) if result and result.aside else None,
        }
    )
    return int(bool(remaining) or num_lost > 0)


def _as_dict(damage: "Damage") -> dict[str, str]:
    return {"path": damage.path, "reason": damage.reason}


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

"""Removes items from an index: `cn-clip index remove photos.index 0001.jpg 0002.jpg`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from cn_clip import command
from cn_clip.data.paths import readable
from cn_clip.errors import ConfigError, DataError
from cn_clip.index.options import IndexArgument, MilvusConfig, execute
from cn_clip.language import both, counted
from cn_clip.option_types import Json
from cn_clip.retrieval.schemes import address_of
from cn_clip.terminal import shown


@dataclass(frozen=True, kw_only=True)
class Options:
    """Removes items by id or by a condition on metadata; all of them, or none when one is not there.

    The picture files stay, so building from them again brings the items back.
    """

    index: IndexArgument
    milvus_config: MilvusConfig = None
    ids: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="ID")] = ()
    """Items to remove"""
    where: str | None = None
    """Condition on items, as for search, such as "date<2015 or path~截图\""""
    all: bool = False
    """Remove every item, if --where fits every item"""
    json: Json = False

    def __post_init__(self) -> None:
        if not self.ids and self.where is None:
            raise ConfigError("give the ids of the items to remove, or --where")


def run(options: Options) -> None:
    """Removes; raises DataError, with nothing removed, for an id that is not there."""
    from cn_clip.retrieval import addresses, conditions

    say = command.Speaker(quiet=options.json)
    condition = conditions.parse_condition(options.where) if options.where is not None else None
    with addresses.open_writer(address_of(options.index, options.milvus_config)) as writer:
        by_name = writer.called([*options.ids, *map(readable, options.ids)])
        names = [name if name in by_name else readable(name) for name in options.ids]
        absent = [name for name in names if name not in by_name]
        if absent:
            raise DataError(f"has no item {shown(absent[0])!r}; nothing was removed", at=options.index)
        chosen = [by_name[name] for name in dict.fromkeys(names)]
        if condition is not None:
            fitting = writer.fitting(condition)
            if fitting and len(fitting) == len(writer) and not options.all:
                raise ConfigError(
                    f"--where {options.where}: fits all {len(writer)} items, so nothing was removed; to remove them "
                    "all, give --all as well"
                )
            chosen = list(dict.fromkeys([*chosen, *fitting]))
        writer.commit(remove=chosen)
        writer.finish()
        left = counted(len(writer), "item")
        say(
            both(
                f"已移除 {len(chosen)} 项；{options.index}: 剩 {len(writer)} 项",
                f"removed {len(chosen)}; {options.index}: {left} left",
            )
        )
        say.result({"index": options.index, "removed": chosen, "num_items": len(writer)})


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    execute(run, Options, args)


if __name__ == "__main__":
    main()

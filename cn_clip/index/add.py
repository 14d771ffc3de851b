"""Adds pictures to an index: `cn-clip index add photos.index more-pictures`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from cn_clip import command
from cn_clip.index.options import IndexArgument, SourceOptions, execute


@dataclass(frozen=True, kw_only=True)
class Options(SourceOptions):
    """Adds what a source holds, and removes nothing; what is there already is brought up to date."""

    index: IndexArgument
    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A picture, a folder of pictures, an LMDB split or picture features; a folder of shards also as s3://…, hf://…"""
    id_prefix: str = ""
    """Goes before the ids of what is added, such as holiday/"""


def run(options: Options) -> None:
    """Adds; raises CnClipError, with all kept that was reported done."""
    from cn_clip.index import building, sources

    job = building.Job(
        options.index,
        sources.location_of(options.source),
        id_prefix=options.id_prefix,
        milvus_config=options.milvus_config,
    )
    building.update(options, job, command.Speaker(quiet=options.json))


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    execute(run, Options, args)


if __name__ == "__main__":
    main()

"""Builds an index of pictures, or brings it up to date: `cn-clip index build pictures --output photos.index`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from cn_clip import command, settings
from cn_clip.errors import ConfigError
from cn_clip.index.options import IndexOutput, SourceOptions, execute
from cn_clip.retrieval.manifest import EngineName, VectorType
from cn_clip.retrieval.schemes import address_of


@dataclass(frozen=True, kw_only=True)
class Options(SourceOptions):
    """Makes the index hold what the source holds: a folder of pictures, an LMDB split or a feature file.

    Run again, it reads what is new or changed and removes what is gone. A killed run goes on where it stopped.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="SOURCE")]
    """A folder of pictures, a split's LMDB or its imgs folder, picture features as jsonl, npz or parquet, or a folder
    of feature shards, also s3://…, gs://… or hf://…"""
    output: IndexOutput = None
    engine: EngineName | None = None
    """How it is searched: exact; quantized, as exact and several times as fast; or usearch, a graph for millions of
    vectors; default: as it is, else exact"""
    vector_type: VectorType | None = None
    """float16 halves the disk; default: as it is, else float32"""
    keep_missing: bool = False
    """Keep the items whose pictures are gone"""
    prune: bool = False
    """Remove also the items of a folder that is gone as a whole and held more than a tenth of the index"""
    replace_source: bool = False
    """Remove what came from another source before, though most of it is not in this one"""

    renew: bool = False
    """Compute again the pictures that an index from before sees otherwise than a new one: those that a camera held
    sideways wrote, and with another --decode all"""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.check(self, [settings.excludes("prune", "keep_missing", "one removes what is gone", refused=True)])
        if self.output is None:
            raise ConfigError("--output: expected the folder of the index, or milvus://HOST:PORT/COLLECTION")
        address = address_of(self.output, self.milvus_config)
        if not isinstance(address, Path) and (self.engine or self.vector_type):
            raise ConfigError(f"--engine, --vector-type: are for folders, {address.store} has its own; leave them out")


def run(options: Options) -> None:
    """Builds or updates; raises CnClipError, with all kept that was reported done."""
    from cn_clip.index import building

    building.update(options, building.job_of(options), command.Speaker(quiet=options.json))


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    execute(run, Options, args, "--output")


if __name__ == "__main__":
    main()

"""Builds the LMDB folders of a dataset from its tsv and jsonl files.

python cn_clip/preprocess/build_lmdb_dataset.py --data_dir ${DATAPATH}/datasets/MUGE --splits train,valid,test
"""

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from cn_clip import command, settings, terminal
from cn_clip.errors import ConfigError
from cn_clip.option_types import CheckPictures, CheckWorkers, DataDir, Json, Shrink


@dataclass(frozen=True)
class Options:
    """Pictures ({split}_imgs.tsv) and sentences ({split}_texts.jsonl) to LMDB, for training and feature extraction."""

    data_dir: DataDir
    splits: str
    """The splits to build, joined by commas (train,valid,test)"""
    lmdb_dir: str | None = None
    """Where the LMDB folders go; default: the folder lmdb in data_dir"""
    on_error: Literal["stop", "skip"] = "stop"
    """At a faulty record: stop, leaving what was there before, or skip it (counted and listed)"""
    check_pictures: CheckPictures = "decode"
    num_workers: CheckWorkers = 2
    shrink: Shrink = None
    json: Json = False

    ADDED = ("shrink",)  # see `command.spelled_out`

    def __post_init__(self) -> None:
        split_names(self.splits)
        settings.check(self)


def split_names(splits: str) -> list[str]:
    """`train,valid` -> the names in order, each once; raises ConfigError for an empty name or one with a slash."""
    names = list(dict.fromkeys(name.strip() for name in splits.split(",")))
    for name in names:
        if not name or name.startswith(".") or "/" in name or "\\" in name:
            raise ConfigError(f"--splits: expected names joined by commas such as train,valid, got {splits!r}")
    return names


def run(options: Options) -> None:
    """Builds each split; raises DataError at the first fault unless faults are skipped."""
    from cn_clip.data import building

    reports = building.build_splits(
        options.data_dir,
        split_names(options.splits),
        Path(options.lmdb_dir or Path(options.data_dir) / "lmdb"),
        check=options.check_pictures,
        num_workers=options.num_workers,
        shrink=options.shrink,
        on_error=options.on_error,
        tell=partial(print, file=sys.stderr if options.json else sys.stdout),
    )
    if options.json:
        terminal.print_json({"splits": [report.as_dict() for report in reports]})


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options)


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

"""Reads a dataset to the end and lists every fault with file, line and id; exit status 1 when there is one.

python cn_clip/preprocess/check_dataset.py --data_dir ${DATAPATH}/datasets/MUGE --splits train,valid
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from cn_clip import command, settings, terminal
from cn_clip.option_types import CheckPictures, CheckWorkers, DataDir, Json
from cn_clip.preprocess.build_lmdb_dataset import split_names


@dataclass(frozen=True)
class Options:
    """Checks the tsv and jsonl files of a dataset and, where it is built, the LMDB against them."""

    data_dir: DataDir
    splits: str | None = None
    """The splits to check, joined by commas (train,valid,test); default: all that are there"""
    lmdb_dir: str | None = None
    """Where the LMDB folders are; default: the folder lmdb in data_dir"""
    check_pictures: CheckPictures = "decode"
    num_workers: CheckWorkers = 2
    json: Json = False

    def __post_init__(self) -> None:
        if self.splits is not None:
            split_names(self.splits)
        settings.check(self)


def run(options: Options) -> int:
    """Checks each split; returns 1 when there is a fault."""
    from cn_clip.data import checks

    data_dir = Path(options.data_dir)
    lmdb_dir = Path(options.lmdb_dir or data_dir / "lmdb")
    checks.check_folder(data_dir)
    splits = checks.splits_in(data_dir, lmdb_dir) if options.splits is None else split_names(options.splits)
    look = partial(checks.check_split, check=options.check_pictures, num_workers=options.num_workers)
    results = []
    for split in splits:
        print(f"checking split {split} ...", file=sys.stderr)
        results.append(look(data_dir, split, lmdb_dir / split))
    num_faults = sum(len(result.faults) for result in results)
    if options.json:
        summary = {"ok": not num_faults, "faults": num_faults, "splits": [result.as_dict() for result in results]}
        terminal.print_json(summary)
        return int(num_faults > 0)
    for result in results:
        for fault in result.faults:
            print(fault)
        for note in result.notes:
            print(f"{result.split}: {note}")
        lmdb = "no LMDB" if result.num_pairs is None else f"LMDB with {result.num_pairs} pairs"
        counts = f"{result.num_images} sound images, {result.num_texts} sound texts, {lmdb}"
        print(f"{result.split}: {counts}, {len(result.faults)} faults")
    return int(num_faults > 0)


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

"""Reads a dataset to the end and lists every fault with file, line and id; exit status 1 when there is one.

python cn_clip/preprocess/check_dataset.py --data_dir ${DATAPATH}/datasets/MUGE --splits train,valid
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cn_clip import command, settings, terminal
from cn_clip.digests import is_folder
from cn_clip.errors import DataError
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
    from cn_clip.data.checks import check_split
    from cn_clip.files import settle

    settle(options.data_dir)
    lmdb_dir = Path(options.lmdb_dir or Path(options.data_dir) / "lmdb")
    results = []
    for split in _splits(options, lmdb_dir):
        print(f"checking split {split} ...", file=sys.stderr)
        results.append(
            check_split(
                options.data_dir,
                split,
                lmdb_dir / split,
                check=options.check_pictures,
                num_workers=options.num_workers,
            )
        )
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


def _splits(options: Options, lmdb_dir: Path) -> list[str]:
    data_dir = Path(options.data_dir)
    if not is_folder(data_dir):
        raise DataError("the data_dir does not exist; give the folder of the tsv and jsonl files", at=data_dir)
    if options.splits is not None:
        return split_names(options.splits)
    found = {path.name.removesuffix("_imgs.tsv") for path in data_dir.glob("*_imgs.tsv")}
    found |= {path.name.removesuffix("_texts.jsonl") for path in data_dir.glob("*_texts.jsonl")}
    found |= {path.parent.name for path in lmdb_dir.glob("*/imgs") if not path.parent.name.startswith(".")}
    if not found:
        raise DataError("holds no dataset; expected files such as train_imgs.tsv and train_texts.jsonl", at=data_dir)
    return sorted(found)


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

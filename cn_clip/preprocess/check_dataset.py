"""Reads a dataset to the end and lists every fault with file, line and id; exit status 1 when there is one.

python cn_clip/preprocess/check_dataset.py --data_dir ${DATAPATH}/datasets/MUGE --splits train,valid
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cn_clip import command, settings, terminal
from cn_clip.language import both, translated
from cn_clip.option_types import CheckPictures, CheckWorkers, DataDir, Json
from cn_clip.preprocess.build_lmdb_dataset import split_names
from cn_clip.terminal import counted

if TYPE_CHECKING:
    from cn_clip.data.checks import SplitCheck


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
        print(both(f"正在检查 {split} ……", f"checking split {split} ..."), file=sys.stderr)
        results.append(look(data_dir, split, lmdb_dir / split))
    num_faults = sum(len(result.faults) for result in results)
    if options.json:
        summary = {"ok": not num_faults, "faults": num_faults, "splits": [result.as_dict() for result in results]}
        terminal.print_json(summary)
        return int(num_faults > 0)
    for result in results:
        for fault in result.faults:
            print(translated(str(fault)))
        for note in result.notes:
            print(f"{result.split}: {note}")
        print(_summary(result))
    return int(num_faults > 0)


def _summary(result: "SplitCheck") -> str:
    """`train: 1,471 valid images, 4,145 valid texts, 4,145 pairs in the LMDB, no problems found`."""
    images, texts, pairs, found = result.num_images, result.num_texts, result.num_pairs, len(result.faults)
    in_chinese = [
        f"{result.split}：{images:,} 张有效图片",
        f"{texts:,} 条有效文本",
        "没有 LMDB" if pairs is None else f"LMDB 有 {pairs:,} 个图文对",
        f"发现 {found:,} 处问题" if found else "没有发现问题",
    ]
    in_english = [
        f"{result.split}: {counted(images, 'valid image')}",
        counted(texts, "valid text"),
        "no LMDB" if pairs is None else f"{counted(pairs, 'pair')} in the LMDB",
        f"{counted(found, 'problem')} found" if found else "no problems found",
    ]
    return both("，".join(in_chinese), ", ".join(in_english))


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

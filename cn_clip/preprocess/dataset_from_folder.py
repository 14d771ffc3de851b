"""Makes a dataset, tsv and jsonl files, of a folder of pictures whose names, or a table, carry the Chinese text.

python cn_clip/preprocess/dataset_from_folder.py --folder pictures --output ${DATAPATH}/datasets/mine --lmdb
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from cn_clip import command, terminal
from cn_clip.errors import ConfigError
from cn_clip.option_types import Json
from cn_clip.preprocess.build_lmdb_dataset import split_names


@dataclass(frozen=True)
class Options:
    """A folder of pictures to {split}_imgs.tsv and {split}_texts.jsonl; the picture files' bytes are kept unchanged.

    Without --table the text is the file name: 0001妙蛙种子.png carries 妙蛙种子.
    """

    output: str
    """The folder for the dataset files; made when it is not there"""
    folder: str | None = None
    """The folder of pictures, sub-folders included; default with --table: the folder of the table"""
    table: str | None = None
    """A .csv, .tsv or .parquet table with one row per caption, instead of the file names"""
    image_column: str = "image"
    """The table's column of picture files, relative to the folder"""
    text_column: str = "text"
    """The table's column of captions"""
    id_column: str | None = None
    """The table's column of picture ids; default: ids are made as --ids says"""
    ids: Literal["auto", "number", "sequence", "name"] = "auto"
    """Picture ids: the number that file names start with, 0, 1, 2, ..., or the name; auto: numbers, if unique"""
    simplify: bool = False
    """Turn traditional characters into simplified ones"""
    splits: str = "train,valid,test"
    """The splits, joined by commas"""
    split_ratio: str = "0.8,0.1,0.1"
    """The share of each split; 1,0,0 puts all into the first"""
    seed: int = 0
    """Another seed is another division; a picture's split depends on its id or name and the seed alone"""
    on_error: Literal["stop", "skip"] = "stop"
    """At a picture that cannot be read or a row that is faulty: stop, or skip it (counted and listed)"""
    lmdb: bool = False
    """Build the LMDB folders as well"""
    json: Json = False

    def __post_init__(self) -> None:
        if self.folder is None and self.table is None:
            raise ConfigError("give --folder, the folder of the pictures, or --table, a table that names them")
        if self.id_column is not None and self.table is None:
            raise ConfigError("--id-column: is a column of a table; give --table too")
        shares(self.split_ratio, split_names(self.splits))


def shares(ratio: str, splits: Sequence[str]) -> dict[str, float]:
    """`8,1,1` -> 0.8, 0.1, 0.1 of the splits; raises ConfigError for other than one number of 0 or more for each."""
    try:
        numbers = [float(part) for part in ratio.split(",")]
    except ValueError:
        numbers = []
    total = sum(numbers)
    if len(numbers) != len(splits) or min(numbers) < 0 or not 0 < total < math.inf:
        raise ConfigError(f"--split-ratio: expected {len(splits)} numbers of 0 or more joined by commas, got {ratio!r}")
    return {split: number / total for split, number in zip(splits, numbers, strict=True)}


def run(options: Options) -> None:
    """Writes the files of all splits at once; raises DataError at the first fault unless faults are skipped."""
    from cn_clip.data import building, captions

    output, parts = Path(options.output), shares(options.split_ratio, split_names(options.splits))
    splits, faults = captions.make_dataset(
        output,
        options.folder,
        options.table,
        columns={name: getattr(options, name) for name in ("image_column", "text_column", "id_column")},
        ids=options.ids,
        shares=parts,
        seed=options.seed,
        simplify=options.simplify,
        on_error=options.on_error,
    )
    tell = partial(print, file=sys.stderr if options.json else sys.stdout)
    for name, split in splits.items():
        tell(f"{name}: {split.num_images} images, {len(split.texts)} texts")
    empty = [name for name in parts if name not in splits]
    if empty:
        tell(f"no picture fell into {', '.join(empty)}: no file written for it")
    if options.lmdb:
        # The pictures have been looked at.
        building.build_splits(
            output, list(splits), output / "lmdb", check="none", num_workers=0, on_error="stop", tell=tell
        )
    if options.json:
        counts = [{"split": name, "images": x.num_images, "texts": len(x.texts)} for name, x in splits.items()]
        skipped = [fault.as_dict() for fault in faults]
        terminal.print_json({"output": str(output), "splits": counts, "skipped": skipped})


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

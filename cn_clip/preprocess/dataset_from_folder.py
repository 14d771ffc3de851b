"""Makes a dataset, tsv and jsonl files, of a folder of pictures whose names, or a table, carry the Chinese text.

python cn_clip/preprocess/dataset_from_folder.py --folder pictures --output ${DATAPATH}/datasets/mine --lmdb
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from cn_clip import command, terminal
from cn_clip.errors import ConfigError
from cn_clip.language import both
from cn_clip.option_types import Json
from cn_clip.preprocess.build_lmdb_dataset import split_names
from cn_clip.terminal import counted

if TYPE_CHECKING:
    from cn_clip.data.captions import Copies, SplitContent


@dataclass(frozen=True)
class Options:
    """A folder of pictures to {split}_imgs.tsv and {split}_texts.jsonl; the picture files' bytes are kept unchanged.

    Without --table the text is the file name: 0001妙蛙种子.png carries 妙蛙种子. Before it writes, the command shows
    some captions and warns of those that people rarely mean.
    """

    output: str
    """The folder for the dataset files; made when it is not there"""
    folder: str | None = None
    """The folder of pictures, sub-folders included; default with --table: the folder of the table"""
    table: str | None = None
    """A table with one row per caption, .csv, .tsv, .jsonl, .parquet or .xlsx, instead of the file names"""
    image_column: str = "image"
    """The table's column of picture files, relative to the folder"""
    text_column: str = "text"
    """The table's column of captions"""
    id_column: str | None = None
    """The table's column of picture ids; default: ids are made as --ids says"""
    ids: Literal["auto", "number", "sequence", "name"] = "auto"
    """Picture ids: the number that file names start with, 0, 1, 2, ..., or the name; auto: numbers, if unique"""
    text_from: Literal["name", "folder", "both"] = "name"
    """What carries the text: the file's name, the name of its folder, or the folder's before the file's"""
    clean_names: bool = False
    """Take counters (2, (1)), marks of copies, dates and what cameras, screenshots and chat programs write off names;
    a name of which nothing would be left stays"""
    preview: bool = False
    """Show the captions and the warnings, and write nothing"""
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
        if self.table is not None and (self.text_from != "name" or self.clean_names):
            option = "--clean-names" if self.clean_names else "--text-from"
            raise ConfigError(f"{option}: is for texts from names; those of a table are taken as they are")
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
    from cn_clip.data.names import Naming
    from cn_clip.data.review import review

    output, parts = Path(options.output), shares(options.split_ratio, split_names(options.splits))
    naming = Naming(options.text_from, options.clean_names)
    listing = captions.list_pictures(
        options.folder,
        options.table,
        columns={name: getattr(options, name) for name in ("image_column", "text_column", "id_column")},
        naming=naming,
        ids=options.ids,
        simplify=options.simplify,
        on_error=options.on_error,
    )
    tell = partial(print, file=sys.stderr if options.json else sys.stdout, flush=True)
    reviewed = review([picture for _, picture in listing.pictures], naming if options.table is None else None)
    reviewed.tell(tell)
    splits, copies = dict[str, captions.SplitContent](), captions.Copies()
    if not options.preview:
        splits, copies = captions.write_dataset(
            output, listing, captions.Division(parts, options.seed), on_error=options.on_error
        )
        _tell_splits(splits, copies, parts, len(listing.pictures), tell)
    if splits and options.lmdb:
        # The pictures have been looked at.
        building.build_splits(
            output, list(splits), output / "lmdb", check="none", num_workers=0, on_error="stop", tell=tell
        )
    if options.json:
        counts = [{"split": name, "images": x.num_images, "texts": len(x.texts)} for name, x in splits.items()]
        skipped = [fault.as_dict() for fault in listing.faults]
        found = {"copies": copies.count, "captions": reviewed.as_dict()}
        terminal.print_json({"output": str(output), "splits": counts, "skipped": skipped, **found})


def _tell_splits(
    splits: "dict[str, SplitContent]",
    copies: "Copies",
    parts: dict[str, float],
    num_pictures: int,
    tell: Callable[[str], None],
) -> None:
    """How many pictures and texts each split has, which splits are empty, and what copies there are."""
    for name, split in splits.items():
        images, texts = split.num_images, len(split.texts)
        in_english = f"{name}: {counted(images, 'image')}, {counted(texts, 'text')}"
        tell(both(f"{name}：{images:,} 张图片，{texts:,} 条文本", in_english))
    if empty := ", ".join(name for name in parts if name not in splits):
        in_chinese, in_english = (
            f"没有图片分到 {empty}，没有写它的文件",
            f"no picture fell into {empty}: no file written for it",
        )
        if any(parts[name] for name in parts if name not in splits):
            in_chinese += f"；{num_pictures} 张图片太少，请增加图片，或换 --split-ratio 或 --seed"
            in_english += f"; {num_pictures} pictures are few, so add some, or give another --split-ratio or --seed"
        tell(both(in_chinese, in_english))
    if copies.count:
        count, differ = copies.count, copies.num_other_captions
        pairs = ", ".join(f"{copy} = {first}" for copy, first in copies.examples)
        more = "…" if count > len(copies.examples) else ""
        in_chinese = f"注意：{count} 张图片与前面的图片内容完全相同，放进同一个划分：{pairs}{more}"
        in_english = f"warning: identical copies of earlier pictures, kept in the same split: {count}, {pairs}{more}"
        if differ:
            in_chinese += f"；其中 {differ} 张的文本不同，请检查是否起错了名字"
            in_english += f"; with another caption: {differ}, so check whether a name is wrong"
        tell(both(in_chinese, in_english))


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

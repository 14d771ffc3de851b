"""Makes a dataset, tsv and jsonl files, of a folder of pictures whose names, or a table, carry the Chinese text.

python cn_clip/preprocess/dataset_from_folder.py --folder pictures --output ${DATAPATH}/datasets/mine --lmdb
"""

import contextlib
import hashlib
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from cn_clip import command, terminal
from cn_clip.digests import is_folder, is_there
from cn_clip.errors import ConfigError, DataError
from cn_clip.option_types import Json
from cn_clip.preprocess.build_lmdb_dataset import print_skipped, split_names

if TYPE_CHECKING:
    from cn_clip.data.records import Fault, RecordId
    from cn_clip.preprocess.picture_lists import Picture


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
        shares(self.split_ratio, len(split_names(self.splits)))


def shares(ratio: str, num_splits: int) -> list[float]:
    """`8,1,1` -> [0.8, 0.1, 0.1]; raises ConfigError for other than `num_splits` numbers of 0 or more."""
    try:
        numbers = [float(part) for part in ratio.split(",")]
    except ValueError:
        numbers = []
    total = sum(numbers)
    if len(numbers) != num_splits or min(numbers) < 0 or not 0 < total < math.inf:
        raise ConfigError(f"--split-ratio: expected {num_splits} numbers of 0 or more joined by commas, got {ratio!r}")
    return [number / total for number in numbers]


def split_of(key: str, splits: list[str], ratio: list[float], seed: int) -> str:
    """The split of a picture: a fraction in [0, 1) hashed from the seed and its id or name, laid onto the shares."""
    digest = hashlib.blake2b(f"{seed}\0{key}".encode(), digest_size=8).digest()
    fraction = (int.from_bytes(digest, "big") >> 11) / 2**53
    bound = 0.0
    for split, share in zip(splits, ratio, strict=True):
        bound += share
        if fraction < bound:
            return split
    return [split for split, share in zip(splits, ratio, strict=True) if share][-1]  # the shares' sum was rounded down


@dataclass
class _Split:
    """What goes into one split: how many pictures, and each sentence with its pictures."""

    num_images: int = 0
    texts: "dict[str, list[RecordId]]" = field(default_factory=dict)


def run(options: Options) -> None:
    """Writes the files of all splits at once; raises DataError at the first fault unless faults are skipped."""
    faults: list[Fault] = []
    output = Path(options.output)
    out = sys.stderr if options.json else sys.stdout
    try:
        splits = _write(options, _listed(options, faults), output, faults)
    finally:
        print_skipped(faults, str(options.table or options.folder))
    for name, split in splits.items():
        print(f"{name}: {split.num_images} images, {len(split.texts)} texts", file=out)
    empty = [name for name in split_names(options.splits) if name not in splits]
    if empty:
        print(f"no picture fell into {', '.join(empty)}: no file written for it", file=out)
    if options.lmdb:
        _build_lmdb(output, list(splits), out)
    if options.json:
        terminal.print_json(_summary(output, splits, faults))


def _listed(options: Options, faults: "list[Fault]") -> "list[tuple[RecordId, Picture]]":
    from cn_clip.clip.picture_names import PICTURE_SUFFIXES
    from cn_clip.data.checks import sound_records
    from cn_clip.preprocess import picture_lists

    folder = Path(options.folder) if options.folder is not None else Path(str(options.table)).parent
    if not is_folder(folder):
        raise DataError("no such folder; --folder is the folder of the pictures", at=folder)
    if options.table is None:
        found = picture_lists.pictures_from_names(folder)
    else:
        columns = {name: getattr(options, name) for name in ("image_column", "text_column", "id_column")}
        found = picture_lists.pictures_from_table(Path(options.table), folder, **columns)
    pictures = list(sound_records(found, options.on_error, faults))
    if not pictures:
        endings = ", ".join(PICTURE_SUFFIXES)
        raise DataError(
            f"no usable picture; expected files ending in {endings} and their text", at=options.table or folder
        )
    return list(zip(picture_lists.assign_ids(pictures, options.ids), pictures, strict=True))


def _write(
    options: Options, pictures: "list[tuple[RecordId, Picture]]", output: Path, faults: "list[Fault]"
) -> dict[str, _Split]:
    from cn_clip.data.records import DATASET
    from cn_clip.files import written_together

    with written_together(output / DATASET, told=output) as scratch:
        splits = _write_images(options, pictures, scratch, faults)
        _write_texts(splits, scratch)
        if not splits:
            raise DataError("no picture of it can be read; see the list of faults", at=options.table or options.folder)
        _require_no_rest(output, [name for name in split_names(options.splits) if name not in splits])
        for path in sorted(scratch.iterdir()):
            if (output / path.name).exists():
                print(f"We will overwrite an existing file {output / path.name}", file=sys.stderr)
    return splits


def _write_images(
    options: Options, pictures: "list[tuple[RecordId, Picture]]", scratch: Path, faults: "list[Fault]"
) -> dict[str, _Split]:
    from cn_clip.data.checks import images_path, sound_records
    from cn_clip.data.records import image_line

    names = split_names(options.splits)
    ratio, convert = shares(options.split_ratio, len(names)), _converter(options.simplify)
    splits: dict[str, _Split] = {}
    with contextlib.ExitStack() as stack:
        files: dict[str, IO[bytes]] = {}
        for image_id, picture, data in sound_records(_read(pictures), options.on_error, faults):
            key = picture.name if picture.given_id is None else str(picture.given_id)
            name = split_of(key, names, ratio, options.seed)
            if name not in files:
                files[name] = stack.enter_context(open(images_path(scratch, name), "wb"))
            files[name].write(image_line(image_id, data))
            split = splits.setdefault(name, _Split())
            split.num_images += 1
            for caption in dict.fromkeys(map(convert, picture.captions)):
                split.texts.setdefault(caption, []).append(image_id)
    return {name: splits[name] for name in names if name in splits}


def _read(pictures: "list[tuple[RecordId, Picture]]") -> "Iterator[tuple[RecordId, Picture, bytes] | Fault]":
    from tqdm import tqdm

    from cn_clip.data.pictures import check_picture
    from cn_clip.data.records import Fault

    for image_id, picture in tqdm(pictures, unit=" pictures", disable=None):
        try:
            data = picture.path.read_bytes()
            check_picture(data, "decode")
        except OSError as error:
            yield Fault(str(picture.path), None, f"cannot be read ({error.strerror})", image_id)
        except DataError as error:
            yield Fault(str(picture.path), None, str(error), image_id)
        else:
            yield image_id, picture, data


def _converter(simplify: bool) -> Callable[[str], str]:
    if not simplify:
        return str
    import opencc

    convert: Callable[[str], str] = opencc.OpenCC("t2s").convert
    return convert


def _write_texts(splits: dict[str, _Split], scratch: Path) -> None:
    from cn_clip.data.checks import texts_path
    from cn_clip.data.records import text_line

    text_ids = itertools.count()  # one count for all splits: no id is used twice
    for name, split in splits.items():
        with open(texts_path(scratch, name), "w", encoding="utf-8", newline="\n") as stream:
            stream.writelines(text_line(next(text_ids), text, ids) for text, ids in split.texts.items())


def _require_no_rest(output: Path, empty: list[str]) -> None:
    from cn_clip.data.checks import images_path, texts_path

    for name in empty:
        for path in (images_path(output, name), texts_path(output, name)):
            if is_there(path):
                raise DataError(
                    f"is of an earlier run, and this one puts nothing into {name}; "
                    "remove it or choose another --output",
                    at=path,
                )


def _build_lmdb(output: Path, splits: list[str], out: IO[str]) -> None:
    from cn_clip.preprocess import build_lmdb_dataset

    built = build_lmdb_dataset.Options(str(output), ",".join(splits), check_pictures="none")
    with contextlib.redirect_stdout(out):
        build_lmdb_dataset.run(built)


def _summary(output: Path, splits: dict[str, _Split], faults: "list[Fault]") -> dict[str, object]:
    counts = [{"split": name, "images": x.num_images, "texts": len(x.texts)} for name, x in splits.items()]
    return {"output": str(output), "splits": counts, "skipped": [fault.as_dict() for fault in faults]}


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

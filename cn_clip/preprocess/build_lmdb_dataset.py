"""Builds the LMDB folders of a dataset from its tsv and jsonl files.

python cn_clip/preprocess/build_lmdb_dataset.py --data_dir ${DATAPATH}/datasets/MUGE --splits train,valid,test
"""

import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from cn_clip import command, settings, terminal
from cn_clip.digests import is_file, is_folder
from cn_clip.errors import ConfigError, DataError
from cn_clip.option_types import CheckPictures, CheckWorkers, DataDir, Json

if TYPE_CHECKING:
    from cn_clip.data.records import Fault, RecordId

MAX_FAULTS_SHOWN = 20

T = TypeVar("T")


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
    json: Json = False

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


@dataclass
class SplitReport:
    """What became of one split; `lmdb_dir` is None when nothing was left to build."""

    split: str
    lmdb_dir: str | None = None
    num_pairs: int = 0
    num_images: int = 0
    faults: "list[Fault]" = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The report for --json."""
        return {
            "split": self.split,
            "lmdb_dir": self.lmdb_dir,
            "pairs": self.num_pairs,
            "images": self.num_images,
            "skipped": [fault.as_dict() for fault in self.faults],
        }


def run(options: Options) -> None:
    """Builds each split; raises DataError at the first fault unless faults are skipped."""
    out = sys.stderr if options.json else sys.stdout
    splits = split_names(options.splits)
    print(f"Dataset splits to be processed: {', '.join(splits)}", file=out)
    _require_inputs(options, splits)
    reports = []
    for split in splits:
        reports.append(build_split(options, split))
        _print_report(reports[-1], out)
    if not any(report.lmdb_dir for report in reports):
        raise DataError("no split has a usable record left; see the list of faults", at=options.data_dir)
    print("done!", file=out)
    if options.json:
        terminal.print_json({"splits": [report.as_dict() for report in reports]})


def _require_inputs(options: Options, splits: list[str]) -> None:
    from cn_clip.data.checks import images_path, texts_path
    from cn_clip.files import settle

    settle(options.data_dir)
    if not is_folder(options.data_dir):
        raise DataError("the data_dir does not exist; give the folder of the tsv and jsonl files", at=options.data_dir)
    for split in splits:
        for path in (images_path(options.data_dir, split), texts_path(options.data_dir, split)):
            if not is_file(path):
                raise DataError(
                    f"no such file; the split {split!r} needs {split}_imgs.tsv and its _texts.jsonl", at=path
                )


def build_split(options: Options, split: str) -> SplitReport:
    """Builds one split beside its place and moves it there; raises DataError at a fault that is not skipped."""
    from cn_clip.data.lmdb_store import SplitWriter
    from cn_clip.files import staged_folder

    target = Path(options.lmdb_dir or Path(options.data_dir) / "lmdb") / split
    report = SplitReport(split)
    if target.is_dir():
        print(f"We will overwrite an existing LMDB file {target}", file=sys.stderr if options.json else sys.stdout)
    try:
        with staged_folder(target) as folder:
            with SplitWriter(folder, told=target) as writer:
                _fill(options, split, writer, report.faults)
            report.num_pairs, report.num_images = writer.num_pairs, writer.num_images
    except _NothingLeftError:
        return report
    report.lmdb_dir = str(target)
    return report


class _NothingLeftError(Exception):
    """All pictures or all sentences of a split were skipped."""


def _fill(options: Options, split: str, writer: Any, faults: "list[Fault]") -> None:
    from cn_clip.data.checks import checked_images, checked_texts, images_path, sound_records, texts_path
    from cn_clip.data.lmdb_store import Pair

    images_file, texts_file = images_path(options.data_dir, split), texts_path(options.data_dir, split)
    image_ids: set[RecordId] = set()
    images = checked_images(images_file, check=options.check_pictures, num_workers=options.num_workers)
    for image in sound_records(_progress(images, f"{split} images"), options.on_error, faults):
        writer.put_image(image.image_id, image.base64)
        image_ids.add(image.image_id)
    num_texts = 0
    texts = checked_texts(texts_file, image_ids, images_file=images_file)
    for text in sound_records(_progress(texts, f"{split} texts"), options.on_error, faults):
        num_texts += 1
        for image_id in text.image_ids:
            writer.put_pair(Pair(image_id, text.text_id, text.text))
    if not (image_ids and num_texts):
        raise _NothingLeftError


def _progress(items: Iterable[T], what: str) -> Iterator[T]:
    from tqdm import tqdm

    yield from tqdm(items, desc=what, unit=" records", disable=None)


def print_skipped(faults: "list[Fault]", where: str) -> None:
    """Says on stderr how many records were skipped, and which: the first 20."""
    for fault in faults[:MAX_FAULTS_SHOWN]:
        print(f"skipped: {fault}", file=sys.stderr)
    if faults:
        more = f", the first {MAX_FAULTS_SHOWN} listed; all with --json" if len(faults) > MAX_FAULTS_SHOWN else ""
        print(f"skipped {len(faults)} faults in {where}{more}", file=sys.stderr)


def _print_report(report: SplitReport, out: Any) -> None:
    print_skipped(report.faults, f"split {report.split}")
    if report.lmdb_dir is None:
        print(f"skipped split {report.split}: no picture or no sentence is left of it", file=sys.stderr)
        return
    for count, what, folder in ((report.num_pairs, "pairs", "pairs"), (report.num_images, "images", "imgs")):
        place = Path(report.lmdb_dir) / folder
        print(f"Finished serializing {count} {report.split} split {what} into {place}.", file=out)


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options)


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

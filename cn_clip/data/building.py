"""Builds what training reads: the LMDB of a split from its tsv and jsonl files, and WebDataset shards from an LMDB."""

import io
import itertools
import json
import sys
import tarfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np

from cn_clip.clip.picture_names import SUFFIXES_OF
from cn_clip.clip.pictures import opened
from cn_clip.data.checks import (
    by_threads,
    check_folder,
    checked_images,
    checked_texts,
    images_path,
    sound_records,
    texts_path,
)
from cn_clip.data.lmdb_store import IMAGES, PAIRS, ImageStore, Pair, PairStore, SplitWriter
from cn_clip.data.pictures import PictureCheck, check_picture, shrunk
from cn_clip.data.records import Fault, ImageRecord, RecordId
from cn_clip.digests import is_file
from cn_clip.errors import ConfigError, DataError, Where
from cn_clip.files import staged_folder
from cn_clip.language import both, translated
from cn_clip.processes import usable_cores
from cn_clip.progress import counted, progress

OnFault: TypeAlias = Literal["stop", "skip"]

MAX_FAULTS_SHOWN = 20
SIZES_FILE = "sizes.json"


# --- the LMDB of a split ----------------------------------------------------------------------------------------------


@dataclass
class SplitReport:
    """What became of one split; `lmdb_dir` is None when nothing was left to build."""

    split: str
    lmdb_dir: str | None = None
    num_pairs: int = 0
    num_images: int = 0
    num_shrunk: int = 0
    faults: list[Fault] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """The report for --json."""
        return {
            "split": self.split,
            "lmdb_dir": self.lmdb_dir,
            "pairs": self.num_pairs,
            "images": self.num_images,
            "shrunk": self.num_shrunk,
            "skipped": [fault.as_dict() for fault in self.faults],
        }


class _NothingLeftError(Exception):
    """All pictures or all sentences of a split were skipped."""


def build_splits(
    data_dir: str | Path,
    splits: Sequence[str],
    lmdb_dir: Path,
    *,
    check: PictureCheck,
    num_workers: int,
    on_error: OnFault,
    tell: Callable[[str], None],
    shrink: int | None = None,
) -> list[SplitReport]:
    """Builds `lmdb_dir/SPLIT` of each split; what is skipped is listed on stderr.

    check, num_workers, shrink: see `checked_images`. tell: called with each line of the report.
    Raises DataError for a missing file, at the first fault unless faults are skipped, and when nothing is left.
    """
    tell(f"Dataset splits to be processed: {', '.join(splits)}")
    check_folder(data_dir)
    for split in splits:
        for path in (images_path(data_dir, split), texts_path(data_dir, split)):
            if not is_file(path):
                raise DataError(
                    f"no such file; the split {split!r} needs {split}_imgs.tsv and its _texts.jsonl", at=path
                )
    reports = []
    for split in splits:
        target = lmdb_dir / split
        if target.is_dir():
            tell(f"We will overwrite an existing LMDB file {target}")
        images = checked_images(images_path(data_dir, split), check=check, num_workers=num_workers, shrink=shrink)
        report = _build(data_dir, split, target, images, on_error=on_error)
        reports.append(report)
        print_skipped(report.faults, f"split {split}")
        if report.lmdb_dir is None:
            in_english = f"skipped split {split}: no picture or no sentence is left of it"
            print(both(f"跳过划分 {split}：没有剩下图片，或没有剩下文本", in_english), file=sys.stderr)
            continue
        for count, what, folder in ((report.num_pairs, "pairs", PAIRS), (report.num_images, "images", IMAGES)):
            tell(f"Finished serializing {count} {split} split {what} into {target / folder}.")
        if shrink is not None:
            smaller, total = report.num_shrunk, report.num_images
            in_chinese = f"{split} 的 {total} 张图片中，{smaller} 张缩小到短边 {shrink} 像素。"
            in_english = (
                f"Made {smaller} of {total} pictures of {split} smaller, to {shrink} pixels on the shorter side."
            )
            tell(both(in_chinese, in_english))
    if not any(report.lmdb_dir for report in reports):
        raise DataError("no split has a usable record left; see the list of faults", at=data_dir)
    tell("done!")
    return reports


def _build(
    data_dir: str | Path, split: str, target: Path, images: Iterable[ImageRecord | Fault], *, on_error: OnFault
) -> SplitReport:
    """Builds one split beside `target` and moves it there. images: its pictures, checked."""
    images_file, texts_file = images_path(data_dir, split), texts_path(data_dir, split)
    report, image_ids, num_texts = SplitReport(split), set[RecordId](), 0
    try:
        with staged_folder(target) as folder:
            with SplitWriter(folder, told=target) as writer:
                read = counted(images, both("条", "records"), both(f"{split} 图片", f"{split} pictures"))
                with closing(read):
                    for image in sound_records(read, on_error, report.faults):
                        writer.put_image(image.image_id, image.base64)
                        image_ids.add(image.image_id)
                        report.num_shrunk += image.is_shrunk
                texts = checked_texts(texts_file, image_ids, images_file=images_file)
                told = counted(texts, both("条", "records"), both(f"{split} 文本", f"{split} texts"))
                with closing(told):
                    for text in sound_records(told, on_error, report.faults):
                        num_texts += 1
                        for image_id in text.image_ids:
                            writer.put_pair(Pair(image_id, text.text_id, text.text))
                if not (image_ids and num_texts):
                    raise _NothingLeftError
            report.num_pairs, report.num_images = writer.num_pairs, writer.num_images
    except _NothingLeftError:
        return report
    report.lmdb_dir = str(target)
    return report


def print_skipped(faults: Sequence[Fault], where: str) -> None:
    """Says on stderr how many records were skipped, and which: the first 20."""
    for fault in faults[:MAX_FAULTS_SHOWN]:
        print(both("跳过：", "skipped: ") + translated(str(fault)), file=sys.stderr)
    if faults:
        count, most = len(faults), MAX_FAULTS_SHOWN
        in_chinese, in_english = f"{where}：共跳过 {count} 处问题", f"skipped {count} faults in {where}"
        if count > most:
            in_chinese += f"，以上是前 {most} 处；加 --json 列出全部"
            in_english += f", the first {most} listed; all with --json"
        print(both(in_chinese, in_english), file=sys.stderr)


# --- shards -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shards:
    """What was written. pattern: the value of --train-data that names them all. num_shrunk: pairs of which the picture
    was made smaller."""

    pattern: str
    num_shards: int
    num_pairs: int
    num_bytes: int
    num_shrunk: int


def write_shards(
    source: Path,
    output: Path,
    *,
    pairs_per_shard: int,
    num_shards: int | None,
    seed: int,
    overwrite: bool,
    shrink: int | None = None,
) -> Shards:
    """Writes the pairs of an LMDB, shuffled by `seed`, as 000000.tar, 000001.tar, ... of a folder, whole or not at all.

    num_shards: so many of equal size give or take one pair, instead of `pairs_per_shard`. The same pairs give the
    same bytes. shrink: makes pictures smaller, see `pictures.shrunk`.
    Raises DataError when the folder holds something already, or for a pair that cannot be read.
    """
    images, pairs = ImageStore(source / IMAGES), PairStore(source / PAIRS)
    if not len(pairs):
        raise DataError("holds no pair of picture and text; is this a test split?", at=pairs.folder)
    present = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    others = [name for name in present if not (name.endswith(".tar") or name == SIZES_FILE)]
    if others:
        raise DataError(f"holds other things ({', '.join(others[:3])}); choose a new folder for the shards", at=output)
    if present and not overwrite:
        raise DataError(f"holds {len(present)} files already; give --overwrite or choose another --output", at=output)
    order = np.random.default_rng(seed % 2**64).permutation(len(pairs))
    if num_shards is None:
        shards = [order[first : first + pairs_per_shard] for first in range(0, len(pairs), pairs_per_shard)]
    elif num_shards <= len(pairs):
        shards = np.array_split(order, num_shards)
    else:
        raise ConfigError(f"--num-shards {num_shards}: more than the {len(pairs)} pairs; choose fewer")
    names, num_shrunk = [f"{number:06d}" for number in range(len(shards))], 0
    sample = partial(_sample, images, pairs, shrink)
    samples = by_threads(sample, order.tolist(), 0 if shrink is None else usable_cores())
    with staged_folder(output) as folder:
        with progress(len(pairs), both("对", "pairs"), both("写分片", "writing shards")) as bar:
            for name, numbers in zip(names, shards, strict=True):
                with tarfile.open(folder / f"{name}.tar", mode="w", format=tarfile.USTAR_FORMAT) as tar:
                    for position, (files, is_shrunk) in enumerate(itertools.islice(samples, len(numbers))):
                        num_shrunk += is_shrunk
                        for suffix, content in files:
                            # No owner and no time: the same pairs give the same bytes.
                            info = tarfile.TarInfo(f"{name}{position:06d}.{suffix}")
                            info.size = len(content)
                            tar.addfile(info, io.BytesIO(content))
                        bar.advance()
        with open(folder / SIZES_FILE, "w", encoding="utf-8") as stream:
            json.dump({f"{name}.tar": len(numbers) for name, numbers in zip(names, shards, strict=True)}, stream)
        num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    pattern = str(output / (f"{{{names[0]}..{names[-1]}}}.tar" if len(names) > 1 else f"{names[0]}.tar"))
    return Shards(pattern, len(shards), len(pairs), num_bytes, num_shrunk)


def _sample(
    images: ImageStore, pairs: PairStore, shrink: int | None, number: int
) -> tuple[list[tuple[str, bytes]], bool]:
    """(suffix, content) of the files of a pair, and whether its picture was made smaller.

    Raises DataError for what training or other tools would refuse.
    """
    pair = pairs[number]
    try:
        text = pair.text.encode("utf-8")
    except UnicodeEncodeError as error:
        found = f"{pair.text[error.start]!r} at character {error.start}"
        where = Where(pairs.folder, part=f"text id {pair.text_id!r}", id=pair.text_id)
        raise DataError(f"its text is not valid Unicode ({found}); correct it and build again", at=where) from error
    data = images.picture(pair.image_id)
    where = images.where(pair.image_id)
    try:
        check_picture(data, "header")
        picture = data if shrink is None else shrunk(data, shrink)
        with opened(picture) as image:
            kind = str(image.format)
        suffix = SUFFIXES_OF[kind][0].removeprefix(".")
    except DataError as error:
        raise DataError(error, at=where) from error
    except KeyError as error:
        raise DataError(f"is a {kind} picture; expected one of {', '.join(SUFFIXES_OF)}", at=where) from error
    ids = json.dumps({"image_id": pair.image_id, "text_id": pair.text_id}, ensure_ascii=False).encode("utf-8")
    return [(suffix, picture), ("txt", text), ("json", ids)], picture is not data

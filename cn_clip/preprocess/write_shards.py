"""Writes WebDataset shards (tar files) from a built split, for training data of any size and for other tools.

python cn_clip/preprocess/write_shards.py --data_dir ${DATAPATH}/datasets/MUGE --split train --output shards/
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cn_clip import command, settings
from cn_clip.errors import ConfigError, DataError, Where
from cn_clip.option_types import Json
from cn_clip.settings import Range

if TYPE_CHECKING:
    from cn_clip.data.lmdb_store import ImageStore, Pair, PairStore

PAIRS_PER_SHARD = 10_000
SIZES_FILE = "sizes.json"


@dataclass(frozen=True)
class Options:
    """Pairs of an LMDB, shuffled, to 000000.tar, 000001.tar, ...: a picture as it is, .txt, and .json with the ids."""

    output: str
    """The folder for the shards, made whole or not at all"""
    data_dir: str | None = None
    """The folder of the dataset, with the LMDB of the split in lmdb/ (cn-clip dataset build makes it)"""
    split: str = "train"
    """The split of --data-dir to write"""
    lmdb: str | None = None
    """The LMDB of a split (.../lmdb/train), in place of --data-dir and --split"""
    pairs_per_shard: Annotated[int | None, Range(least=1)] = None
    """Pairs in a shard; default: 10000"""
    num_shards: Annotated[int | None, Range(least=1)] = None
    """Number of shards, of equal size give or take one pair, in place of --pairs-per-shard"""
    seed: int = 123
    """Seed of the order of the pairs"""
    overwrite: bool = False
    """Replace the shards that are in the folder"""
    json: Json = False

    def __post_init__(self) -> None:
        if (self.data_dir is None) == (self.lmdb is None):
            raise ConfigError("give --data-dir (and --split), or --lmdb: one of them says what to write")
        if self.pairs_per_shard is not None and self.num_shards is not None:
            raise ConfigError("--pairs-per-shard and --num-shards contradict each other; choose one")
        settings.check(self)


def run(options: Options) -> None:
    """Writes the folder; raises DataError when it holds something already, or at a pair that cannot be read."""
    from cn_clip.data.lmdb_store import IMAGES, PAIRS, ImageStore, PairStore
    from cn_clip.files import staged_folder

    say, output = command.Speaker(quiet=options.json), Path(options.output)
    source = Path(options.lmdb) if options.lmdb else Path(str(options.data_dir)) / "lmdb" / options.split
    images, pairs = ImageStore(source / IMAGES), PairStore(source / PAIRS)
    if not len(pairs):
        raise DataError("holds no pair of picture and text; is this a test split?", at=pairs.folder)
    _require_room(output, options.overwrite)
    shards = _shard_numbers(len(pairs), options)
    with staged_folder(output) as folder:
        _write(folder, images, pairs, shards)
        num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    pattern = str(output / (f"{{{0:06d}..{len(shards) - 1:06d}}}.tar" if len(shards) > 1 else "000000.tar"))
    say(f"Wrote {len(pairs)} pairs into {len(shards)} shards, {num_bytes / 1e6:.1f} MB")
    say(f"Train on them with: cn-clip train --train-data '{pattern}'")
    say(f"They serve up to {len(shards)} loading processes (processes of a run x its --num-workers).")
    say.result({"train_data": pattern, "shards": len(shards), "pairs": len(pairs), "bytes": num_bytes})


def _require_room(output: Path, overwrite: bool) -> None:
    present = sorted(path.name for path in output.iterdir()) if output.is_dir() else []
    others = [name for name in present if not (name.endswith(".tar") or name == SIZES_FILE)]
    if others:
        raise DataError(f"holds other things ({', '.join(others[:3])}); choose a new folder for the shards", at=output)
    if present and not overwrite:
        raise DataError(f"holds {len(present)} files already; give --overwrite or choose another --output", at=output)


def _shard_numbers(num_pairs: int, options: Options) -> list[list[int]]:
    """The numbers of the pairs in each shard."""
    import numpy as np

    order = np.random.default_rng(options.seed % 2**64).permutation(num_pairs)
    if options.num_shards is not None and options.num_shards > num_pairs:
        raise ConfigError(f"--num-shards {options.num_shards}: more than the {num_pairs} pairs; choose fewer")
    if options.num_shards is not None:
        return [part.tolist() for part in np.array_split(order, options.num_shards)]
    size = options.pairs_per_shard or PAIRS_PER_SHARD
    return [order[first : first + size].tolist() for first in range(0, num_pairs, size)]


def _write(folder: Path, images: "ImageStore", pairs: "PairStore", shards: list[list[int]]) -> None:
    import json

    from tqdm import tqdm

    with tqdm(desc="writing shards", total=len(pairs), unit=" pairs", disable=None) as progress:
        for shard, numbers in enumerate(shards):
            with open(folder / f"{shard:06d}.tar", "wb") as stream:
                _write_shard(stream, images, _chosen(pairs, numbers, progress.update), shard)
    with open(folder / SIZES_FILE, "w", encoding="utf-8") as stream:
        json.dump({f"{shard:06d}.tar": len(numbers) for shard, numbers in enumerate(shards)}, stream)


def _chosen(pairs: "PairStore", numbers: list[int], advance: Callable[[], object]) -> "Iterator[tuple[Pair, bytes]]":
    """Pairs and their texts in UTF-8; raises DataError for a text that training would refuse."""
    for number in numbers:
        pair = pairs[number]
        where = Where(pairs.folder, part=f"text id {pair.text_id!r}", id=pair.text_id)
        try:
            text = pair.text.encode("utf-8")
        except UnicodeEncodeError as error:
            found = f"{pair.text[error.start]!r} at character {error.start}"
            raise DataError(f"its text is not valid Unicode ({found}); correct it and build again", at=where) from error
        yield pair, text
        advance()


def _write_shard(stream: Any, images: "ImageStore", pairs: "Iterator[tuple[Pair, bytes]]", shard: int) -> None:
    import json
    import tarfile

    with tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for number, (pair, text) in enumerate(pairs):
            ids = {"image_id": pair.image_id, "text_id": pair.text_id}
            data = images.picture(pair.image_id)
            members = {
                _suffix(data, Where(images.folder, part=f"image id {pair.image_id!r}", id=pair.image_id)): data,
                "txt": text,
                "json": json.dumps(ids, ensure_ascii=False).encode("utf-8"),
            }
            for suffix, content in members.items():
                _add(tar, f"{shard:06d}{number:06d}.{suffix}", content)


def _add(tar: Any, name: str, data: bytes) -> None:
    import io
    import tarfile

    info = tarfile.TarInfo(name)  # no owner and no time: the same pairs give the same bytes
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def _suffix(data: bytes, where: Where) -> str:
    """The ending of a picture's file name, from its bytes; raises DataError for what other tools would not open."""
    from cn_clip.clip.picture_names import SUFFIXES_OF
    from cn_clip.clip.pictures import opened
    from cn_clip.data.pictures import check_picture

    try:
        check_picture(data, "header")
        with opened(data) as image:
            kind = str(image.format)
        return SUFFIXES_OF[_FORMATS.get(kind, kind)][0].removeprefix(".")
    except DataError as error:
        raise DataError(error, at=where) from error
    except KeyError as error:
        raise DataError(f"is a {kind} picture; expected one of {', '.join(SUFFIXES_OF)}", at=where) from error


# MPO is a JPEG with more pictures behind it.
_FORMATS = {"MPO": "JPEG"}


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

"""Writes WebDataset shards (tar files) from a built split, for training data of any size and for other tools.

python cn_clip/preprocess/write_shards.py --data_dir ${DATAPATH}/datasets/MUGE --split train --output shards/
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cn_clip import command, settings
from cn_clip.errors import ConfigError
from cn_clip.language import both
from cn_clip.option_types import Json, Shrink
from cn_clip.settings import Range

PAIRS_PER_SHARD = 10_000


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
    """The LMDB of a split (.../lmdb/train), instead of --data-dir and --split"""
    pairs_per_shard: Annotated[int | None, Range(least=1)] = None
    """Pairs in a shard; default: 10000"""
    num_shards: Annotated[int | None, Range(least=1)] = None
    """Number of shards, of equal size give or take one pair, instead of --pairs-per-shard"""
    seed: int = 123
    """Seed of the order of the pairs"""
    overwrite: bool = False
    """Replace the shards that are in the folder"""
    shrink: Shrink = None
    json: Json = False

    def __post_init__(self) -> None:
        if (self.data_dir is None) == (self.lmdb is None):
            raise ConfigError("give --data-dir (and --split), or --lmdb: one of them says what to write")
        if self.pairs_per_shard is not None and self.num_shards is not None:
            raise ConfigError("--pairs-per-shard and --num-shards contradict each other; choose one")
        settings.check(self)


def run(options: Options) -> None:
    """Writes the folder; raises DataError when it holds something already, or at a pair that cannot be read."""
    from cn_clip.data import building

    say = command.Speaker(quiet=options.json)
    shards = building.write_shards(
        Path(options.lmdb) if options.lmdb else Path(str(options.data_dir)) / "lmdb" / options.split,
        Path(options.output),
        pairs_per_shard=options.pairs_per_shard or PAIRS_PER_SHARD,
        num_shards=options.num_shards,
        seed=options.seed,
        overwrite=options.overwrite,
        shrink=options.shrink,
    )
    pairs, parts, size = shards.num_pairs, shards.num_shards, f"{shards.num_bytes / 1e6:.1f} MB"
    say(
        both(
            f"已写出 {pairs:,} 个图文对，{parts} 个分片，共 {size}", f"Wrote {pairs:,} pairs to {parts} shards, {size}"
        )
    )
    if options.shrink is not None:
        smaller, side = shards.num_shrunk, options.shrink
        in_english = f"{smaller:,} of the pictures were made smaller, to {side} pixels on the shorter side."
        say(both(f"其中 {smaller:,} 张图片缩小到短边 {side} 像素。", in_english))
    train = f"cn-clip train --train-data '{shards.pattern}'"
    say(both(f"用它们训练：{train}", f"Train on them with: {train}"))
    in_english = f"They serve up to {parts} loading processes (processes of a run x its --num-workers)."
    say(both(f"最多供 {parts} 个加载进程读取（训练进程数 × --num-workers）。", in_english))
    counts = {"shards": shards.num_shards, "pairs": shards.num_pairs, "bytes": shards.num_bytes}
    if options.shrink is not None:
        counts["shrunk"] = shards.num_shrunk
    say.result({"train_data": shards.pattern, **counts})


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

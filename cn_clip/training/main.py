"""Trains or fine-tunes: `python cn_clip/training/main.py --train-data=…/lmdb/train …` or `cn-clip train …`."""

import sys
from collections.abc import Sequence

from cn_clip import command, drop_in, ranks, terminal
from cn_clip.training.params import Options

__getattr__ = drop_in.names(__name__)


def run(options: Options) -> None:
    """Trains to the last step; raises CnClipError with the reason when it cannot, OSError when --logs is no folder."""
    from cn_clip.training import building

    building.run(options)


def without_local_rank(args: Sequence[str]) -> list[str]:
    """The arguments without --local_rank N, which launchers before torchrun give and LOCAL_RANK says too."""
    kept: list[str] = []
    rest = iter(args)
    for word in rest:
        name = word.split("=")[0].replace("_", "-")
        if name != "--local-rank":
            kept.append(word)
            continue
        print(f"{word}: changes nothing; LOCAL_RANK says it, and torchrun sets it", file=sys.stderr)
        if "=" not in word:
            next(rest, None)
    return kept


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, without_local_rank(sys.argv[1:] if args is None else args))
    if ranks.world_size() > 1:
        # DTensor's caches keep the process group of FSDP, whose threads may abort a process that ends in the usual way:
        # torchrun would call a run failed that has saved everything.
        terminal.leave(0)


if __name__ == "__main__":
    main()

"""Keeps the weights of a checkpoint and drops the rest: `cn-clip checkpoint strip epoch3.pt --output small.pt`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from cn_clip import command
from cn_clip.errors import ConfigError
from cn_clip.option_types import Json, WeightType


@dataclass(frozen=True)
class RewriteOptions:
    """One file in, one file out, in the precision asked for."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """The checkpoint"""
    output: command.Required = None
    """The file to write"""
    precision: WeightType = "keep"
    json: Json = False

    def __post_init__(self) -> None:
        if self.output is None:
            raise ConfigError("--output: expected the file to write")


@dataclass(frozen=True)
class Options(RewriteOptions):
    """Writes the weights alone, without optimizer and resume state; adapters (LoRA) are merged.

    Chinese-CLIP reads the file too.
    """

    output: command.Required = None
    """The file to write, .pt"""


def run(options: Options) -> None:
    """Writes the file; raises CheckpointError when the checkpoint cannot be read."""
    from cn_clip.checkpoints import weights

    assert options.output is not None
    say = command.Speaker(quiet=options.json)
    num_tensors = weights.strip(options.file, options.output, options.precision)
    sizes = {"bytes_before": weights.file_bytes(options.file), "bytes": weights.file_bytes(options.output)}
    before, after = (size / 2**20 for size in sizes.values())
    say(f"{options.file} ({before:.1f} MiB) -> {options.output} ({after:.1f} MiB), {num_tensors} tensors")
    say.result({"file": options.file, "output": options.output, "num_tensors": num_tensors, **sizes})


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

"""The mean of several checkpoints of one model: `cn-clip checkpoint average epoch8.pt epoch9.pt --output mean.pt`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from cn_clip import command
from cn_clip.errors import ConfigError
from cn_clip.language import both
from cn_clip.option_types import Json


@dataclass(frozen=True)
class Options:
    """Writes the mean of the weights of several checkpoints; whole numbers and the name come from the last one."""

    files: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="FILE")]
    """The checkpoints, two or more of the same architecture"""
    output: command.Required = None
    """The file to write, .pt"""
    json: Json = False

    def __post_init__(self) -> None:
        if self.output is None:
            raise ConfigError("--output: expected the file to write")
        if len(self.files) < 2:
            raise ConfigError(f"FILE: expected two or more checkpoints, got {len(self.files)}")


def run(options: Options) -> None:
    """Writes the file; raises CheckpointError naming the first tensor in which two files differ in shape."""
    from cn_clip.checkpoints import weights

    assert options.output is not None
    say = command.Speaker(quiet=options.json)
    num_tensors = weights.average(options.files, options.output)
    number = len(options.files)
    say(
        both(
            f"{number} 个检查点的平均 -> {options.output}，{num_tensors} 个张量",
            f"mean of {number} checkpoints -> {options.output}, {num_tensors} tensors",
        )
    )
    say.result({"files": list(options.files), "output": options.output, "num_tensors": num_tensors})


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

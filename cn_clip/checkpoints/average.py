"""The mean of several checkpoints of one model: `cn-clip checkpoint average epoch8.pt epoch9.pt --output mean.pt`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import tyro

from cn_clip import command
from cn_clip.errors import ConfigError
from cn_clip.option_types import Json

if TYPE_CHECKING:
    from torch import Tensor

    from cn_clip.clip.weights.checkpoint import Checkpoint


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
    from cn_clip.clip.weights.checkpoint import read_checkpoint
    from cn_clip.clip.weights.writing import refuse_inputs, write_checkpoint

    assert options.output is not None
    say = command.Speaker(quiet=options.json)
    refuse_inputs(options.output, options.files)
    # Mapped: of each file only the tensor in use is in memory. Adapters are merged: the mean of products is no product
    # of means.
    checkpoints = [read_checkpoint(file, mapped=True) for file in options.files]
    tensors = mean(checkpoints)
    write_checkpoint(options.output, tensors, checkpoints[-1])
    say(f"Mean of {len(checkpoints)} checkpoints -> {options.output}, {len(tensors)} tensors")
    say.result({"files": list(options.files), "output": options.output, "num_tensors": len(tensors)})


def mean(checkpoints: "Sequence[Checkpoint]") -> "dict[str, Tensor]":
    """The mean of each tensor, summed in float64, in the widest of its types; tensors of whole numbers from the last.

    Raises CheckpointError naming the first tensor that is missing in one file or has another shape there.
    """
    import torch
    from tqdm import tqdm

    from cn_clip.clip.weights.writing import check_same_tensors

    first, *others = checkpoints
    last = others[-1].state_dict
    sums = {name: value.double() for name, value in first.state_dict.items() if value.is_floating_point()}
    types = {name: first.state_dict[name].dtype for name in sums}
    for other in tqdm(others, unit="file", disable=None):
        check_same_tensors(first, other)
        for name, total in sums.items():
            total += other.state_dict[name]
            types[name] = torch.promote_types(types[name], other.state_dict[name].dtype)
    means = {name: (total / (1 + len(others))).to(types[name]) for name, total in sums.items()}
    return {name: means.get(name, last[name]) for name in last}


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

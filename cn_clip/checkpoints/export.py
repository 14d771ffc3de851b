"""The weights of a checkpoint as safetensors: `cn-clip checkpoint export epoch3.pt --output model.safetensors`."""

from collections.abc import Sequence
from dataclasses import dataclass

from cn_clip import command
from cn_clip.checkpoints.strip import RewriteOptions


@dataclass(frozen=True)
class Options(RewriteOptions):
    """Writes the weights as safetensors, with the model's name, epoch and step as metadata; adapters are merged."""

    output: command.Required = None
    """The file to write, .safetensors"""


def run(options: Options) -> None:
    """Writes the file; raises CheckpointError when the checkpoint cannot be read."""
    from cn_clip.checkpoints import weights

    assert options.output is not None
    say = command.Speaker(quiet=options.json)
    num_tensors, about = weights.export(options.file, options.output, options.precision)
    say(f"{options.file} -> {options.output}, {num_tensors} tensors")
    say.result({"file": options.file, "output": options.output, "num_tensors": num_tensors, "metadata": about})


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

"""The weights of a checkpoint as safetensors: `cn-clip checkpoint export epoch3.pt --output model.safetensors`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cn_clip import command, zoo
from cn_clip.checkpoints.options import RewriteOptions
from cn_clip.errors import CheckpointError

if TYPE_CHECKING:
    from cn_clip.clip.weights.checkpoint import Checkpoint


@dataclass(frozen=True)
class Options(RewriteOptions):
    """Writes the weights as safetensors, with the model's name, epoch and step as metadata; adapters are merged."""

    output: command.Required = None
    """The file to write, .safetensors"""


def run(options: Options) -> None:
    """Writes the file; raises CheckpointError when the checkpoint cannot be read."""
    from cn_clip.checkpoints.weights import in_precision
    from cn_clip.clip.weights.checkpoint import read_checkpoint
    from cn_clip.clip.weights.writing import refuse_inputs, write_safetensors

    assert options.output is not None
    say = command.Speaker(quiet=options.json)
    refuse_inputs(options.output, [options.file], suffix=".safetensors")
    checkpoint = read_checkpoint(options.file, mapped=True)
    tensors = in_precision(checkpoint, options.precision)
    about = metadata(checkpoint)
    write_safetensors(options.output, tensors, about)
    say(f"{options.file} -> {options.output}, {len(tensors)} tensors")
    say.result({"file": options.file, "output": options.output, "num_tensors": len(tensors), "metadata": about})


def metadata(checkpoint: "Checkpoint") -> dict[str, str]:
    """What the file says of itself; the towers only where they have a name."""
    from cn_clip import __version__
    from cn_clip.clip.weights.checkpoint import infer_config

    about = {"format": "pt", "cn_clip": __version__, "name": str(checkpoint.extra.get("name", checkpoint.path.stem))}
    about |= {"epoch": str(checkpoint.epoch), "step": str(checkpoint.step)}
    try:
        towers = dict(zip(("vision_model", "text_model"), zoo.tower_names(infer_config(checkpoint)), strict=True))
    except CheckpointError:  # weights of another kind: nothing is known of them
        return about
    return about | {kind: name for kind, name in towers.items() if name}


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

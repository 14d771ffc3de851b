"""Keeps the weights of a checkpoint and drops the rest: `cn-clip checkpoint strip epoch3.pt --output small.pt`."""

from collections.abc import Sequence
from dataclasses import dataclass

from cn_clip import command
from cn_clip.checkpoints.options import RewriteOptions


@dataclass(frozen=True)
class Options(RewriteOptions):
    """Writes the weights alone, without optimizer and resume state; adapters (LoRA) are merged.

    Chinese-CLIP reads the file too.
    """

    output: command.Required = None
    """The file to write, .pt"""


def run(options: Options) -> None:
    """Writes the file; raises CheckpointError when the checkpoint cannot be read."""
    from cn_clip.checkpoints.weights import file_bytes, in_precision
    from cn_clip.clip.weights.checkpoint import SIGMOID_BIAS, read_checkpoint
    from cn_clip.clip.weights.writing import refuse_inputs, write_checkpoint

    assert options.output is not None
    say = command.Speaker(quiet=options.json)
    refuse_inputs(options.output, [options.file])
    checkpoint = read_checkpoint(options.file, mapped=True)
    tensors = in_precision(checkpoint, options.precision)
    # Chinese-CLIP refuses a tensor it does not know; similarity does not need this one.
    kept = {name: value for name, value in tensors.items() if name != SIGMOID_BIAS}
    write_checkpoint(options.output, kept, checkpoint)
    sizes = {"bytes_before": file_bytes(options.file), "bytes": file_bytes(options.output)}
    before, after = (size / 2**20 for size in sizes.values())
    say(f"{options.file} ({before:.1f} MiB) -> {options.output} ({after:.1f} MiB), {len(kept)} tensors")
    say.result({"file": options.file, "output": options.output, "num_tensors": len(kept), **sizes})


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

"""Turns the archive that OpenAI published CLIP in (TorchScript) into a plain state dict.

python cn_clip/preprocess/transform_openai_pretrain_weights.py --raw-ckpt-path ViT-B-16.pt
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cn_clip import command
from cn_clip.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class Options:
    """Reads the tensors of an OpenAI CLIP archive, without running its code, and saves them as a state dict."""

    raw_ckpt_path: str
    """The OpenAI checkpoint as downloaded"""
    new_ckpt_path: str | None = None
    """Where the state dict goes; default: NAME.state_dict.EXT beside the archive NAME.EXT"""

    def __post_init__(self) -> None:
        if self.new_ckpt_path and Path(self.new_ckpt_path).absolute() == Path(self.raw_ckpt_path).absolute():
            raise ConfigError("--new-ckpt-path: would overwrite the archive it reads; give another path")


def new_path(raw_path: str) -> str:
    """`dir/NAME.EXT` -> `dir/NAME.state_dict.EXT`."""
    path = Path(raw_path)
    return str(path.with_name(f"{path.stem}.state_dict{path.suffix}"))


def run(options: Options) -> None:
    """Converts one file; raises CheckpointError when it is none."""
    from cn_clip.clip.weights import checkpoint, writing

    target = options.new_ckpt_path or new_path(options.raw_ckpt_path)
    command.print_params(options)
    if not Path(options.raw_ckpt_path).is_file():
        raise CheckpointError("no such file; give the archive that OpenAI published", at=options.raw_ckpt_path)
    writing.write_state_dict(target, checkpoint.read_openai_archive(options.raw_ckpt_path))
    print(f"Transformed openai ckpt {options.raw_ckpt_path} to {target}!")
    print("Done!")


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options)


def main(args: Sequence[str] | None = None) -> None:
    """The command."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

"""Exports a model to Core ML: `python cn_clip/deploy/pytorch_to_coreml.py --model-arch ViT-B-16 --convert-vision …`."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cn_clip import command, drop_in, settings
from cn_clip.clip.backends.names import Kind
from cn_clip.deploy.model_arch import ConversionOptions, check_arch, check_targets
from cn_clip.errors import ConfigError
from cn_clip.files import written_together
from cn_clip.option_types import OutputPrefix
from cn_clip.settings import Range
from cn_clip.zoo import CONTEXT_LENGTH

TITLES: dict[Kind, str] = {"text": "Text", "image": "Image"}

__getattr__ = drop_in.names(__name__)


@dataclass(frozen=True)
class Options(ConversionOptions):
    """Writes PREFIX.text.mlpackage and PREFIX.image.mlpackage for iOS 15, macOS 12 and later.

    Runs on Linux and macOS; only macOS can run what it writes.
    """

    save_coreml_path: OutputPrefix = None
    precision: Literal["fp16", "fp32"] = "fp16"
    """Weights and arithmetic; the Neural Engine computes in fp16 alone"""
    context_length: Annotated[int, Range(least=3)] = CONTEXT_LENGTH
    """Tokens that every text is padded to, [CLS] and [SEP] included; default: as the checkpoint was trained, else 52"""
    batch_size: Annotated[int, Range(least=1)] = 1
    """Pictures or texts of one prediction"""

    def __post_init__(self) -> None:
        check_arch(self.model_arch)
        if self.save_coreml_path is None:
            raise ConfigError("--save-coreml-path: expected the prefix of the packages to write, such as out/vit-b-16")
        self.check_towers()
        settings.check(self)


def run(options: Options) -> None:
    """Writes what is asked for, all of it or nothing; raises CnClipError when it cannot be read or converted."""
    from cn_clip.deploy import coreml_package

    assert options.model_arch is not None
    assert options.save_coreml_path is not None
    paths = {kind: coreml_package.package_path(options.save_coreml_path, kind) for kind in options.kinds}
    check_targets("--save-coreml-path", options.save_coreml_path, paths.values(), are_folders=True)
    say = command.Speaker(quiet=options.json)
    say.params(options)
    with command.stdout_to_stderr(when=options.json):
        model = coreml_package.open_arch(
            options.model_arch,
            options.pytorch_ckpt_path,
            flag="--pytorch-ckpt-path",
            download_root=options.download_root,
        )
    length = options.context_length
    if "text" in paths:
        length = coreml_package.text_length(length, model.context_length, options.pytorch_ckpt_path)
    with written_together(Path(options.save_coreml_path)) as scratch:
        written = {
            kind: coreml_package.write_package(
                model,
                kind,
                scratch / path.name,
                precision=options.precision,
                batch_size=options.batch_size,
                context_length=length,
            )
            for kind, path in paths.items()
        }
    for kind, path in paths.items():
        say(f"{TITLES[kind]} model converted to CoreML and saved at: {path}")
        num_bytes = written[kind]["num_bytes"]
        say(f"  {written[kind]['num_operations']} operations, {num_bytes / 2**20:.1f} MiB, {options.precision}")
    say.result(
        {kind: {"path": str(path), "precision": options.precision, **written[kind]} for kind, path in paths.items()}
    )


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options, required=("model_arch", "save_coreml_path"))


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

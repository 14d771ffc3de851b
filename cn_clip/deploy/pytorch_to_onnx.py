"""Exports a model to ONNX: `python cn_clip/deploy/pytorch_to_onnx.py --model-arch ViT-B-16 --convert-vision …`."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from cn_clip import command, drop_in, settings
from cn_clip.deploy.model_arch import TITLES, ConversionOptions, check_arch, check_targets
from cn_clip.errors import ConfigError
from cn_clip.option_types import MergeTokens, OutputPrefix
from cn_clip.settings import Range
from cn_clip.zoo import TextName, VisionName

FormName: TypeAlias = Literal["fp32", "fp16", "int8", "int8-openvino"]

__getattr__ = drop_in.names(__name__)


@dataclass(frozen=True)
class Options(ConversionOptions):
    """Writes PREFIX.txt.fp32.onnx, PREFIX.img.fp32.onnx, and other precisions; each is compared with PyTorch first.

    Batch size and text length are free. float16 files keep their weights in FILE.extra_file: move both together.
    """

    save_onnx_path: OutputPrefix = None
    context_length: Annotated[int, Range(least=3)] = 52
    """Longest text in tokens that the files say they take, [CLS] and [SEP] included; shorter ones need no padding"""
    precisions: tuple[FormName, ...] = ("fp32", "fp16")
    """What to write; int8: for ONNX Runtime, int8-openvino: for OpenVINO"""
    check_data: str | None = None
    """Split folder, .../lmdb/valid, whose pairs each file is compared on; default: embedded emoji pictures"""
    tolerance: float | None = None
    """Smallest cosine to float32 that a file may have; default: fp32 0.9999, fp16 0.999, int8 0.99"""
    vision_model: VisionName | None = None
    """Picture tower, for an architecture of your own; default: that of the model"""
    text_model: TextName | None = None
    """Text tower; default: what the weights hold"""
    merge_tokens: MergeTokens = None

    ADDED = ("precisions", "merge_tokens")  # see `command.spelled_out`

    def __post_init__(self) -> None:
        check_arch(self.model_arch)
        if self.save_onnx_path is None:
            raise ConfigError("--save-onnx-path: expected the prefix of the files to write, such as out/vit-b-16")
        self.check_towers()
        if not self.precisions:
            raise ConfigError("--precisions: expected one or more of fp32, fp16, int8, int8-openvino")
        settings.check(self)
        if self.tolerance is not None and not -1 <= self.tolerance <= 1:
            raise ConfigError(f"--tolerance: expected a cosine, -1 to 1, got {self.tolerance}")

    @property
    def forms(self) -> list[str]:
        """The forms to write, each once, as their files are named."""
        return [form.replace("-", ".") for form in dict.fromkeys(self.precisions)]


def run(options: Options) -> None:
    """Writes what is asked for, all of it or nothing; raises CnClipError when it cannot be converted faithfully."""
    from cn_clip.deploy import towers

    assert options.model_arch is not None
    assert options.save_onnx_path is not None
    prefix, kinds, forms = Path(options.save_onnx_path), options.kinds, options.forms
    targets = [towers.onnx_path(prefix, kind, form) for kind in kinds for form in forms]
    check_targets("--save-onnx-path", options.save_onnx_path, targets)
    say = command.Speaker(quiet=options.json)
    say.params(options)
    towers.check_packages(forms)
    samples = towers.samples(options.check_data, options.context_length)
    with command.stdout_to_stderr(when=options.json):
        model = towers.open_arch(
            options.model_arch,
            options.pytorch_ckpt_path,
            flag="--pytorch-ckpt-path",
            download_root=options.download_root,
            vision=options.vision_model,
            text=options.text_model,
        )
    limits: dict[str, Any] = {"max_length": options.context_length, "tolerance": options.tolerance}
    limits["merge_tokens"] = options.merge_tokens or 0
    written = towers.write_onnx(model, prefix, kinds, forms, samples, **limits, say=say)
    say("Finished PyTorch to ONNX conversion...")
    result: dict[str, dict[str, Any]] = {TITLES[kind]: {} for kind in kinds}
    for one in written:
        title = one.report.form.upper().replace(".OPENVINO", " OpenVINO")
        saved = f"{one.path} with extra file {one.extra}" if one.extra else str(one.path)
        say(f">>> The {TITLES[one.kind]} {title} ONNX model is saved at {saved}")
        report, share = one.report, one.report.share
        result[TITLES[one.kind]][report.form] = {
            "path": str(one.path),
            "extra_file": str(one.extra) if one.extra else None,
            "smallest_cosine": report.smallest,
            "mean_cosine": report.mean,
            "same_top1": report.agreement,
            "num_samples": report.num_samples,
            "left_out": list(report.left_out),
            "num_int8": share.num_int8 if share else None,
            "num_products": share.num_products if share else None,
            "merging": asdict(report.merging) if report.merging else None,
        }
    say.result(result)


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options, required=("model_arch", "save_onnx_path"))


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

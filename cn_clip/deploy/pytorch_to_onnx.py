"""Exports a model to ONNX: `python cn_clip/deploy/pytorch_to_onnx.py --model-arch ViT-B-16 --convert-vision …`."""

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from cn_clip import command, drop_in, settings
from cn_clip.deploy.model_arch import ConversionOptions, check_arch, open_arch
from cn_clip.deploy.prefixes import check_targets
from cn_clip.errors import ConfigError, DataError
from cn_clip.option_types import OutputPrefix
from cn_clip.settings import Range
from cn_clip.zoo import TextName, VisionName

if TYPE_CHECKING:
    from cn_clip.clip.backends.base import Kind
    from cn_clip.clip.backends.parity import Report, Samples

FormName: TypeAlias = Literal["fp32", "fp16", "int8", "int8-openvino"]
TITLES: "dict[Kind, str]" = {"text": "text", "image": "vision"}

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

    ADDED = ("precisions",)  # see `command.spelled_out`

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
    from cn_clip.clip.backends import derived
    from cn_clip.clip.backends.onnx_files import extra_path, move, onnx_path
    from cn_clip.files import HeldFolder, written_together

    assert options.save_onnx_path is not None
    targets = [onnx_path(options.save_onnx_path, kind, form) for kind in options.kinds for form in options.forms]
    check_targets("--save-onnx-path", options.save_onnx_path, targets)
    say = command.Speaker(quiet=options.json)
    say.params(options)
    derived.check_packages(options.forms)
    samples = _samples(options)
    prefix = Path(options.save_onnx_path)
    with written_together(prefix) as folder, HeldFolder(prefix.parent, f".{prefix.name}.") as scratch:
        reports = list(_convert(options, scratch.path / prefix.name, samples, say))
        moved = [move(report.path, folder) for _, report in reports]
        outside = {extra_path(path).name for path in moved if extra_path(path).exists()}
    say("Finished PyTorch to ONNX conversion...")
    result: dict[str, dict[str, Any]] = {TITLES[kind]: {} for kind in options.kinds}
    for kind, report in reports:
        path = prefix.parent / report.path.name
        if extra_path(path).name not in outside:
            extra_path(path).unlink(missing_ok=True)  # of an earlier file
        say(f">>> The {TITLES[kind]} {_title(report.form)} ONNX model is saved at {_saved_at(path)}")
        result[TITLES[kind]][report.form] = _described(report, path)
    say.result(result)


def _convert(
    options: Options, prefix: Path, samples: "Samples", say: command.Speaker
) -> "Iterator[tuple[Kind, Report]]":
    """Writes all forms of all towers; yields those that were asked for."""
    from cn_clip.clip.backends import derived, export, parity
    from cn_clip.clip.backends.onnx_files import onnx_path
    from cn_clip.clip.backends.pytorch import TorchBackend

    assert options.model_arch is not None
    with command.stdout_to_stderr(when=options.json):
        model = open_arch(
            options.model_arch,
            options.pytorch_ckpt_path,
            flag="--pytorch-ckpt-path",
            download_root=options.download_root,
            vision=options.vision_model,
            text=options.text_model,
        )
    expected = parity.reference(TorchBackend(model), samples)
    limits: dict[str, Any] = {"tolerance": options.tolerance}
    for kind in options.kinds:
        base = onnx_path(prefix, kind, "fp32")
        exported = export.export_tower(model, kind, base, expected, max_length=options.context_length, **limits)
        for form in options.forms:
            path = onnx_path(prefix, kind, form)
            report = exported if form == "fp32" else derived.derive(base, kind, form, path, expected, **limits)
            say(str(report))
            yield kind, report


def _samples(options: Options) -> "Samples":
    from cn_clip.clip.backends import parity

    if options.check_data is None:
        return parity.embedded_samples(options.context_length)
    from cn_clip.clip.pictures import open_picture
    from cn_clip.data.lmdb_store import IMAGES, PAIRS, ImageStore, PairStore

    images, pairs = ImageStore(Path(options.check_data, IMAGES)), PairStore(Path(options.check_data, PAIRS))
    count = min(parity.NUM_SAMPLES, len(pairs))
    if count == 0:
        raise DataError("holds no pair; expected pictures with their captions", at=options.check_data)
    chosen = [pairs[number * len(pairs) // count] for number in range(count)]
    return parity.Samples(
        [open_picture(images.picture(one.image_id), name=f"{images.folder}: {one.image_id!r}") for one in chosen],
        [one.text for one in chosen],
        options.context_length,
    )


def _title(form: str) -> str:
    return form.upper().replace(".OPENVINO", " OpenVINO")


def _saved_at(path: Path) -> str:
    from cn_clip.clip.backends.onnx_files import extra_path

    extra = extra_path(path)
    return f"{path} with extra file {extra}" if extra.exists() else str(path)


def _described(report: "Report", path: Path) -> dict[str, Any]:
    from cn_clip.clip.backends.onnx_files import extra_path

    extra = extra_path(path)
    return {
        "path": str(path),
        "extra_file": str(extra) if extra.exists() else None,
        "smallest_cosine": report.smallest,
        "mean_cosine": report.mean,
        "same_top1": report.agreement,
        "num_samples": report.num_samples,
        "left_out": list(report.left_out),
        "num_int8": report.share.num_int8 if report.share else None,
        "num_products": report.share.num_products if report.share else None,
    }


def packing_small_onnx_files(onnx_path: str) -> None:
    """Puts the weights of an ONNX file, in it or in many files beside it, into one, FILE.extra_file.

    Chinese-CLIP's. Raises DataError when it cannot be written; then all is as it was.
    """
    from cn_clip.clip.backends import onnx_files
    from cn_clip.files import written_together

    path = Path(onnx_path)
    old = [path.parent / name for name in onnx_files.outside_files(path)]
    with written_together(path) as scratch:
        onnx_files.save(onnx_files.load(path), scratch / path.name, outside=True)
    for file in old:
        if file != onnx_files.extra_path(path):
            file.unlink(missing_ok=True)


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options, required=("model_arch", "save_onnx_path"))


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

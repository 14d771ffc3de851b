"""Extracts features with TensorRT engines: `python cn_clip/eval/extract_features_tensorrt.py --extract-text-feats …`.

The engines are those of `deploy/onnx_to_tensorrt.py`; they run on the kind of GPU they were built on.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from cn_clip import command, drop_in
from cn_clip.features.options import ExportedSettings
from cn_clip.option_types import CudaDevice

__getattr__ = drop_in.names(__name__)


@dataclass(frozen=True)
class Options(ExportedSettings):
    """Writes the unit features of the pictures of an LMDB and of the texts of a JSONL file, by TensorRT."""

    tensorrt_image_model: str | None = None
    """Engine of the picture tower"""
    tensorrt_text_model: str | None = None
    """Engine of the text tower"""
    device: CudaDevice = "cuda"

    ADDED = ("decode", "device")  # see `command.spelled_out`

    TOWERS = MappingProxyType({"image": "tensorrt_image_model", "text": "tensorrt_text_model"})


def run(options: Options) -> None:
    """Extracts what is asked for; raises CnClipError naming file, line or id of what cannot be read."""
    from cn_clip.features import extraction

    extraction.run_exported(options, "tensorrt", device=options.device)


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options, vision_model="ViT-B-16", text_model="RoBERTa-wwm-ext-base-chinese")


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

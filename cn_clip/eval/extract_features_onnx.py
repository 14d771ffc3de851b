"""Extracts features with ONNX files: `python cn_clip/eval/extract_features_onnx.py --extract-text-feats …`.

The files are those of `deploy/pytorch_to_onnx.py`, this package's or Chinese-CLIP's.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType

from cn_clip import command, drop_in
from cn_clip.features.options import ExportedSettings
from cn_clip.option_types import NumThreads, OnnxImage, OnnxText

__getattr__ = drop_in.names(__name__)


@dataclass(frozen=True)
class Options(ExportedSettings):
    """Writes the unit features of the pictures of an LMDB and of the texts of a JSONL file, by ONNX Runtime."""

    onnx_image_model: OnnxImage = None
    onnx_text_model: OnnxText = None
    device: str = "auto"
    """auto (cuda where ONNX Runtime has it, else cpu), cpu, cuda, cuda:N or tensorrt"""
    num_threads: NumThreads = None

    TOWERS = MappingProxyType({"image": "onnx_image_model", "text": "onnx_text_model"})


def run(options: Options) -> None:
    """Extracts what is asked for; raises CnClipError naming file, line or id of what cannot be read."""
    from cn_clip.features import extraction

    extraction.run_exported(options, "onnx", device=options.device, num_threads=options.num_threads)


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options, device="cuda", vision_model="ViT-B-16", text_model="RoBERTa-wwm-ext-base-chinese")


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

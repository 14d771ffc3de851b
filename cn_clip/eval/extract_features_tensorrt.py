"""Extracts features with TensorRT engines: `python cn_clip/eval/extract_features_tensorrt.py --extract-text-feats …`.

The engines are those of `deploy/onnx_to_tensorrt.py`; they run on the kind of GPU they were built on.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cn_clip import command, drop_in
from cn_clip.eval import exported_models
from cn_clip.option_types import CudaDevice

if TYPE_CHECKING:
    from cn_clip.clip.backends.base import ExportedBackend

__getattr__ = drop_in.names(__name__)


@dataclass(frozen=True)
class Options(exported_models.Settings):
    """Writes the unit features of the pictures of an LMDB and of the texts of a JSONL file, by TensorRT."""

    tensorrt_image_model: str | None = None
    """Engine of the picture tower"""
    tensorrt_text_model: str | None = None
    """Engine of the text tower"""
    device: CudaDevice = "cuda"

    ADDED = ("decode", "device")  # see `command.spelled_out`

    def __post_init__(self) -> None:
        super().__post_init__()
        image = ("--tensorrt-image-model", self.tensorrt_image_model)
        exported_models.check_files(self, image=image, text=("--tensorrt-text-model", self.tensorrt_text_model))

    def inputs(self) -> list[str | None]:
        """The files that are read, none of which may be the output."""
        return [*super().inputs(), self.tensorrt_image_model, self.tensorrt_text_model]


def run(options: Options) -> None:
    """Extracts what is asked for; raises CnClipError naming file, line or id of what cannot be read."""

    def open_files(image: str | None, text: str | None) -> "ExportedBackend":
        from cn_clip.clip.backends.tensor_rt import open_engines

        return open_engines(image, text, device=options.device)

    exported_models.run(options, options.tensorrt_image_model, options.tensorrt_text_model, open_files)


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options, vision_model="ViT-B-16", text_model="RoBERTa-wwm-ext-base-chinese")


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

"""Extracts features with ONNX files: `python cn_clip/eval/extract_features_onnx.py --extract-text-feats …`.

The files are those of `deploy/pytorch_to_onnx.py`, this package's or Chinese-CLIP's.
"""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cn_clip import command, drop_in
from cn_clip.eval import exported_models
from cn_clip.option_types import NumThreads, OnnxImage, OnnxText

if TYPE_CHECKING:
    from cn_clip.clip.backends.base import ExportedBackend, Kind

__getattr__ = drop_in.names(__name__)


@dataclass(frozen=True)
class Options(exported_models.Settings):
    """Writes the unit features of the pictures of an LMDB and of the texts of a JSONL file, by ONNX Runtime."""

    onnx_image_model: OnnxImage = None
    onnx_text_model: OnnxText = None
    device: str = "auto"
    """auto (cuda where ONNX Runtime has it, else cpu), cpu, cuda, cuda:N or tensorrt"""
    num_threads: NumThreads = None

    def __post_init__(self) -> None:
        super().__post_init__()
        image = ("--onnx-image-model", self.onnx_image_model)
        exported_models.check_files(self, image=image, text=("--onnx-text-model", self.onnx_text_model))

    def inputs(self) -> list[str | None]:
        """The files that are read, none of which may be the output."""
        return [*super().inputs(), self.onnx_image_model, self.onnx_text_model]


def run(options: Options) -> None:
    """Extracts what is asked for; raises CnClipError naming file, line or id of what cannot be read."""

    def open_files(image: str | None, text: str | None) -> "ExportedBackend":
        from cn_clip.clip.backends.base import ExportedBackend
        from cn_clip.clip.backends.onnx_runtime import OnnxTower

        def tower(path: str | None, kind: "Kind") -> OnnxTower | None:
            if path is None:
                return None
            return OnnxTower(path, kind, device=options.device, num_threads=options.num_threads)

        return ExportedBackend(tower(image, "image"), tower(text, "text"))

    exported_models.run(options, options.onnx_image_model, options.onnx_text_model, open_files)


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options, device="cuda", vision_model="ViT-B-16", text_model="RoBERTa-wwm-ext-base-chinese")


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

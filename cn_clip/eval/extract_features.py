"""Extracts picture and text features: `python cn_clip/eval/extract_features.py --extract-image-feats …`."""

from collections.abc import Sequence
from dataclasses import dataclass

from cn_clip import command
from cn_clip.clip.backends.base import BackendName
from cn_clip.eval import backends, extraction
from cn_clip.zoo import TextName, VisionName


@dataclass(frozen=True)
class Options(extraction.Settings):
    """Writes the unit features of the pictures of an LMDB and of the texts of a JSONL file.

    By default one vector a line, as JSON. Run again after it was killed, it goes on where it stopped.
    """

    resume: command.Required = None
    """Checkpoint: a file, a transformers folder, or the name of a published model"""
    precision: backends.EvalPrecision = "amp"
    """Arithmetic; amp is float32 here, as in Chinese-CLIP. int8: onnx and openvino"""
    backend: BackendName = "torch"
    """What runs the model; all but torch export it at first use, and keep the export in DOWNLOAD_ROOT/exported"""
    vision_model: VisionName | None = None
    """Picture tower; default: what the checkpoint holds"""
    text_model: TextName | None = None
    """Text tower; default: what the checkpoint holds"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps; openvino computes on the cpu alone"""
    num_threads: int | None = None
    """Threads that compute; default: one a core. tensorrt has none"""
    download_root: str | None = None
    """Folder of downloaded and exported models; default: ~/.cache/clip"""

    def __post_init__(self) -> None:
        super().__post_init__()
        backends.check(self)


def run(options: Options) -> None:
    """Extracts what is asked for; raises CnClipError naming file, line or id of what cannot be read."""
    say = extraction.begin(options)
    encoder = backends.open_encoder(options, say, kinds=options.kinds)
    extraction.extract(options, encoder, backends.identity(options, encoder), say)


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

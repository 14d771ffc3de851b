"""Extracts picture and text features: `python cn_clip/eval/extract_features.py --extract-image-feats …`."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cn_clip import command
from cn_clip.clip.backends.base import BackendName
from cn_clip.errors import ConfigError
from cn_clip.zoo import TextName, VisionName

if TYPE_CHECKING:
    from cn_clip.clip.encoder import Encoder
    from cn_clip.data.picture_sets import LmdbPictures
    from cn_clip.data.records import RecordId


@dataclass(frozen=True)
class Options:
    """Writes one unit feature a line, as JSON, for the pictures of an LMDB and the texts of a JSONL file."""

    extract_image_feats: bool = False
    """Extract picture features"""
    extract_text_feats: bool = False
    """Extract text features"""
    image_data: str = "../Multimodal_Retrieval/lmdb/test/imgs"
    """LMDB directory of the pictures"""
    text_data: str = "../Multimodal_Retrieval/test_texts.jsonl"
    """JSONL file of the texts"""
    image_feat_output_path: str | None = None
    """Where picture features go; default: beside the texts, X_imgs.img_feat.jsonl"""
    text_feat_output_path: str | None = None
    """Where text features go; default: X_texts.txt_feat.jsonl"""
    img_batch_size: int = 64
    """Pictures in a batch"""
    text_batch_size: int = 64
    """Texts in a batch"""
    context_length: int = 52
    """Longest text in tokens, [CLS] and [SEP] included"""
    resume: command.Required = None
    """Checkpoint: a file, a transformers folder, or the name of a published model"""
    precision: Literal["amp", "fp16", "fp32", "bf16", "int8"] = "amp"
    """Arithmetic; amp is float32 here, as in Chinese-CLIP. int8: onnx and openvino"""
    backend: BackendName = "torch"
    """What runs the model; all but torch export it at first use, and keep the export in ~/.cache/clip/exported"""
    vision_model: VisionName | None = None
    """Picture tower; default: what the checkpoint holds"""
    text_model: TextName | None = None
    """Text tower; default: what the checkpoint holds"""
    debug: bool = False
    """Log what is opened and downloaded, to stderr"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps"""
    num_workers: int = 1
    """Threads that decode pictures; 0: decode between the batches"""
    json: bool = False
    """Print the result as one JSON object"""

    def __post_init__(self) -> None:
        if not (self.extract_image_feats or self.extract_text_feats):
            raise ConfigError("give --extract-image-feats, --extract-text-feats, or both")
        if self.resume is None:
            raise ConfigError("--resume: expected a checkpoint file, or a model's name such as ViT-B-16")
        for name, least in (("img_batch_size", 1), ("text_batch_size", 1), ("context_length", 3), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"--{name.replace('_', '-')}: expected at least {least}, got {getattr(self, name)}")


def run(options: Options) -> None:
    """Extracts what is asked for; raises CnClipError naming file, line or id of what cannot be read."""
    from cn_clip.eval.backends import open_encoder

    say = command.Speaker(quiet=options.json)
    if options.debug:
        logging.basicConfig(format="%(levelname)s | %(message)s")
        logging.getLogger("cn_clip").setLevel(logging.DEBUG)
    say.params(options)
    encoder = open_encoder(options, say)
    # Both are opened before either is worked on: a wrong path is told at once, not after minutes.
    pictures = _open_pictures(options, say) if options.extract_image_feats else None
    texts = _open_texts(options, say) if options.extract_text_feats else None
    result: dict[str, object] = {}
    if texts is not None:
        result |= _extract_texts(options, encoder, texts, say)
    if pictures is not None:
        result |= _extract_pictures(options, encoder, pictures, say)
    say("Done!")
    say.result(result)


def _open_pictures(options: Options, say: command.Speaker) -> "LmdbPictures":
    from cn_clip.data.picture_sets import LmdbPictures

    say("Preparing image inference dataset.")
    return LmdbPictures(options.image_data)


def _open_texts(options: Options, say: command.Speaker) -> "list[tuple[RecordId, str]]":
    from cn_clip.data.texts import read_texts

    say("Preparing text inference dataset.")
    return read_texts(options.text_data)


def _extract_texts(
    options: Options, encoder: "Encoder", texts: "list[tuple[RecordId, str]]", say: command.Speaker
) -> dict[str, object]:
    from cn_clip.eval import features

    say("Make inference for texts...")
    path = options.text_feat_output_path or features.default_text_path(options.text_data)
    count = features.extract_texts(encoder, texts, path, batch_size=options.text_batch_size)
    say(f"{count} text features are stored in {path}")
    return {"num_texts": count, "text_features": path}


def _extract_pictures(
    options: Options, encoder: "Encoder", pictures: "LmdbPictures", say: command.Speaker
) -> dict[str, object]:
    from cn_clip.data.picture_sets import batches
    from cn_clip.eval import features

    say("Make inference for images...")
    path = options.image_feat_output_path or features.default_image_path(options.text_data)
    decoded = batches(pictures, encoder.transform, options.img_batch_size, options.num_workers)
    count = features.extract_images(encoder.backend, decoded, len(pictures), path)
    say(f"{count} image features are stored in {path}")
    return {"num_images": count, "image_features": path}


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

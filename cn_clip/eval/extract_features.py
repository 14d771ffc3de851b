"""Extracts picture and text features: `python cn_clip/eval/extract_features.py --extract-image-feats …`."""

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass

from cn_clip import command, drop_in
from cn_clip.features.options import EngineSettings

__getattr__ = drop_in.names(__name__)


@dataclass(frozen=True)
class Options(EngineSettings):
    """Writes the unit features of the pictures of an LMDB and of the texts of a JSONL file.

    By default one vector a line, as JSON. Run again after it was killed, it goes on where it stopped.
    --engine ray computes on the processes of a Ray cluster, from folders, tar files, Parquet tables or an LMDB.
    """

    # See `command.spelled_out`.
    ADDED = (
        "columns",
        "cpus_per_actor",
        "decode",
        "device",
        "dimensions",
        "download_root",
        "image_column",
        "metadata",
        "ray_address",
        "ray_wait",
        "thumbnail_size",
        "trust_remote_code",
    )


def run(options: Options) -> None:
    """Extracts what is asked for; raises CnClipError naming file, line or id of what cannot be read."""
    from cn_clip.features import extraction

    extraction.run(options)


def parse_args() -> Namespace:
    """What Chinese-CLIP's gives: its options and ours, with its defaults."""
    return command.namespace(Options, vision_model="ViT-B-16", text_model="RoBERTa-wwm-ext-base-chinese")


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, args)


if __name__ == "__main__":
    main()

"""The settings that several commands on indexes share."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, TypeAlias

import tyro

from cn_clip import settings
from cn_clip.clip.backends.base import BackendName, PrecisionChoice, check_precision
from cn_clip.option_types import BackendDevice, BatchSize, DownloadRoot, Json, NumThreads
from cn_clip.settings import Range

IndexPlace: TypeAlias = Annotated[
    tyro.conf.Positional[str],
    tyro.conf.arg(metavar="INDEX", help="The folder of the index, or --store milvus://HOST:PORT/COLLECTION"),
]
IndexFolder: TypeAlias = Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="INDEX")]


def with_store(args: Sequence[str] | None) -> list[str]:
    """The command line with INDEX in front where it was given as `--store ADDRESS`."""
    given, stores = list(sys.argv[1:] if args is None else args), list[str]()
    rest = iter(given)
    kept = []
    for one in rest:
        if one == "--":
            kept += [one, *rest]
        elif one == "--store":
            stores.append(next(rest, ""))
        elif one.startswith("--store="):
            stores.append(one.removeprefix("--store="))
        else:
            kept.append(one)
    return [*stores, *kept]


@dataclass(frozen=True)
class ModelOptions:
    """What runs the model of an index."""

    model: str | None = None
    """Model: a published name, a checkpoint or a transformers folder; of other families hf:FOLDER or
    open_clip:ARCHITECTURE@FILE; default: that of the index, else ViT-B-16"""
    backend: BackendName = "torch"
    """What runs the model; any backend may search what another has built"""
    precision: PrecisionChoice = "fp32"
    """Arithmetic, of those the backend has; auto: the fastest close to fp32 (cosine 0.999) that the device has"""
    device: BackendDevice = "auto"
    num_threads: NumThreads = None
    download_root: DownloadRoot = None
    json: Json = False

    def __post_init__(self) -> None:
        check_precision(self.backend, self.precision)
        settings.check(self)


@dataclass(frozen=True)
class AddOptions(ModelOptions):
    """What turns pictures into items."""

    metadata: str | None = None
    """A .csv, .tsv or .jsonl table with a row a picture; its columns become metadata, `text` the caption"""
    image_column: str = "image"
    """The table's column of picture files, relative to the folder, or of ids"""
    batch_size: BatchSize = 32
    num_workers: Annotated[int, Range(least=0)] = 2
    """Threads that read and decode pictures; 0: between the batches"""
    commit_every: Annotated[int, Range(least=1)] = 1000
    """Pictures after which all so far is safe on disk, and reported"""
    thumbnail_size: Annotated[int, Range(least=0)] = 160
    """Longest side of the thumbnails in pixels; 0: none"""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.check(self, [settings.needs("image_column", "metadata", ", the table that has it", refused=True)])

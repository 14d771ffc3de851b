"""The settings of the extraction commands, of both engines, and their checks; imports little, for --help."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, TypeAlias, get_args

import tyro

from cn_clip import settings
from cn_clip.clip import choice
from cn_clip.errors import ConfigError
from cn_clip.option_types import BatchSize, ContextLength, Json, NumWorkers
from cn_clip.settings import Range, flag
from cn_clip.zoo import CONTEXT_LENGTH, TextName, VisionName

if TYPE_CHECKING:
    from cn_clip.clip.backends.names import Kind

OutputFormat: TypeAlias = Literal["jsonl", "npz", "parquet"]
FORMATS: tuple[OutputFormat, ...] = get_args(OutputFormat)
Engine: TypeAlias = Literal["local", "ray"]
OnError: TypeAlias = Literal["stop", "skip"]

# What Chinese-CLIP takes although nothing is done with it.
RULES = [
    settings.needs("image_feat_output_path", "extract_image_feats", refused=False),
    settings.needs("text_feat_output_path", "extract_text_feats", refused=False),
]


def format_of(path: str | None, wanted: OutputFormat | None) -> OutputFormat:
    """The format of an output file: what is wanted, else what the suffix says, else jsonl.

    Raises ConfigError when the suffix is that of another format than the wanted one.
    """
    suffix = Path(path or "").suffix.lower()
    named = next((one for one in FORMATS if suffix == f".{one}"), None)
    if wanted and named and wanted != named:
        raise ConfigError(f"--output-format {wanted}: the suffix of {path} says {named}; change one of them")
    return wanted or named or "jsonl"


@dataclass(frozen=True)
class Settings:
    """The settings of every extraction command; each adds those of its model."""

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
    output_format: OutputFormat | None = None
    """Kind of feature file; default: what the suffix of the output path says, else jsonl. parquet needs pyarrow"""
    img_batch_size: BatchSize = 64
    text_batch_size: Annotated[int, Range(least=1)] = 64
    """Texts in a batch"""
    context_length: ContextLength = CONTEXT_LENGTH
    num_workers: NumWorkers = None
    decode: choice.Decoding = "exact"
    debug: bool = False
    """Log what is opened and downloaded, to stderr"""
    json: Json = False

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ConfigError("give --extract-image-feats, --extract-text-feats, or both")
        settings.check(self)
        outputs = [self.output_file(kind) for kind in self.kinds]
        if len({os.path.realpath(path) for path, _ in outputs}) < len(outputs):
            raise ConfigError(f"--image-feat-output-path, --text-feat-output-path: both are {outputs[0][0]}")

    @property
    def kinds(self) -> "list[Kind]":
        """The towers an extraction needs."""
        wanted: dict[Kind, bool] = {"image": self.extract_image_feats, "text": self.extract_text_feats}
        return [kind for kind, is_wanted in wanted.items() if is_wanted]

    def output_file(self, kind: "Kind") -> tuple[str, OutputFormat]:
        """The path and the format of an output; raises ConfigError when they contradict each other.

        By default `X_texts.jsonl` gives `X_texts.txt_feat.jsonl` and, beside it, `X_imgs.img_feat.jsonl`.
        """
        path = self.image_feat_output_path if kind == "image" else self.text_feat_output_path
        if path == "":
            raise ConfigError(f"--{kind}-feat-output-path: expected a path, got an empty one")
        output_format = format_of(path, self.output_format)
        if path is None and kind == "text":
            path = f"{self.text_data.removesuffix('.jsonl')}.txt_feat.{output_format}"
        elif path is None:
            path = f"{self.text_data.replace('_texts.jsonl', '_imgs')}.img_feat.{output_format}"
        return path, output_format

    def inputs(self) -> list[str | None]:
        """The files that are read, none of which an output may replace; None for those that are not given."""
        return [self.text_data, self.image_data, *(f"{self.image_data}/{name}" for name in ("data.mdb", "lock.mdb"))]


@dataclass(frozen=True)
class ExportedSettings(Settings):
    """The settings of an extraction with two exported files, of which a command names the kind."""

    img_batch_size: Annotated[int, Range(least=1)] = 1
    """Pictures in a batch; a file made for one batch size is fed that many at a time"""
    text_batch_size: Annotated[int, Range(least=1)] = 1
    """Texts in a batch; a file made for one batch size is fed that many at a time"""
    vision_model: VisionName | None = None
    """Picture tower, to be checked against the file; default: what the file holds"""
    text_model: TextName | None = None
    """Text tower; the file alone decides"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in self.kinds:
            if self.tower_file(kind) is None:
                option = flag(self.TOWERS[kind])
                needed = f"--extract-{kind}-feats needs"
                raise ConfigError(f"{option}: expected the file of the {kind} model, which {needed}")

    # The options that name the files of the towers.
    TOWERS: ClassVar[Mapping[str, str]] = {}

    def tower_file(self, kind: str) -> str | None:
        """The exported file of a tower."""
        path: str | None = getattr(self, self.TOWERS[kind])
        return path

    def inputs(self) -> list[str | None]:
        """The files that are read, none of which may be the output."""
        return [*super().inputs(), *map(self.tower_file, self.TOWERS)]


@dataclass(frozen=True)
class RaySettings:
    """What `--engine ray` takes more than the engine of one process."""

    output: str | None = None
    """ray: folder of Parquet shards, images/ and texts/ in it; a path, s3://… or gs://…"""
    ray_address: str | None = None
    """ray: auto or HOST:PORT of a running cluster; default: RAY_ADDRESS, else a cluster of this machine for this run"""
    ray_wait: Annotated[float, Range(least=0)] = 300
    """ray: seconds that a running cluster without room for a process is waited for, as while machines start"""
    weights_from: str = "auto"
    """ray: how machines get the weights. shared: from the path given, on a disk that all see; store: from this machine
    through Ray's object store; s3://… or another folder that all see; auto: as shared where the same files are there,
    else as store"""
    num_actors: Annotated[int | None, Range(least=1)] = None
    """ray: processes that compute; default: one a GPU, else one for 8 cores"""
    cpus_per_actor: Annotated[int | None, Range(least=1)] = None
    """ray: cores of each, and its threads unless --num-threads says otherwise"""
    gpus_per_actor: Annotated[float | None, Range(least=0)] = None
    """ray: GPUs of each; default: 1 where there are any. 0.5: two share one"""
    shard_size: Annotated[int, Range(least=1)] = 4096
    """ray: pictures or texts of one file"""
    on_error: OnError = "stop"
    """ray: skip leaves out pictures that cannot be decoded, counts and lists them"""
    max_failed_shards: Annotated[int, Range(least=0)] = 0
    """ray: shards that may fail, after three attempts each, before the run stops; the next run makes them"""
    overwrite: bool = False
    """ray: start again, removing the shards in --output"""
    columns: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """ray: a column to keep beside the features: of Parquet tables, of the JSON of WebDataset samples, or caption, the
    text of these; '*' for all; may be given several times"""
    metadata: str | None = None
    """ray: a table with a row a picture, .csv, .tsv, .jsonl, .parquet or .xlsx, whose columns are kept beside the
    features, `text` as the caption"""
    image_column: str = "image"
    """ray: the column of --metadata with the picture files, relative to the folder, or the ids"""
    thumbnail_size: Annotated[int, Range(least=0)] = 0
    """ray: keep thumbnails beside the features, of at most so many pixels a side; 0: none"""


@dataclass(frozen=True)
class EngineSettings(RaySettings, Settings, choice.CheckpointSettings):
    """The settings of an extraction by either engine."""

    engine: Engine = "local"
    """ray: processes of a Ray cluster, which write Parquet shards into --output"""

    def __post_init__(self) -> None:
        super().__post_init__()
        choice.check(self.chosen)
        if self.engine == "local":
            for field in fields(RaySettings):
                if settings.is_given(self, field.name):
                    raise ConfigError(f"{flag(field.name)}: is for --engine ray")
            return
        if self.backend == "auto":
            raise ConfigError(
                "--backend auto and --engine ray: processors of the cluster may take different ones, whose rows "
                "differ; name one, such as that which auto takes without ray"
            )
        if not self.output:
            raise ConfigError("--output: expected the folder that the shards of --engine ray go to")
        for name, address in (("output", self.output), ("image_data", self.image_data)):
            if address.startswith("memory://"):
                raise ConfigError(
                    f"{flag(name)} {address}: each process has its own memory; use a path, s3:// or gs://"
                )
        share = self.gpus_per_actor
        if share is not None and not (share < 1 or share == int(share)):
            raise ConfigError(f"--gpus-per-actor: expected a whole number, or a part of one GPU, got {share}")
        for name in ("image_feat_output_path", "text_feat_output_path"):
            if settings.is_given(self, name):
                raise ConfigError(f"{flag(name)}: --engine ray writes into --output; leave it out")
        for name in ("columns", "metadata", "thumbnail_size"):
            if settings.is_given(self, name) and not self.extract_image_feats:
                raise ConfigError(f"{flag(name)}: is for pictures; give --extract-image-feats")
        settings.check(self, [settings.needs("image_column", "metadata", ", the table that has it", refused=True)])
        if self.output_format not in (None, "parquet"):
            raise ConfigError(f"--output-format {self.output_format}: --engine ray writes parquet")

    @property
    def chosen(self) -> choice.Choice:
        """The model asked for."""
        return replace(super().chosen, decode=self.decode, context_length=self.context_length)

"""The settings of an extraction over a Ray cluster, and their checks; imports little, for --help."""

from dataclasses import dataclass, fields
from typing import Annotated, Literal, TypeAlias

from cn_clip import settings
from cn_clip.clip import choice
from cn_clip.errors import ConfigError
from cn_clip.features import extraction
from cn_clip.settings import Range, flag

Engine: TypeAlias = Literal["local", "ray"]
OnError: TypeAlias = Literal["stop", "skip"]


@dataclass(frozen=True)
class RaySettings:
    """What `--engine ray` takes more than the engine of one process."""

    output: str | None = None
    """ray: folder of Parquet shards, images/ and texts/ in it; a path, s3://… or gs://…"""
    ray_address: str | None = None
    """ray: auto or HOST:PORT of a running cluster; default: a cluster of this machine alone, for this run"""
    num_actors: Annotated[int | None, Range(least=1)] = None
    """ray: processes that compute; default: one a GPU, else one for 8 cores"""
    cpus_per_actor: Annotated[int | None, Range(least=1)] = None
    """ray: cores of each, and its threads unless --num-threads says otherwise"""
    gpus_per_actor: float | None = None
    """ray: GPUs of each; default: 1 where there are any. 0.5: two share one"""
    shard_size: Annotated[int, Range(least=1)] = 4096
    """ray: pictures or texts of one file"""
    on_error: OnError = "stop"
    """ray: skip leaves out pictures that cannot be decoded, counts and lists them"""
    overwrite: bool = False
    """ray: start again, removing the shards in --output"""


@dataclass(frozen=True)
class Settings(RaySettings, extraction.Settings, choice.ModelSettings):
    """The settings of an extraction by either engine."""

    engine: Engine = "local"
    """ray: processes of a Ray cluster, which write Parquet shards into --output"""

    def __post_init__(self) -> None:
        super().__post_init__()
        choice.check(self)
        if self.engine == "local":
            for field in fields(RaySettings):
                if settings.is_given(self, field.name):
                    raise ConfigError(f"{flag(field.name)}: is for --engine ray")
            return
        if self.output is None:
            raise ConfigError("--output: expected the folder that the shards of --engine ray go to")
        share = self.gpus_per_actor
        if share is not None and not (0 <= share < 1 or share == int(share)):
            raise ConfigError(f"--gpus-per-actor: expected a whole number, or a part of one GPU, got {share}")
        for name in ("image_feat_output_path", "text_feat_output_path"):
            if settings.is_given(self, name):
                raise ConfigError(f"{flag(name)}: --engine ray writes into --output; leave it out")
        if self.output_format not in (None, "parquet"):
            raise ConfigError(f"--output-format {self.output_format}: --engine ray writes parquet")

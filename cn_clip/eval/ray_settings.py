"""The settings of an extraction over a Ray cluster, and their checks; imports little, for --help."""

from dataclasses import dataclass, fields
from typing import Literal, TypeAlias

from cn_clip.errors import ConfigError

Engine: TypeAlias = Literal["local", "ray"]
OnError: TypeAlias = Literal["stop", "skip"]


@dataclass(frozen=True)
class RaySettings:
    """What `--engine ray` takes more than the engine of one process."""

    output: str | None = None
    """ray: folder of Parquet shards, images/ and texts/ in it; a path, s3://… or gs://…"""
    ray_address: str | None = None
    """ray: auto or HOST:PORT of a running cluster; default: a cluster of this machine alone, for this run"""
    num_actors: int | None = None
    """ray: processes that compute; default: one a GPU, else one for 8 cores"""
    cpus_per_actor: int | None = None
    """ray: cores of each, and its threads unless --num-threads says otherwise"""
    gpus_per_actor: float | None = None
    """ray: GPUs of each; default: 1 where there are any. 0.5: two share one"""
    shard_size: int = 4096
    """ray: pictures or texts of one file"""
    on_error: OnError = "stop"
    """ray: skip leaves out pictures that cannot be decoded, counts and lists them"""
    overwrite: bool = False
    """ray: start again, removing the shards in --output"""


def check(settings: RaySettings, *, engine: Engine) -> None:
    """Raises ConfigError for what the engine does not take."""
    if engine == "local":
        for field in fields(RaySettings):
            if getattr(settings, field.name) != field.default:
                raise ConfigError(f"--{field.name.replace('_', '-')}: is for --engine ray")
        return
    if settings.output is None:
        raise ConfigError("--output: expected the folder that the shards of --engine ray go to")
    for name in ("num_actors", "cpus_per_actor", "shard_size"):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    share = settings.gpus_per_actor
    if share is not None and not (0 <= share < 1 or share == int(share)):
        raise ConfigError(f"--gpus-per-actor: expected a whole number, or a part of one GPU, got {share}")

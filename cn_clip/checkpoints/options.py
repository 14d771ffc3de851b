"""The settings of the commands that turn one weight file into another."""

from dataclasses import dataclass
from typing import Annotated

import tyro

from cn_clip import command
from cn_clip.errors import ConfigError
from cn_clip.option_types import Json, WeightType


@dataclass(frozen=True)
class RewriteOptions:
    """One file in, one file out, in the precision asked for."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """The checkpoint"""
    output: command.Required = None
    """The file to write"""
    precision: WeightType = "keep"
    json: Json = False

    def __post_init__(self) -> None:
        if self.output is None:
            raise ConfigError("--output: expected the file to write")

"""The settings of the commands that turn one weight file into another."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from cn_clip import command
from cn_clip.errors import ConfigError


@dataclass(frozen=True)
class RewriteOptions:
    """One file in, one file out, in the precision asked for."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """The checkpoint"""
    output: command.Required = None
    """The file to write"""
    precision: Literal["keep", "fp16", "fp32"] = "keep"
    """Type of the weights; fp16 as in the published models: norms of the picture tower stay float32"""
    json: bool = False
    """Print the result as one JSON object"""

    def __post_init__(self) -> None:
        if self.output is None:
            raise ConfigError("--output: expected the file to write")

"""Searches an index by text, picture, both, or one of its items: `cn-clip search photos.index 海边的日落`."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from cn_clip import command, settings
from cn_clip.errors import ConfigError
from cn_clip.index.options import IndexArgument, MilvusConfig, ModelOptions, execute
from cn_clip.settings import Range


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Finds the pictures nearest to a text, a picture, both together, or one of the index."""

    index: IndexArgument
    text: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="TEXT")] = None
    """What the pictures should show"""
    image: str | None = None
    """A picture file to find the like of"""
    id: str | None = None
    """An item of the index to find the like of; it is not among the results"""
    text_weight: Annotated[float, Range(least=0, most=1)] = 0.5
    """With a text and a picture: the share of the text, 0 to 1"""
    k: Annotated[int, tyro.conf.arg(aliases=("--top-k",)), Range(least=1)] = 10
    """Results"""
    min_score: float | None = None
    """Least score (cosine)"""
    where: str | None = None
    """Condition on items, such as "date=2021-05 path~旅行" or "group=动物,植物 (width>=800 or not camera~Apple)\""""
    no_words: bool = False
    """Search by the vector of TEXT alone, though the index has the words in its pictures (index build --ocr)"""
    grid: str | None = None
    """Draw the results into this PNG file"""
    milvus_config: MilvusConfig = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.image is not None and self.id is not None:
            raise ConfigError("--image, --id: give one of them")
        if self.text is None and self.image is None and self.id is None:
            raise ConfigError("give a text, --image or --id")
        if self.text is not None and not self.text.strip():
            raise ConfigError("the text is empty")
        if self.min_score is not None and math.isnan(self.min_score):
            raise ConfigError("--min-score: expected a number, got nan")
        settings.check(self, [settings.needs("no_words", "text", refused=True)])
        if settings.is_given(self, "text_weight") and (self.text is None or (self.image is None and self.id is None)):
            raise ConfigError("--text-weight: needs TEXT and a picture (--image or --id) to weigh it against")


def run(options: Options) -> None:
    """Prints what is found; raises CnClipError naming the file, model or id that does not fit."""
    from cn_clip.index import searching

    searching.search(options, command.Speaker(quiet=options.json))


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    execute(run, Options, args)


if __name__ == "__main__":
    main()

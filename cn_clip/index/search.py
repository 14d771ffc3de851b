"""Searches an index by text, picture, both, or one of its items: `cn-clip search photos.index 海边的日落`."""

# D embedding

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from cn_clip import command, files, settings
from cn_clip.errors import ConfigError, DataError
from cn_clip.index.options import IndexPlace, ModelOptions, with_store
from cn_clip.settings import Range

if TYPE_CHECKING:
    from cn_clip.clip.backends.base import Kind
    from cn_clip.clip.encoder import Encoder
    from cn_clip.retrieval.addresses import Searchable
    from cn_clip.retrieval.segments import FloatArray, ItemId
    from cn_clip.retrieval.store import Hit


@dataclass(frozen=True, kw_only=True)
class Options(ModelOptions):
    """Finds the pictures nearest to a text, a picture, both together, or one of the index."""

    index: IndexPlace
    text: Annotated[tyro.conf.Positional[str | None], tyro.conf.arg(metavar="TEXT")] = None
    """What the pictures should show"""
    image: str | None = None
    """A picture file to find the like of"""
    id: str | None = None
    """An item of the index to find the like of; it is not among the results"""
    text_weight: Annotated[float, Range(least=0, most=1)] = 0.5
    """With a text and a picture: the share of the text, 0 to 1"""
    k: Annotated[int, Range(least=1)] = 10
    """Results"""
    min_score: float | None = None
    """Least score (cosine)"""
    where: str | None = None
    """Condition on metadata, such as "group=动物 year>=2020"; values joined by commas: one of them"""
    grid: str | None = None
    """Draw the results into this PNG file"""

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
        if settings.is_given(self, "text_weight") and (self.text is None or (self.image is None and self.id is None)):
            raise ConfigError("--text-weight: needs TEXT and a picture (--image or --id) to weigh it against")


def run(options: Options) -> None:
    """Prints what is found; raises CnClipError naming the file, model or id that does not fit."""
    from cn_clip.retrieval.addresses import address_of, open_index
    from cn_clip.retrieval.query import parse_condition

    say = command.Speaker(quiet=options.json)
    index = open_index(address_of(options.index))
    if options.where is not None:
        parse_condition(options.where)
    if options.grid is not None:
        _check_grid(options.grid, index, options)
    own_id = _known_id(index, options.id) if options.id is not None else None
    query_D = _query(index, options, own_id, say)
    more = 0 if own_id is None else 1
    found = index.search(query_D[None], options.k + more, where=options.where, min_score=options.min_score)[0]
    hits = [hit for hit in found if own_id is None or hit.id != own_id][: options.k]
    if options.grid is not None:
        _draw(index, options, hits)
    for line in _table(hits):
        say(line)
    say.result(
        {
            "index": index.address,
            "model": index.model.name,
            "hits": [{"id": hit.id, "score": hit.score, "metadata": hit.metadata} for hit in hits],
        }
    )


def _check_grid(grid: str, index: "Searchable", options: Options) -> None:
    """Raises ConfigError for a file that the search reads or the index was made of, DataError as `replaceable`."""
    files.refuse_inputs("--grid", grid, [options.image, options.model])
    target, folder = files.replaceable(grid), os.path.realpath(options.index)
    if folder in map(str, target.parents):
        raise ConfigError(f"--grid {grid}: lies in the index {options.index}; give a path elsewhere")
    if not target.exists():
        return
    there = os.stat(target)
    sources = set[str]()
    for _, metadata in index.items():
        path, source = metadata.get("path"), metadata.get("source")
        sources |= {source, os.path.join(source, "data.mdb")} if isinstance(source, str) else set()
        if isinstance(path, str) and _is_file(path, there):
            raise ConfigError(f"--grid {grid}: would overwrite {path}, a picture of the index; give another path")
    for source in sources:
        if _is_file(source, there):
            raise ConfigError(
                f"--grid {grid}: would overwrite {source}, of which the index was made; give another path"
            )


def _is_file(path: str, facts: os.stat_result) -> bool:
    try:
        return os.path.samestat(os.stat(path), facts)
    except (OSError, ValueError):  # it is gone, or metadata of another program
        return False


def _known_id(index: "Searchable", text: str) -> "ItemId":
    """The item that is called so; a number is looked for as one, too, and a name on a disk by its spelling."""
    from cn_clip.data.paths import readable
    from cn_clip.retrieval.addresses import item_called

    found = item_called(index, text)
    if found is None:
        found = item_called(index, readable(text))
    if found is None:
        raise DataError(f"has no item {text!r}", at=index.address)
    return found


def _query(index: "Searchable", options: Options, own_id: "ItemId | None", say: command.Speaker) -> "FloatArray":
    import numpy as np

    from cn_clip.retrieval.query import mixed

    given: dict[Kind, str | None] = {"text": options.text, "image": options.image}
    kinds = [kind for kind, value in given.items() if value is not None]
    encoder = _encoder(index, options, kinds, say) if kinds else None
    picture_D = index.vector(own_id) if own_id is not None else None
    if encoder and options.image is not None:
        picture_D = encoder.encode_images([options.image])[0]
    if encoder is None or options.text is None:
        assert picture_D is not None, "a text, a picture or an id is given"
        return picture_D
    text_D: FloatArray = encoder.encode_texts([options.text])[0]
    if picture_D is None:
        return text_D
    try:
        return mixed(np.stack([text_D, picture_D]), [options.text_weight, 1 - options.text_weight])
    except ConfigError as error:
        raise ConfigError(f"--text-weight {options.text_weight}: {error}") from error


def _encoder(index: "Searchable", options: Options, kinds: "Sequence[Kind]", say: command.Speaker) -> "Encoder":
    from cn_clip.index.models import open_encoder
    from cn_clip.retrieval.store import same_model

    name = options.model or index.model.name
    if not name:
        same_model(index.model, index.model, index.address)
    encoder, info = open_encoder(replace(options.chosen, model=name), say, kinds=kinds)
    same_model(index.model, info, index.address)
    return encoder


def _table(hits: "Sequence[Hit]") -> list[str]:
    from cn_clip import terminal
    from cn_clip.index.show import shown

    if not hits:
        return ["没有找到 / nothing found"]
    rows = [(f"{hit.score:.4f}", shown(hit.id), shown(hit.metadata.get("caption", ""))) for hit in hits]
    return terminal.align([("分数 score", "编号 id", "说明 caption"), *rows], right=frozenset([0]))


def _draw(index: "Searchable", options: Options, hits: "Sequence[Hit]") -> None:
    from PIL import Image

    from cn_clip.data.grid import draw_grid
    from cn_clip.data.pictures import open_picture
    from cn_clip.index.show import shown

    if not hits:
        raise DataError(f"--grid {options.grid}: nothing was found to draw")
    cells, thumbnails = [], index.thumbnails(hit.id for hit in hits)
    for hit in hits:
        small = thumbnails.get(hit.id)
        try:
            picture = open_picture(small) if small else Image.new("RGB", (1, 1), "white")
        except DataError as error:
            raise DataError(
                f"the thumbnail of {shown(hit.id)!r} is damaged ({error}); see `cn-clip index check`", at=index.address
            ) from error
        cells.append((picture, shown(hit.metadata.get("caption", hit.id)), False))
    query = options.text or options.image or options.id or ""
    draw_grid([(shown(query), cells)], Path(options.grid or ""))


def main(args: Sequence[str] | None = None) -> None:
    """The command line."""
    command.execute(run, Options, with_store(args))


if __name__ == "__main__":
    main()

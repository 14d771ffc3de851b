"""What `cn-clip search` does: the vector that is asked for, what is nearest to it, and the picture of that.

Building and serving an index open its model as searching does.
"""

# D embedding

import os
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
from PIL import Image

from cn_clip import files, terminal
from cn_clip.clip.backends.names import KINDS, Kind
from cn_clip.clip.choice import Choice
from cn_clip.clip.encoder import Encoder
from cn_clip.clip.families.opening import full_name
from cn_clip.clip.marks import cut_in, merged_in
from cn_clip.clip.opening import fingerprint, open_quietly
from cn_clip.clip.picture_names import Decode
from cn_clip.command import Speaker
from cn_clip.data.grid import draw_grid
from cn_clip.data.paths import readable
from cn_clip.data.pictures import open_picture
from cn_clip.errors import ConfigError, DataError
from cn_clip.index.sources import FEATURE_SUFFIXES
from cn_clip.language import both
from cn_clip.retrieval.addresses import Searchable, item_called, open_index
from cn_clip.retrieval.conditions import parse_condition
from cn_clip.retrieval.manifest import ModelInfo, PictureFacts
from cn_clip.retrieval.query import mixed
from cn_clip.retrieval.schemes import address_of
from cn_clip.retrieval.segments import FloatArray, ItemId
from cn_clip.retrieval.store import Hit, same_model
from cn_clip.terminal import shown

if TYPE_CHECKING:
    from cn_clip.index.search import Options


def model_of(index: Searchable, given: str | None) -> str:
    """The model to open for an index: the one given, else its own; raises ConfigError when it records none."""
    name = given or index.model.name
    if not name:
        same_model(index.model, index.model, index.address)
    return name


# Of a new index, and of pictures that belong to none.
NEW_PICTURES = PictureFacts(upright=True, decode="auto")


def seen_as(chosen: Choice, pictures: PictureFacts | None) -> Choice:
    """The choice with which pictures are seen as those of an index were; a `decode` that was asked for stays."""
    seen = pictures or PictureFacts()
    return replace(chosen, upright=seen.upright, decode=chosen.decode or cast("Decode", seen.decode))


def made_as(chosen: Choice, model: ModelInfo | None, address: object) -> Choice:
    """The choice with which tokens are merged and vectors cut as those of an index are, if it records its model.

    Raises ConfigError if other numbers were asked for: vectors of both would not be comparable.
    """
    if model is None or not model.fingerprint:
        return chosen
    found = merged_in(model.fingerprint)
    if chosen.merge_tokens not in (None, found):
        raise ConfigError(
            f"--merge-tokens {chosen.merge_tokens}: the vectors were computed with --merge-tokens {found}, and those "
            "of both would differ; leave it out, or build another index",
            at=address,
        )
    cut = cut_in(model.fingerprint)
    if chosen.dimensions not in (None, model.embed_dim):
        raise ConfigError(
            f"--dimensions {chosen.dimensions}: the vectors have {model.embed_dim} numbers; leave it out, or build "
            "another index",
            at=address,
        )
    return replace(chosen, merge_tokens=found, dimensions=cut)


def renewal_hint(pictures: PictureFacts | None, source: str, address: object) -> str:
    """How to renew an index from before pictures were seen upright, in one sentence; "" for any other."""
    is_old = pictures is None or (pictures.ocr and not pictures.upright)  # whose words were read since
    if not is_old or not source or source.endswith(FEATURE_SUFFIXES):
        return ""
    command = f"cn-clip index build {shlex.quote(source)} --output {shlex.quote(str(address))} --renew"
    return both(
        f"{address}: 旧版本建的索引，横着拍的照片没有转正，查询的图片也照此处理；更新索引：{command}",
        f"{address}: was built before photos were turned upright, so query images are not turned either; renew it "
        f"with: {command}",
    )


def open_encoder(chosen: Choice, say: Speaker, *, kinds: Sequence[Kind] = KINDS) -> tuple[Encoder, ModelInfo]:
    """The towers wanted, and what an index records of their model; raises as `clip.opening.open_encoder`."""
    encoder = open_quietly(chosen, say, kinds=kinds, with_fingerprint=True)
    return encoder, ModelInfo(full_name(chosen.model), fingerprint(chosen, encoder), encoder.embed_dim)


def search(options: "Options", say: Speaker) -> None:
    """Prints what is found; raises CnClipError naming the file, model or id that does not fit."""
    index = open_index(address_of(options.index, options.milvus_config))
    if options.where is not None:
        parse_condition(options.where)
    if options.grid is not None:
        _check_grid(options.grid, index, options)
    own_id = None
    if options.id is not None:  # a name on a disk is looked for by its spelling, too
        names = (item_called(index, name) for name in (options.id, readable(options.id)))
        own_id = next((name for name in names if name is not None), None)
        if own_id is None:
            raise DataError(f"has no item {options.id!r}", at=index.address)
    query_D = _query(index, options, own_id, say)
    more = 0 if own_id is None else 1
    words = options.text if index.has_words and options.image is options.id is None and not options.no_words else None
    found = index.search(
        query_D[None], options.k + more, where=options.where, min_score=options.min_score, words=words
    )[0]
    hits = [hit for hit in found if own_id is None or hit.id != own_id][: options.k]
    if options.grid is not None:
        _draw(index, options, hits)
    rows = [(f"{hit.score:.4f}", shown(hit.id), shown(hit.metadata.get("caption", ""))) for hit in hits]
    table = terminal.align(
        [(both("分数", "score"), both("编号", "id"), both("说明", "caption")), *rows], right=frozenset([0])
    )
    for line in table if hits else [both("没有找到", "nothing found")]:
        say(line)
    say.result(
        {
            "index": index.address,
            "model": index.model.name,
            "hits": [{"id": hit.id, "score": hit.score, "metadata": hit.metadata} for hit in hits],
        }
    )


def _check_grid(grid: str, index: Searchable, options: "Options") -> None:
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


def _query(index: Searchable, options: "Options", own_id: ItemId | None, say: Speaker) -> FloatArray:
    """The vector (D,) of the text, of the picture or item, or of both; opens the towers that this takes."""
    given: dict[Kind, str | None] = {"text": options.text, "image": options.image}
    kinds = [kind for kind, value in given.items() if value is not None]
    picture_D = index.vector(own_id) if own_id is not None else None
    if kinds:
        name = model_of(index, options.model)
        if hint := renewal_hint(index.pictures, index.source, index.address):
            say.note(hint)
        seen = seen_as(replace(options.chosen, model=name), index.pictures)
        seen = made_as(seen, index.model, index.address)
        encoder, info = open_encoder(seen, say, kinds=kinds)
        same_model(index.model, info, index.address)
        if options.image is not None:
            picture_D = encoder.encode_images([options.image])[0]
        if options.text is not None:
            text_D: FloatArray = encoder.encode_texts([options.text])[0]
            if picture_D is None:
                return text_D
            try:
                return mixed(np.stack([text_D, picture_D]), [options.text_weight, 1 - options.text_weight])
            except ConfigError as error:
                raise ConfigError(f"--text-weight {options.text_weight}: {error}") from error
    assert picture_D is not None, "a text, a picture or an id is given"
    return picture_D


def _draw(index: Searchable, options: "Options", hits: Sequence[Hit]) -> None:
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

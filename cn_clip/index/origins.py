"""Where the items of an index came from: the pictures and vectors that are still there; for repairs and renewals."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from cn_clip.data import facts
from cn_clip.data.lmdb_store import ImageStore
from cn_clip.data.paths import spelled
from cn_clip.digests import is_file
from cn_clip.features.files import read_features
from cn_clip.index.sources import PICTURE_FIELDS, TABLE_FIELDS, Candidate, is_feature_file, read_file
from cn_clip.retrieval.segments import ItemId


class Origins:
    """The sources of items, each opened at first use."""

    def __init__(self) -> None:
        # Vectors by id, or pictures by id.
        self._opened: dict[str, dict[ItemId, Any] | ImageStore | None] = {}

    def find(self, item_id: ItemId, metadata: Mapping[str, Any]) -> tuple[Any, Candidate | None]:
        """(vector, None) of a feature file, (None, picture) where there still is one, else (None, None).

        Raises DataError for a source that is there and cannot be read.
        """
        source, path = metadata.get("source"), metadata.get("path")
        if metadata.get("kind") == "video":  # the next build reads a video again that lacks a frame
            return None, None
        renewed = set(PICTURE_FIELDS).difference(metadata.get(TABLE_FIELDS, ()))
        kept = {name: value for name, value in metadata.items() if name not in renewed}
        if isinstance(path, str) and is_file(path):
            there = os.stat(path)
            # An index of before has no such fields.
            name = facts.of_name(spelled(os.path.relpath(path, source)).replace(os.sep, "/")) if source else {}
            now = {"size": there.st_size, "mtime_ns": there.st_mtime_ns}
            if any(metadata.get(field) != value for field, value in now.items()):
                kept.pop("text", None)  # the words of other bytes; the next build reads these
            dated = {**name, **kept, **now}
            return None, Candidate(item_id, dated, partial(read_file, path), is_dated=True)
        if not isinstance(source, str) or (path is not None and not is_feature_file(Path(source))):
            return None, None
        if source not in self._opened:
            self._opened[source] = None  # gone
            if is_feature_file(Path(source)):
                features = read_features(source, "image_id")
                self._opened[source] = dict(zip(features.ids, features.vectors, strict=True))
            elif is_file(Path(source, "data.mdb")):
                self._opened[source] = ImageStore(source)
        opened = self._opened[source]
        if isinstance(opened, dict):
            return opened.get(item_id), None
        if isinstance(opened, ImageStore) and opened.base64(item_id) is not None:
            return None, Candidate(item_id, kept, partial(opened.picture, item_id), is_dated=False)
        return None, None

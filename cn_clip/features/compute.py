"""The pictures and the texts of an extraction: which rows they need, in which batches, and which row is whose."""

# N inputs, M computed rows (equal texts share one), B batch, D embedding

import os
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from cn_clip.clip.backends.base import Kind, named
from cn_clip.clip.encoder import SORTING_WINDOW, Encoder, sorted_batches
from cn_clip.data.picture_sets import LmdbPictures, PictureSource, StoredPicture, batches
from cn_clip.data.records import RecordId, digest_of
from cn_clip.features.partial import Job, PartialFeatures
from cn_clip.features.rows import IdField, check_finite, check_unique
from cn_clip.jsonl import numbered_lines

KeyT = TypeVar("KeyT", covariant=True)
Places = NDArray[np.int64]


class Work(Protocol):
    """Inputs of one kind, to be turned into unit rows batch by batch."""

    @property
    def kind(self) -> Kind: ...
    @property
    def field(self) -> IdField: ...
    @property
    def ids(self) -> Sequence[RecordId]: ...

    def facts(self) -> Job:
        """What decides on the inputs and their batches: another run with equal facts computes equal rows."""
        ...

    def compute(self, encoder: Encoder, partial: PartialFeatures) -> Places:
        """Computes what `partial` lacks, in the batches of a run that nothing interrupted; returns each id's row."""
        ...


class Texts:
    """The texts of a split."""

    kind: Kind = "text"
    field: IdField = "text_id"

    def __init__(self, texts: Sequence[tuple[RecordId, str]], *, batch_size: int, path: str | os.PathLike[str]) -> None:
        """path: of the file the texts are from; raises DataError naming both lines of an id that comes twice."""
        self.texts, self.batch_size = texts, batch_size
        self.ids = [text_id for text_id, _ in texts]
        if len(set(self.ids)) < len(self.ids):
            check_unique(
                self.ids, path, self.field, numbers=[number for number, _ in numbered_lines(path)], unit="line"
            )

    def facts(self) -> Job:
        """What the rows depend on besides the model."""
        return {"data": digest_of(self.texts), "batch_size": self.batch_size}

    def compute(self, encoder: Encoder, partial: PartialFeatures) -> Places:
        """Encodes all texts and returns where the row of each stands."""
        places = np.empty(len(self.texts), dtype=np.int64)
        first = 0
        with tqdm(total=len(self.texts), unit="text") as bar:
            for start in range(0, len(self.texts), SORTING_WINDOW):
                window = encoder.texts.rows([text for _, text in self.texts[start : start + SORTING_WINDOW]])
                # Computed once, equal rows have equal vectors; in batches of other shapes the last digits may differ.
                number_of = {tuple(row): number for number, row in reversed(list(enumerate(window)))}
                distinct = sorted(number_of.values())
                row_of: dict[int, int] = {}
                tokens = [window[number] for number in distinct]
                for chosen, token_ids in sorted_batches(tokens, self.batch_size, encoder.texts.pad):
                    if first + len(chosen) > partial.num_rows:
                        names = [self.ids[start + distinct[index]] for index in chosen]
                        with named(self.field, names.__getitem__):
                            rows_BD = encoder.backend.encode_tokens(token_ids)
                        check_finite(rows_BD, names, self.field)
                        partial.put(first, rows_BD)
                    row_of |= {distinct[index]: first + row for row, index in enumerate(chosen)}
                    first += len(chosen)
                    bar.update(len(chosen))
                places[start : start + len(window)] = [row_of[number_of[tuple(row)]] for row in window]
                bar.update(len(window) - len(distinct))
        return places


class Pictures:
    """The pictures of an LMDB."""

    kind: Kind = "image"
    field: IdField = "image_id"

    def __init__(self, pictures: LmdbPictures, *, batch_size: int, num_workers: int) -> None:
        self.pictures, self.batch_size, self.num_workers = pictures, batch_size, num_workers
        self.ids = pictures.ids

    def facts(self) -> Job:
        """What the rows depend on besides the model."""
        status = os.stat(os.path.join(self.pictures.images.folder, "data.mdb"))
        data = [digest_of(self.ids), status.st_size, status.st_mtime_ns]
        return {"data": data, "batch_size": self.batch_size}

    def compute(self, encoder: Encoder, partial: PartialFeatures) -> Places:
        """Encodes all pictures and returns where the row of each stands."""
        compute_pictures(
            self.pictures, encoder, partial, ids=self.ids, batch_size=self.batch_size, num_workers=self.num_workers
        )
        return np.arange(len(self.pictures))


def compute_pictures(
    pictures: PictureSource[object],
    encoder: Encoder,
    partial: PartialFeatures,
    *,
    ids: Sequence[object],
    batch_size: int,
    num_workers: int,
) -> None:
    """Computes the rows that `partial` lacks, in the order of `pictures`; ids: what errors call them.

    Raises DataError naming a picture that cannot be read, CheckpointError for one whose row is no number.
    """
    count = len(pictures)
    done = partial.num_rows if partial.num_rows >= count else partial.num_rows // batch_size * batch_size
    with tqdm(total=count, initial=done, unit="picture") as bar:
        if done < count or not count:
            for keys, pixels in batches(_Rest(pictures, done), encoder.transform, batch_size, num_workers):
                names = ids[done : done + len(keys)]
                with named("image_id", names.__getitem__):
                    rows_BD = encoder.backend.encode_pixels(pixels)
                check_finite(rows_BD, names, "image_id")
                partial.put(done, rows_BD)
                done += len(keys)
                bar.update(len(keys))


class _Rest(Generic[KeyT]):
    """The pictures of a source from number `first` on."""

    def __init__(self, pictures: PictureSource[KeyT], first: int) -> None:
        self.pictures, self.first = pictures, first

    def __len__(self) -> int:
        return len(self.pictures) - self.first

    def __getitem__(self, index: int) -> StoredPicture[KeyT]:
        return self.pictures[self.first + index]

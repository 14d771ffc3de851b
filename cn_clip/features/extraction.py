"""From inputs to feature files: the rows of pictures and texts, kept while they are computed, and written."""

# N inputs, M computed rows (equal texts share one), B batch, D embedding

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from cn_clip import __version__, command, settings, zoo
from cn_clip.clip.backends.base import Rows, TokenIds, named
from cn_clip.clip.backends.names import KINDS, Kind
from cn_clip.clip.backends.opening import open_files
from cn_clip.clip.encoder import SORTING_WINDOW, Encoder, sorted_batches
from cn_clip.clip.opening import (
    Identity,
    check_context_length,
    identity,
    open_encoder,
    tower_identity,
    weight_files,
)
from cn_clip.data.pictures import LmdbPictures, PictureSource, batches
from cn_clip.data.records import RecordId, digest_of, read_texts
from cn_clip.errors import ConfigError
from cn_clip.features.files import write_rows
from cn_clip.features.options import RULES, EngineSettings, ExportedSettings, OutputFormat, Settings
from cn_clip.features.rows import IdField, check_unique
from cn_clip.features.store import Job, RowStore
from cn_clip.features.tables import check_npz_ids, require_parquet
from cn_clip.files import refuse_inputs
from cn_clip.jsonl import numbered_lines
from cn_clip.language import both, translated
from cn_clip.progress import progress

# Rows of one write, and of one row group of a Parquet file.
ROWS_A_BLOCK = 8192

Positions = NDArray[np.int64]


class Work(Protocol):
    """Inputs of one kind, to be turned into unit rows batch by batch."""

    @property
    def kind(self) -> Kind:
        """Which tower computes them."""
        ...

    @property
    def field(self) -> IdField:
        """What a feature file calls their ids."""
        ...

    @property
    def ids(self) -> Sequence[RecordId]:
        """The id of each input, in order."""
        ...

    def facts(self) -> Job:
        """What decides on the inputs and their batches: another run with equal facts computes equal rows."""
        ...

    def compute(self, encoder: Encoder, store: RowStore) -> Positions:
        """Computes what `store` lacks, in the batches of a run that nothing interrupted; returns each id's row (N,)."""
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
            lines = [number for number, _ in numbered_lines(path)]
            check_unique(self.ids, path, self.field, numbers=lines, unit="line")

    def facts(self) -> Job:
        """What the rows depend on besides the model."""
        return {"data": digest_of(self.texts), "batch_size": self.batch_size}

    def compute(self, encoder: Encoder, store: RowStore) -> Positions:
        """Encodes all texts; returns the row of each. Texts of equal tokens within a window share one."""
        positions = np.empty(len(self.texts), dtype=np.int64)
        stored, done, names = store.num_rows, 0, list[RecordId]()  # names: of the rows that are computed

        def lacking() -> Iterator[tuple[tuple[int, int], TokenIds]]:
            first = 0
            for groups, token_ids in self._batches(encoder):
                for row, numbers in enumerate(groups, first):
                    positions[numbers] = row
                num_texts = sum(map(len, groups))
                if first + len(groups) > stored:
                    names.extend(self.ids[numbers[0]] for numbers in groups)
                    yield (first, num_texts), token_ids
                else:
                    bar.advance(num_texts)
                first += len(groups)

        what = both("编码文本", "encoding texts")
        with (
            progress(len(self.texts), both("条", "texts"), what) as bar,
            named(self.field, lambda row: names[done + row]),
        ):
            for (first, num_texts), rows_BD in encoder.token_rows(lacking()):
                store.put(first, rows_BD)
                done += len(rows_BD)
                bar.advance(num_texts)
        return positions

    def _batches(self, encoder: Encoder) -> Iterator[tuple[list[list[int]], TokenIds]]:
        """(for each row the numbers of the texts that share it, its token ids), texts of like length together."""
        for start in range(0, len(self.texts), SORTING_WINDOW):
            window = encoder.texts.rows([text for _, text in self.texts[start : start + SORTING_WINDOW]])
            # Computed once, equal rows have equal vectors; in batches of other shapes the last digits may differ.
            numbers_of: dict[tuple[int, ...], list[int]] = {}
            for number, row in enumerate(window, start):
                numbers_of.setdefault(tuple(row), []).append(number)
            groups, tokens = list(numbers_of.values()), list(map(list, numbers_of))
            for chosen, token_ids in sorted_batches(tokens, self.batch_size, encoder.texts.pad):
                yield [groups[index] for index in chosen], token_ids


class Pictures:
    """The pictures of an LMDB."""

    kind: Kind = "image"
    field: IdField = "image_id"

    def __init__(self, pictures: LmdbPictures, *, batch_size: int, num_workers: int | None) -> None:
        self.pictures, self.batch_size, self.num_workers = pictures, batch_size, num_workers
        self.ids = pictures.ids

    def facts(self) -> Job:
        """What the rows depend on besides the model."""
        status = os.stat(os.path.join(self.pictures.images.folder, "data.mdb"))
        data = [digest_of(self.ids), status.st_size, status.st_mtime_ns]
        return {"data": data, "batch_size": self.batch_size}

    def compute(self, encoder: Encoder, store: RowStore) -> Positions:
        """Encodes all pictures; row n is that of picture n."""
        sizes: dict[str, Any] = {"batch_size": self.batch_size, "num_workers": self.num_workers}
        compute_pictures(self.pictures, encoder, store, ids=self.ids, **sizes)
        return np.arange(len(self.pictures))


def compute_pictures(
    pictures: PictureSource[object],
    encoder: Encoder,
    store: RowStore,
    *,
    ids: Sequence[object],
    batch_size: int,
    num_workers: int | None,
) -> None:
    """Computes the rows that `store` lacks, in the order of `pictures`; ids: what errors call them.

    Raises DataError naming a picture that cannot be read, NotFiniteError for one whose row is no number.
    """
    count = len(pictures)
    done = store.num_rows if store.num_rows >= count else store.num_rows // batch_size * batch_size
    with progress(count, both("张", "pictures"), both("编码图片", "encoding pictures"), done=done) as bar:
        if done < count or not count:
            sizes: dict[str, Any] = {"batch_size": batch_size, "num_workers": num_workers}
            for rows_BD in picture_rows(pictures, encoder, names=ids, what="image_id", **sizes, first=done):
                store.put(done, rows_BD)
                done += len(rows_BD)
                bar.advance(len(rows_BD))


def picture_rows(
    pictures: PictureSource[object],
    encoder: Encoder,
    *,
    names: Sequence[object],
    what: str = "picture",
    batch_size: int,
    num_workers: int | None,
    first: int = 0,
) -> Iterator[Rows]:
    """Yields the unit rows (B, D) of the pictures from number `first` on, batch by batch.

    names: of all pictures, for errors, which call each `what` NAME. Raises DataError naming a picture that cannot be
    read, NotFiniteError for one whose row is no number.
    """
    decoded = batches(pictures, encoder.transform, batch_size, num_workers, first=first, room=encoder.room)
    with named(what, lambda position: names[first + position]):
        for _, rows_BD in encoder.pixel_rows(decoded):
            first += len(rows_BD)
            yield rows_BD


def run(options: EngineSettings) -> None:
    """Extracts with the model and the engine that the settings name; raises CnClipError as `extract`."""
    say = begin(options)
    if options.engine == "ray":
        from cn_clip.features import ray_extraction

        ray_extraction.extract(options, say)
        return
    chosen = options.chosen
    encoder = open_encoder(chosen, say, kinds=options.kinds)
    is_here = chosen.is_foreign or Path(chosen.model).exists()
    extract(options, encoder, identity(chosen, encoder), say, model_files=weight_files(chosen) if is_here else ())


def run_exported(
    options: ExportedSettings, backend: Literal["onnx", "tensorrt"], *, device: str, num_threads: int | None = None
) -> None:
    """Extracts with two exported files; raises CnClipError as `extract`, and when a file is not the model named."""
    say = begin(options)
    image, text = (options.tower_file(kind) if kind in options.kinds else None for kind in KINDS)
    opened = open_files(backend, image, text, device=device, num_threads=num_threads)
    name, tower = options.vision_model, opened.image
    if name is not None and tower is not None:
        config = zoo.vision_config(name)
        expected, found = (config.image_resolution, config.embed_dim), (tower.facts.resolution, tower.facts.embed_dim)
        if found != expected:
            raise ConfigError(
                f"--vision-model {name}: takes {expected[0]} pixels a side and gives {expected[1]} dimensions, but "
                f"{tower.path} takes {found[0]} and gives {found[1]}; name its own model, or leave the flag out"
            )
    check_context_length(opened, options.context_length)
    for tower in filter(None, (opened.image, opened.text)):
        say(f"=> opened '{tower.path}' ({tower.provider or 'TensorRT'})")
    encoder = Encoder(opened, context_length=options.context_length, decode=options.decode)
    extract(options, encoder, tower_identity(opened), say)


def begin(options: Settings) -> command.Speaker:
    """Sets up the log, prints the settings and checks that what they need is installed; raises MissingExtraError."""
    say = command.Speaker(quiet=options.json)
    if options.debug:
        logging.basicConfig(format="%(levelname)s | %(message)s")
        logging.getLogger("cn_clip").setLevel(logging.DEBUG)
    say.params(options)
    for rule in settings.broken(options, RULES):
        print(both(f"提示：{translated(rule.message)}", f"note: {rule.message}"), file=sys.stderr)
    if any(options.output_file(kind)[1] == "parquet" for kind in options.kinds):
        require_parquet()
    return say


def open_works(options: Settings, say: command.Speaker) -> list[Work]:
    """What is to be extracted, texts first."""
    works: list[Work] = []
    if options.extract_image_feats:
        say("Preparing image inference dataset.")
        pictures = LmdbPictures(options.image_data)
        works.append(Pictures(pictures, batch_size=options.img_batch_size, num_workers=options.num_workers))
    if options.extract_text_feats:
        say("Preparing text inference dataset.")
        texts = read_texts(options.text_data)
        works.insert(0, Texts(texts, batch_size=options.text_batch_size, path=options.text_data))
    return works


def job_of(work: Work, encoder: Encoder, identity: Identity) -> dict[str, object]:
    """What is extracted, from what, with what: equal jobs give equal files."""
    job = {**work.facts(), **identity(work.kind), "version": __version__}
    return job | ({"context_length": encoder.context_length} if work.kind == "text" else {"decode": encoder.decode})


def extract(
    options: Settings,
    encoder: Encoder,
    identity: Identity,
    say: command.Speaker,
    *,
    model_files: Sequence[Path] = (),
) -> None:
    """Extracts what is asked for; raises as `write_files`. model_files: may not be replaced by an output either."""
    # All is opened before any is worked on: a wrong path is an error at once, not after minutes.
    for kind in options.kinds:
        refuse_inputs(f"--{kind}-feat-output-path", options.output_file(kind)[0], [*options.inputs(), *model_files])
    outputs = [(work, *options.output_file(work.kind)) for work in open_works(options, say)]
    result = write_files(outputs, encoder, identity, say)
    say("Done!")
    say.result(result)


def write_files(
    outputs: Sequence[tuple[Work, str, OutputFormat]], encoder: Encoder, identity: Identity, say: command.Speaker
) -> dict[str, object]:
    """Writes feature files, going on where a killed run stopped, also if that had written one of several.

    outputs: inputs, path and format of each. identity: the facts by which the model differs from others, of each tower
    in use. Returns counts and paths by kind. Raises CnClipError naming file, line or id of what cannot be read,
    DataError for ids that a format cannot keep.
    """
    for work, path, output_format in outputs:
        if output_format == "npz":
            check_npz_ids(path, work.field, work.ids)
    result: dict[str, object] = {}
    with contextlib.ExitStack() as stack:
        stores = []
        for work, path, _ in outputs:
            job = job_of(work, encoder, identity)
            stores.append(stack.enter_context(RowStore(path, job, encoder.embed_dim, say.note)))
        for (work, path, output_format), store in zip(outputs, stores, strict=True):
            say(f"Make inference for {work.kind}s...")
            with store.computing():
                positions = work.compute(encoder, store)
            rows_MD, starts = store.rows(), range(0, len(positions), ROWS_A_BLOCK)
            blocks = (rows_MD[positions[start : start + ROWS_A_BLOCK]] for start in starts)
            write_rows(path, work.field, work.ids, blocks, embed_dim=store.embed_dim, output_format=output_format)
            store.is_written = True
            say(f"{len(work.ids)} {work.kind} features are stored in {path}")
            result |= {f"num_{work.kind}s": len(work.ids), f"{work.kind}_features": path}
    return result

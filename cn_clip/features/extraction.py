"""What the extraction commands share, of whatever backend: their settings, and the way from inputs to feature files."""

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from cn_clip import __version__, command, settings
from cn_clip.clip.choice import Decoding
from cn_clip.errors import ConfigError
from cn_clip.features.formats import OutputFormat, format_of
from cn_clip.files import refuse_inputs
from cn_clip.option_types import BatchSize, ContextLength, Json, NumWorkers
from cn_clip.settings import Range
from cn_clip.zoo import CONTEXT_LENGTH

if TYPE_CHECKING:
    from cn_clip.clip.backends.base import Kind
    from cn_clip.clip.choice import Identity
    from cn_clip.clip.encoder import Encoder
    from cn_clip.features.compute import Places, Work
    from cn_clip.features.partial import PartialFeatures
    from cn_clip.features.rows import FloatArray

# What Chinese-CLIP takes although nothing is done with it.
RULES = [
    settings.needs("image_feat_output_path", "extract_image_feats", refused=False),
    settings.needs("text_feat_output_path", "extract_text_feats", refused=False),
]

# Rows of one write, and of one row group of a Parquet file.
ROWS_A_BLOCK = 8192


@dataclass(frozen=True)
class Settings:
    """The settings of every extraction command; each adds those of its model."""

    extract_image_feats: bool = False
    """Extract picture features"""
    extract_text_feats: bool = False
    """Extract text features"""
    image_data: str = "../Multimodal_Retrieval/lmdb/test/imgs"
    """LMDB directory of the pictures"""
    text_data: str = "../Multimodal_Retrieval/test_texts.jsonl"
    """JSONL file of the texts"""
    image_feat_output_path: str | None = None
    """Where picture features go; default: beside the texts, X_imgs.img_feat.jsonl"""
    text_feat_output_path: str | None = None
    """Where text features go; default: X_texts.txt_feat.jsonl"""
    output_format: OutputFormat | None = None
    """Kind of feature file; default: what the suffix of the output path says, else jsonl. parquet needs pyarrow"""
    img_batch_size: BatchSize = 64
    text_batch_size: Annotated[int, Range(least=1)] = 64
    """Texts in a batch"""
    context_length: ContextLength = CONTEXT_LENGTH
    num_workers: NumWorkers = 1
    decode: Decoding = "exact"
    debug: bool = False
    """Log what is opened and downloaded, to stderr"""
    json: Json = False

    def __post_init__(self) -> None:
        if not self.kinds:
            raise ConfigError("give --extract-image-feats, --extract-text-feats, or both")
        settings.check(self)
        outputs = [self.output_file(kind) for kind in self.kinds]
        if len({os.path.realpath(path) for path, _ in outputs}) < len(outputs):
            raise ConfigError(f"--image-feat-output-path, --text-feat-output-path: both are {outputs[0][0]}")

    @property
    def kinds(self) -> "list[Kind]":
        """The towers an extraction needs."""
        wanted: dict[Kind, bool] = {"image": self.extract_image_feats, "text": self.extract_text_feats}
        return [kind for kind, is_wanted in wanted.items() if is_wanted]

    def output_file(self, kind: "Kind") -> tuple[str, OutputFormat]:
        """The path and the format of an output; raises ConfigError when they contradict each other."""
        path = self.image_feat_output_path if kind == "image" else self.text_feat_output_path
        if path == "":
            raise ConfigError(f"--{kind}-feat-output-path: expected a path, got an empty one")
        output_format = format_of(path, self.output_format)
        return path or _default_path(self.text_data, kind, output_format), output_format

    def inputs(self) -> list[str | None]:
        """The files that are read, none of which an output may replace; None for those that are not given."""
        return [self.text_data, self.image_data, *(f"{self.image_data}/{name}" for name in ("data.mdb", "lock.mdb"))]


def _default_path(text_data: str, kind: "Kind", output_format: OutputFormat) -> str:
    """`X_texts.jsonl` to `X_texts.txt_feat.jsonl`, and for pictures, beside it, to `X_imgs.img_feat.jsonl`."""
    if kind == "text":
        return f"{text_data.removesuffix('.jsonl')}.txt_feat.{output_format}"
    return f"{text_data.replace('_texts.jsonl', '_imgs')}.img_feat.{output_format}"


def begin(options: Settings) -> command.Speaker:
    """Sets up the log, tells the settings and checks that what they need is installed; raises MissingExtraError."""
    say = command.Speaker(quiet=options.json)
    if options.debug:
        logging.basicConfig(format="%(levelname)s | %(message)s")
        logging.getLogger("cn_clip").setLevel(logging.DEBUG)
    say.params(options)
    for rule in settings.broken(options, RULES):
        print(f"提示 / note: {rule.message}", file=sys.stderr)
    if any(options.output_file(kind)[1] == "parquet" for kind in options.kinds):
        from cn_clip.features.tables import require_parquet

        require_parquet()
    return say


def extract(options: Settings, encoder: "Encoder", identity: "Identity", say: command.Speaker) -> None:
    """Extracts what is asked for, going on where a killed run stopped, also when that had written one of two outputs.

    identity: what tells the model from others, of each tower in use.
    Raises CnClipError naming file, line or id of what cannot be read.
    """
    # All is opened before any is worked on: a wrong path is told at once, not after minutes.
    for kind in options.kinds:
        refuse_inputs(f"--{kind}-feat-output-path", options.output_file(kind)[0], options.inputs())
    works = open_works(options, say)
    _check_kept(options, works)
    result: dict[str, object] = {}
    with contextlib.ExitStack() as stack:
        opened = [(work, stack.enter_context(_partial(options, work, encoder, identity, say))) for work in works]
        for work, partial in opened:
            result |= _extract(options, work, partial, encoder, say)
    say("Done!")
    say.result(result)


def open_works(options: Settings, say: command.Speaker) -> "list[Work]":
    """What is to be extracted, texts first."""
    from cn_clip.data.picture_sets import LmdbPictures
    from cn_clip.data.texts import read_texts
    from cn_clip.features.compute import Pictures, Texts

    works: list[Work] = []
    if options.extract_image_feats:
        say("Preparing image inference dataset.")
        pictures = LmdbPictures(options.image_data)
        works.append(Pictures(pictures, batch_size=options.img_batch_size, num_workers=options.num_workers))
    if options.extract_text_feats:
        say("Preparing text inference dataset.")
        works.insert(
            0, Texts(read_texts(options.text_data), batch_size=options.text_batch_size, path=options.text_data)
        )
    return works


def _check_kept(options: Settings, works: "Sequence[Work]") -> None:
    """Raises DataError for ids that a format cannot keep."""
    from cn_clip.features.tables import check_npz_ids

    for work in works:
        path, output_format = options.output_file(work.kind)
        if output_format == "npz":
            check_npz_ids(path, work.field, work.ids)


def _partial(
    options: Settings, work: "Work", encoder: "Encoder", identity: "Identity", say: command.Speaker
) -> "PartialFeatures":
    from cn_clip.features.partial import PartialFeatures

    job = job_of(options, work, encoder, identity)
    return PartialFeatures(options.output_file(work.kind)[0], job, encoder.embed_dim, say.note)


def job_of(options: Settings, work: "Work", encoder: "Encoder", identity: "Identity") -> dict[str, object]:
    """What is extracted, from what, with what: equal jobs give equal files."""
    job = {**work.facts(), **identity(work.kind), "version": __version__}
    return job | ({"context_length": encoder.context_length} if work.kind == "text" else {"decode": options.decode})


def _extract(
    options: Settings, work: "Work", partial: "PartialFeatures", encoder: "Encoder", say: command.Speaker
) -> dict[str, object]:
    from cn_clip.features.files import write_rows

    say(f"Make inference for {work.kind}s...")
    path, output_format = options.output_file(work.kind)
    with partial.computing():
        places = work.compute(encoder, partial)
    write_rows(
        path,
        work.field,
        work.ids,
        _blocks(partial.rows(), places),
        embed_dim=partial.embed_dim,
        output_format=output_format,
    )
    partial.is_written = True
    say(f"{len(work.ids)} {work.kind} features are stored in {path}")
    return {f"num_{work.kind}s": len(work.ids), f"{work.kind}_features": path}


def _blocks(rows_MD: "FloatArray", places_N: "Places") -> "Iterator[FloatArray]":
    for start in range(0, len(places_N), ROWS_A_BLOCK):
        yield rows_MD[places_N[start : start + ROWS_A_BLOCK]]

"""The settings that several commands on indexes share."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, TypeAlias, TypeVar

import tyro

from cn_clip import command, settings, terminal
from cn_clip.clip import choice
from cn_clip.errors import ConfigError
from cn_clip.option_types import BatchSize, Json, MergeTokensOfIndex, NumWorkers
from cn_clip.retrieval.milvus_address import GRAMMAR, SCHEME
from cn_clip.retrieval.schemes import TypedAddress, TypedAddressOrNone
from cn_clip.secret import without_secrets
from cn_clip.settings import Range

OptionsT = TypeVar("OptionsT")

_ADDRESS = (
    "The folder of the index, or milvus://HOST:PORT/COLLECTION, or photos.db of Milvus Lite, or "
    "pgvector://HOST:PORT/DATABASE/NAME"
)
IndexArgument: TypeAlias = Annotated[tyro.conf.Positional[TypedAddress], tyro.conf.arg(metavar="INDEX", help=_ADDRESS)]
IndexOutput: TypeAlias = Annotated[TypedAddressOrNone, tyro.conf.arg(help=_ADDRESS, help_behavior_hint="(required)")]
IndexFolder: TypeAlias = Annotated[tyro.conf.Positional[TypedAddress], tyro.conf.arg(metavar="INDEX")]
MilvusConfig: TypeAlias = Annotated[
    str | None,
    tyro.conf.arg(
        help="TOML file with what an address of Milvus leaves out: uri, user, password, token, database, ca and more; "
        "default: the file that CN_CLIP_MILVUS_CONFIG names, if any"
    ),
]


def with_store(args: Sequence[str] | None, flag: str = "") -> list[str]:
    """The command line with the address given as `--store ADDRESS` moved to the front, or behind `flag`.

    Earlier versions named an index in Milvus so. With `flag`, raises ConfigError for an address that is not one of
    Milvus, or if both are given.
    """
    given, stores = list(sys.argv[1:] if args is None else args), list[str]()
    rest = iter(given)
    kept = []
    for one in rest:
        if one == "--":
            kept += [one, *rest]
        elif one == "--store":
            stores.append(next(rest, ""))
        elif one.startswith("--store="):
            stores.append(one.removeprefix("--store="))
        else:
            kept.append(one)
    if not flag or not stores:
        return [*stores, *kept]
    if any(one.partition("=")[0] == flag for one in kept):
        raise ConfigError(f"{flag}: expected the folder of the index, or in its place --store milvus://…")
    if not stores[-1].startswith(SCHEME):
        raise ConfigError(f"--store: {GRAMMAR}; got {without_secrets(stores[-1])}")
    return [flag, stores[-1], *kept]


def execute(
    run: Callable[[OptionsT], None], options: type[OptionsT], args: Sequence[str] | None, flag: str = ""
) -> None:
    """As `command.execute`, for a command line that may have `--store`; see `with_store`."""
    with terminal.ending(status=2):
        given = with_store(args, flag)
    command.execute(run, options, given)


@dataclass(frozen=True)
class ModelOptions(choice.ModelSettings):
    """What runs the model of an index. Any backend may search what another has built."""

    model: choice.ModelOfIndex = None
    decode: choice.DecodingOfIndex = None
    merge_tokens: MergeTokensOfIndex = None
    json: Json = False

    def __post_init__(self) -> None:
        choice.check(self.chosen)
        settings.check(self)

    @property
    def chosen(self) -> choice.Choice:
        """The model asked for."""
        return replace(super().chosen, decode=self.decode)


@dataclass(frozen=True)
class AddOptions(ModelOptions):
    """What turns pictures into items."""

    metadata: str | None = None
    """A table with a row a picture, .csv, .tsv, .jsonl, .parquet or .xlsx; its columns become metadata, `text` the
    caption"""
    image_column: str = "image"
    """The table's column of picture files, relative to the folder, or of ids"""
    batch_size: BatchSize = 32
    num_workers: NumWorkers = None
    commit_every: Annotated[int | None, Range(least=1)] = None
    """Pictures after which all so far is safe on disk, and reported; default: 1000, of a feature file 65536 vectors"""
    thumbnail_size: Annotated[int, Range(least=0)] = 512
    """Longest side of the thumbnails in pixels; 0: none"""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.check(self, [settings.needs("image_column", "metadata", ", the table that has it", refused=True)])


@dataclass(frozen=True)
class SourceOptions(AddOptions):
    """Which pictures of a source are taken."""

    milvus_config: MilvusConfig = None
    exclude: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Pass over what fits this pattern, such as *.gif or 旅行/草稿: a name in any folder, or a path with "/"; may be
    given several times. @eaDir, #recycle, System Volume Information and the like always are"""
    min_size: Annotated[int, Range(least=0)] = 0
    """Pass over pictures whose shorter side has fewer pixels, such as icons"""
    retry: bool = False
    """Read again the files that did not decode before, though they have not changed since"""
    ocr: bool = False
    """Read the words in pictures, too, for searches by text; later runs do so as well, until --no-ocr"""
    no_ocr: bool = False
    """Read no words, and search by vectors alone, though the index has words"""
    video_every: Annotated[float | None, Range(least=0)] = None
    """Videos: a frame at least every so many seconds, besides those at changes of scene; 0: no videos; default: as
    they are in the index, else 10"""

    def __post_init__(self) -> None:
        super().__post_init__()
        settings.check(self, [settings.excludes("ocr", "no_ocr", "one reads words, the other does not", refused=True)])

"""The manifest of an index folder: which files count, and how long they are; `store` reads it, `writer` replaces it."""

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from cn_clip.digests import FileFacts, facts_of_bytes
from cn_clip.errors import DataError, UnreadableError, is_absent
from cn_clip.files import atomic_write

EngineName: TypeAlias = Literal["exact", "quantized", "usearch"]
VectorType: TypeAlias = Literal["float32", "float16"]

FORMAT = 1
NAME = "manifest.json"
_OWN_NAME = re.compile(r"(segment|removed|graph|notes)-[0-9]{6,}(\.npy|\.usearch|\.jsonl)?")
# What manifests did not have from the beginning.
_LATER = ("pictures", "notes")


@dataclass(frozen=True)
class ModelInfo:
    """The model whose vectors an index holds.

    name: a published name or the path of a weight file. fingerprint: of the weights, alike for every backend and
    precision; "" for an unknown model.
    """

    name: str
    fingerprint: str
    embed_dim: int


@dataclass(frozen=True)
class PictureFacts:
    """How the pictures were seen whose vectors an index holds.

    upright: turned by their EXIF orientation. decode: a way of `clip.picture_names.Decode`. ocr: the words in them are
    read, too. The defaults are those of the indexes from before it was recorded.
    """

    upright: bool = False
    decode: str = "exact"
    ocr: bool = False


def seen_alike(one: PictureFacts | None, other: PictureFacts | None) -> bool:
    """Whether the vectors of both are of pictures seen in one way, whatever else was read in them."""
    return (one and replace(one, ocr=False)) == (other and replace(other, ocr=False))


@dataclass(frozen=True)
class SegmentFacts:
    """A folder of consecutive rows, and its files.

    largest_norm: the length of the longest vector; being a number, it says that all vectors are finite. None in
    segments from before it was recorded.
    """

    name: str
    num_rows: int
    files: Mapping[str, FileFacts]
    largest_norm: float | None = None


@dataclass(frozen=True)
class DerivedFacts:
    """A file beside the segments: removed rows, the graph, notes. next_key: it knows the rows of smaller keys.

    scale, width: of a graph, see `graph.Kind`; None in those of before there were any.
    """

    name: str
    file: FileFacts
    next_key: int
    scale: float | None = None
    width: int | None = None


@dataclass(frozen=True)
class Manifest:
    """A generation of an index. What it does not name is rubbish.

    num_items: rows that are not removed. next_key: the key of the row that is added next; keys rise and never return.
    source: what the index was built from, by which it can be built again. pictures: None in indexes from before it was
    recorded. notes: a file in which those who build an index write down what they need the next time.
    """

    model: ModelInfo
    engine: EngineName = "exact"
    vector_type: VectorType = "float32"
    generation: int = 0
    num_items: int = 0
    next_key: int = 0
    segments: tuple[SegmentFacts, ...] = ()
    removed: DerivedFacts | None = None
    graph: DerivedFacts | None = None
    source: str = ""
    pictures: PictureFacts | None = None
    notes: DerivedFacts | None = None

    @property
    def num_rows(self) -> int:
        """Rows of all segments, removed ones included."""
        return sum(segment.num_rows for segment in self.segments)

    def files(self) -> Iterator[tuple[str, FileFacts]]:
        """The files that count, by their paths in the folder."""
        for segment in self.segments:
            for name, facts in segment.files.items():
                yield f"{segment.name}/{name}", facts
        for derived in (self.removed, self.graph, self.notes):
            if derived is not None:
                yield derived.name, derived.file

    def names(self) -> set[str]:
        """What of the folder's entries counts."""
        return {name.split("/")[0] for name, _ in self.files()}


def read(folder: Path) -> Manifest:
    """Raises DataError when there is no index, or one that this version cannot read."""
    path = folder / NAME
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        if not is_absent(error):
            raise UnreadableError.of(path, error) from error
        raise DataError(
            f"is no index; build one with: cn-clip index build PICTURES --output {folder}", at=folder
        ) from error
    except ValueError as error:
        raise DataError(f"is damaged ({error}); build the index again", at=path) from error
    try:
        return _parse(json.loads(text))
    except DataError as error:
        raise DataError(error, at=path) from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise DataError(f"is damaged ({type(error).__name__}: {error}); build the index again", at=path) from error


def write(folder: Path, manifest: Manifest) -> Manifest:
    """Replaces the manifest by one of the next generation, which it returns; from then on that one counts."""
    following = replace(manifest, generation=manifest.generation + 1)
    content = {"format": FORMAT, **asdict(following)}
    with atomic_write(folder / NAME) as stream:
        json.dump({**content, "digest": _digest(content)}, stream, indent=1)
    return following


ADVICE = "see `cn-clip index check`, which repairs what can be with --repair"


def check_size(path: Path, facts: FileFacts) -> None:
    """Raises DataError naming a file that is missing or of another length, UnreadableError."""
    try:
        found = path.stat().st_size
    except OSError as error:
        raise unreadable(path, error) from error
    if found != facts.bytes:
        raise DataError(f"expected {facts.bytes} bytes, found {found}; {ADVICE}", at=path)


def read_whole(path: Path, facts: FileFacts) -> bytes:
    """The bytes of a small file; raises DataError when they are not those that were written, UnreadableError."""
    check_size(path, facts)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error
    if facts_of_bytes(data) != facts:
        raise DataError(f"its bytes have changed; {ADVICE}", at=path)
    return data


def unreadable(path: Path, error: OSError) -> DataError:
    """What to say of a file of an index that the system does not give."""
    return DataError(f"is missing; {ADVICE}", at=path) if is_absent(error) else UnreadableError.of(path, error)


def is_own(name: str) -> bool:
    """Whether an entry of an index folder is of a name that only the writers of indexes give."""
    return bool(_OWN_NAME.fullmatch(name))


def _digest(content: Mapping[str, Any]) -> str:
    return facts_of_bytes(json.dumps(content, sort_keys=True).encode()).digest


def _parse(values: Any) -> Manifest:
    if values["format"] != FORMAT:
        raise DataError(f"is of format {values['format']!r}, this version reads {FORMAT}; build the index again")
    claimed = values.pop("digest", None)  # None in those of before there was one
    if claimed not in (None, _digest(values)):
        raise ValueError("its content is not what was written")
    known: dict[str, Any] = {name: values[name] for name in Manifest.__dataclass_fields__ if name not in _LATER}
    known["model"] = ModelInfo(**known["model"])
    if values.get("pictures") is not None:
        known["pictures"] = PictureFacts(**values["pictures"])
    known["segments"] = tuple(
        SegmentFacts(
            one["name"],
            one["num_rows"],
            {name: FileFacts(**facts) for name, facts in one["files"].items()},
            one.get("largest_norm"),
        )
        for one in known["segments"]
    )
    for name in ("removed", "graph", "notes"):
        if derived := values.get(name):
            file = FileFacts(**derived["file"])
            known[name] = DerivedFacts(
                derived["name"], file, derived["next_key"], derived.get("scale"), derived.get("width")
            )
    manifest = Manifest(**known)
    for segment in manifest.segments:
        if any("/" in name or name.startswith(".") for name in segment.files):
            raise ValueError(f"file names {sorted(segment.files)}")
        norm = segment.largest_norm
        if norm is not None and (type(norm) is not float or not 0 <= norm < math.inf):
            raise ValueError(f"largest norm {norm!r}")
    strange = sorted(name for name in manifest.names() if not is_own(name))
    numbers = [manifest.generation, manifest.num_items, manifest.next_key, manifest.model.embed_dim]
    if strange or any(type(number) is not int or number < 0 for number in numbers):
        raise ValueError(f"names {strange}, numbers {numbers}")
    if manifest.engine not in get_args(EngineName) or manifest.vector_type not in get_args(VectorType):
        raise DataError(f"names the engine {manifest.engine!r} and vectors of {manifest.vector_type!r}, both unknown")
    return manifest

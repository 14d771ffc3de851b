"""Dataset records, `*_imgs.tsv` and `*_texts.jsonl`, and the meaning of an id; for all who read or write them."""

import base64
import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias, TypeVar

from cn_clip.errors import DataError, Where
from cn_clip.jsonl import json_object, numbered_lines

RecordId: TypeAlias = int | str

MAX_ID_BYTES = 511  # the longest key that LMDB stores
# The tsv and jsonl files of all splits, as an output that appears in one step; see `files.written_together`.
DATASET = "dataset"
NUM_IMAGES_KEY = b"num_images"  # sits among the picture keys of an LMDB, so no picture may be called so

_CANONICAL_INTEGER = re.compile(rf"0|-?[1-9][0-9]{{0,{MAX_ID_BYTES}}}")
_BASE64_TO_STANDARD = bytes.maketrans(b"-_", b"+/")
_BLANKS = b" \t\r\n\v\f"

ImageFields: TypeAlias = tuple[RecordId, bytes]
TextFields: TypeAlias = tuple[RecordId, str, tuple[RecordId, ...]]


@dataclass(frozen=True)
class Fault:
    """What is wrong in one line of a dataset, or in a file; `record_id`: the picture or text id, if it is known."""

    path: str
    line: int | None
    message: str
    record_id: RecordId | None = None

    def __str__(self) -> str:
        where = self.path if self.line is None else f"{self.path}:{self.line}"
        return f"{where}: {self.message}"

    def as_dict(self) -> dict[str, Any]:
        """The fault as JSON holds it: file, line, id, message."""
        return {"file": self.path, "line": self.line, "id": self.record_id, "message": self.message}


@dataclass(frozen=True)
class ImageRecord:
    """One line of a `*_imgs.tsv`: the id, and the picture file's bytes as base64 (not yet decoded).

    is_deep: whether a check found grey of more than 8 bits. is_shrunk: whether the picture was made smaller.
    """

    image_id: RecordId
    base64: bytes
    line: int = 0
    is_deep: bool = False
    is_shrunk: bool = False


@dataclass(frozen=True)
class TextRecord:
    """One line of a `*_texts.jsonl`: the id, the sentence and the ids of the pictures it describes."""

    text_id: RecordId
    text: str
    image_ids: tuple[RecordId, ...]
    line: int = 0


class SourcePair(NamedTuple):
    """A pair as it is stored: the bytes of the picture file, the text as written; `where` begins an error about it."""

    picture: bytes
    text: str
    image_id: RecordId
    text_id: RecordId
    where: Where


RecordT = TypeVar("RecordT", ImageRecord, TextRecord)


def canonical_id(value: object) -> RecordId:
    """The one form of an id: `7`, `"7"` are the int 7; `"007"`, `"a-7"` stay strings.

    Raises DataError for bool, float, None, other types, empty strings, strings with tab, line end or NUL or
    with blanks around them, lone surrogates, and ids of more than 511 bytes.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        _require_short(value.bit_length() * 0.30103, "an integer")
        return value
    if not isinstance(value, str):
        raise DataError(f"expected an integer or string id, got {json_type(value)}")
    if not value:
        raise DataError("expected an id, got an empty string")
    if any(character in value for character in "\t\r\n\0"):
        raise DataError(f"an id holds no tab, line end or NUL, got {value[:80]!r}")
    if value != value.strip():
        raise DataError(f"an id has no blanks around it, got {value[:80]!r}")
    try:
        _require_short(len(value.encode("utf-8")), repr(value[:20] + "..."))
    except UnicodeEncodeError as error:
        raise DataError(f"an id is valid Unicode text, got {value[:80]!r}") from error
    return plain_id(value)


def plain_id(value: RecordId) -> RecordId:
    """`"7"` as the int 7, all else as it is: what `canonical_id` gives, without its checks; for ids of other tools."""
    return int(value) if isinstance(value, str) and _CANONICAL_INTEGER.fullmatch(value) else value


def _require_short(num_bytes: float, what: str) -> None:
    if num_bytes > MAX_ID_BYTES:
        raise DataError(
            f"an id has at most {MAX_ID_BYTES} bytes (the limit of an LMDB key), got {what} of {num_bytes:.0f}"
        )


def id_key(image_id: RecordId) -> bytes:
    """The LMDB key of a picture id; raises DataError for the one reserved name."""
    key = str(image_id).encode("utf-8")
    if key == NUM_IMAGES_KEY:
        raise DataError("the id 'num_images' is reserved for the picture count of an LMDB; rename the picture")
    return key


def id_from_key(key: bytes) -> RecordId:
    """The picture id of an LMDB key; inverse of `id_key`. Raises DataError for a key that is not UTF-8 text."""
    try:
        return canonical_id(key.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"the LMDB key {key[:80]!r} is not UTF-8 text") from error


def decode_base64(data: bytes) -> bytes:
    """Bytes of a base64 text in the standard or the URL-safe alphabet; raises DataError when it is cut or damaged."""
    with contextlib.suppress(ValueError):  # what build_lmdb_dataset and most others write; nothing to translate
        return base64.b64decode(data, validate=True)
    try:
        return base64.b64decode(data.translate(_BASE64_TO_STANDARD, _BLANKS), validate=True)
    except ValueError as error:
        raise DataError(f"the base64 text of {len(data)} characters is truncated or damaged ({error})") from error


def parse_image_line(line: bytes) -> ImageFields:
    """`id<TAB>base64` -> (id, base64); raises DataError that says what was expected. The base64 is not decoded."""
    fields = line.strip().split(b"\t")
    if len(fields) != 2:
        found = "no tab" if len(fields) == 1 else f"{len(fields) - 1} tabs"
        raise DataError(f"expected `id<TAB>base64` with one tab, got {found}: {line[:40]!r}")
    try:
        image_id = canonical_id(fields[0].decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"invalid UTF-8 at byte {error.start} of the id; save the file as UTF-8") from error
    id_key(image_id)
    return image_id, fields[1]


def parse_text_object(record: dict[str, Any]) -> TextFields:
    """`{"text_id", "text", "image_ids"}` -> (text id, text, image ids); raises DataError naming the field."""
    text_id, text = text_fields(record, ("text_id", "text", "image_ids"))
    image_ids = record["image_ids"]
    if not isinstance(image_ids, list):
        raise DataError(f"image_ids of text_id {text_id!r}: expected a list of ids, got {json_type(image_ids)}")
    return text_id, text, tuple(_field_id(f"image_ids of text_id {text_id!r}", value) for value in image_ids)


def text_fields(record: dict[str, Any], required: Sequence[str] = ("text_id", "text")) -> tuple[RecordId, str]:
    """(text id, text) of a record; a number as text becomes a string. Raises DataError naming the field."""
    for field in required:
        if field not in record:
            raise DataError(f"the field {field!r} is missing; expected {', '.join(required[:-1])} and {required[-1]}")
    text_id, text = _field_id("text_id", record["text_id"]), record["text"]
    if isinstance(text, bool) or not isinstance(text, (str, int, float)):
        raise DataError(f"text of text_id {text_id!r}: expected a string, got {json_type(text)}")
    return text_id, str(text)


def _field_id(name: str, value: object) -> RecordId:
    try:
        return canonical_id(value)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error


def json_type(value: object) -> str:
    """The value and its JSON type, short enough for an error message."""
    names = {bool: "boolean", type(None): "null", dict: "object", str: "string", float: "number", int: "number"}
    return f"{names.get(type(value), type(value).__name__)} {dumps_short(value)}"


def dumps_short(value: object) -> str:
    """JSON of a value for a message, cut at 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def read_image_records(path: str | os.PathLike[str]) -> Iterator[ImageRecord | Fault]:
    """Streams a `*_imgs.tsv`: a record, or a Fault for a line that is none; a file without lines is one Fault.

    Raises DataError when the file cannot be opened.
    """

    def parse(line: bytes, number: int) -> ImageRecord:
        return ImageRecord(*parse_image_line(line), line=number)

    return _read(path, parse, "`id<TAB>base64`")


def read_text_records(path: str | os.PathLike[str]) -> Iterator[TextRecord | Fault]:
    """Streams a `*_texts.jsonl`: a record, or a Fault for a line that is none; a file without lines is one Fault.

    Raises DataError when the file cannot be opened.
    """

    def parse(line: bytes, number: int) -> TextRecord:
        return TextRecord(*parse_text_object(json_object(line)), line=number)

    return _read(path, parse, '{"text_id": ..., "text": ..., "image_ids": [...]}')


def _read(
    path: str | os.PathLike[str], parse: Callable[[bytes, int], RecordT], expected: str
) -> Iterator[RecordT | Fault]:
    is_empty = True
    for number, line in numbered_lines(path):
        is_empty = False
        try:
            yield parse(line, number)
        except DataError as error:
            yield Fault(str(path), number, str(error))
    if is_empty:
        yield Fault(str(path), None, f"the file is empty; expected lines of {expected}")


def read_texts(path: str | os.PathLike[str]) -> list[tuple[RecordId, str]]:
    """(text id, text as written) of each line of a texts jsonl, in order; image_ids are not looked at.

    Numbers as text are turned into strings. Raises DataError with file and line; an empty file is an error.
    """
    texts = []
    for number, line in numbered_lines(path):
        try:
            texts.append(text_fields(json_object(line)))
        except DataError as error:
            raise DataError(error, at=Where(path, line=number)) from error
    if not texts:
        raise DataError('the file is empty; expected lines of {"text_id": ..., "text": ...}', at=path)
    return texts


def image_line(image_id: RecordId, picture: bytes) -> bytes:
    """A line of a `*_imgs.tsv`, line end included, for the bytes of a picture file."""
    return id_key(image_id) + b"\t" + base64.b64encode(picture) + b"\n"


def text_line(text_id: RecordId, text: str, image_ids: list[RecordId]) -> str:
    """A line of a `*_texts.jsonl`, line end included."""
    return json.dumps({"text_id": text_id, "text": text, "image_ids": image_ids}, ensure_ascii=False) + "\n"


def digest_of(values: Iterable[object]) -> str:
    """A digest of the `repr` of values in order."""
    digest = Digest()
    for value in values:
        digest.add(value)
    return digest.text


class Digest:
    """What `digest_of` gives of values that come one after the other."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=8)

    def add(self, value: object) -> None:
        """Takes the next value."""
        self._hash.update(repr(value).encode("utf-8", "surrogatepass") + b"\n")

    @property
    def text(self) -> str:
        """Of all values so far."""
        return self._hash.hexdigest()

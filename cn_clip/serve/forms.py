"""Between what clients write and what the service computes: inputs to texts and pictures, rows to an answer's numbers.

Every dialect of a client comes through here; there is one way to a vector.
"""

# N inputs, D embedding

import base64
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias
from urllib.parse import quote

import numpy as np
import orjson
from numpy.typing import NDArray

from cn_clip.clip.backends.base import Rows
from cn_clip.clip.pictures import holds_picture
from cn_clip.serve.limits import MAX_TEXT_CHARS
from cn_clip.serve.runner import Picture, Text
from cn_clip.serve.schemas import EXPECTED_INPUT, EmbeddingRequest, Item, Part, RefusalError, VectorForm
from cn_clip.serve.token_table import TokenTable

# A vector in an answer.
Written: TypeAlias = str | NDArray[Any]
# What becomes one vector: more than one part are mixed evenly.
Parts: TypeAlias = list[Text | Picture]

# --- inputs


def embedding_inputs(request: EmbeddingRequest, table: TokenTable | None = None) -> list[Parts]:
    """What each vector is made of; raises RefusalError (400) for an input that holds nothing.

    table: by which lists of token ids become text; without one they are refused.
    """
    if (request.input is None) == (request.messages is None):
        message = "expected one of input and messages" if request.input is not None else EXPECTED_INPUT
        raise RefusalError(400, f"input: {message}", param="input", code="invalid_value")
    if request.messages is not None:
        said = [
            part
            for position, one in enumerate(request.messages)
            if one.role == "user"
            for part in _parts(one, f"messages[{position}]")
        ]
        return [_filled(said, "messages")]
    are_pictures = request.modality == "image"
    return [
        [_text_of(one, table, param)] if isinstance(one, list) else parts_of(one, param, are_pictures=are_pictures)
        for param, one in request.inputs.items()
    ]


def _text_of(token_ids: list[int], table: TokenTable | None, param: str) -> Text:
    if table is None:
        raise RefusalError(400, f"{param}: {EXPECTED_INPUT}", param=param, code="invalid_value")
    try:
        text = table.text(token_ids)
    except KeyError as error:
        message = f"{param}: the token id {error} is not in the table of --token-table"
        raise RefusalError(400, message, param=param, code="invalid_value") from error
    if len(text) > MAX_TEXT_CHARS:
        message = f"{param}: expected a text of at most {MAX_TEXT_CHARS} characters, got {len(text)}"
        raise RefusalError(400, message, param=param, code="invalid_value")
    return Text(text)


def parts_of(given: str | Item, param: str, *, are_pictures: bool = False) -> Parts:
    """The texts and pictures of one input; raises RefusalError (400) naming `param` when there are none.

    are_pictures: strings are no words, also those that do not begin as a picture does.
    """
    if not isinstance(given, str):
        return _filled(_parts(given, param), param)
    if are_pictures or holds_picture(given):
        return [Picture(given, param)]
    return [Text(given)]


def _filled(parts: Parts, param: str) -> Parts:
    if not parts:
        raise RefusalError(400, f"{param}: expected a text or a picture", param=param, code="invalid_value")
    return parts


def _parts(given: Part, param: str) -> Parts:
    """The fields in turn, without empty texts: vLLM's clients send one beside a picture."""
    pictures = {"image": given.image, "image_url": given.image_url, "image_base64": given.image_base64}
    found: Parts = [Text(given.text)] if given.text else []
    found += [Picture(picture, f"{param}.{field}") for field, picture in pictures.items() if picture is not None]
    content = given.content if isinstance(given, Item) else None
    if isinstance(content, str):
        return [*found, *([Text(content)] if content else [])]
    for position, part in enumerate(content or ()):
        found += _parts(part, f"{param}.content[{position}]")
    return found


# --- what was passed over

IGNORED_HEADER = "x-ignored-fields"
# Names that are told, and characters of each.
_MOST_NAMES, _MOST_CHARS = 32, 80


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """The header that names the fields of a request which were not looked at; none without any."""
    # An empty name as two quotes: a header that ended in a blank would not be sent.
    told = [quote(name[:_MOST_CHARS], errors="replace") or '""' for name in list(names)[:_MOST_NAMES]]
    return {IGNORED_HEADER: ", ".join(told)} if told else {}


# --- vectors

_INT8 = 127


def _int8(rows_ND: Rows) -> Rows:
    """Whole numbers from -127 to 127: each row over its largest entry, which keeps cosines, not lengths."""
    largest_N1 = np.maximum(np.abs(rows_ND).max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    rounded_ND: Rows = np.rint(rows_ND / largest_N1 * _INT8)
    return rounded_ND


def _bits(rows_ND: Rows) -> Any:
    """Whether each entry is above 0, eight to a byte, the first in the highest bit."""
    return np.packbits(rows_ND > 0, axis=1)


_WRITERS: Mapping[VectorForm, Callable[[Rows], Any]] = {
    # As the number that it is in float64, as other programs read it: 0.1 as 0.10000000149011612.
    "float": lambda rows_ND: rows_ND.astype(np.float64),
    "base64": lambda rows_ND: [base64.b64encode(row_D.tobytes()).decode() for row_D in rows_ND.astype("<f4")],
    "int8": lambda rows_ND: _int8(rows_ND).astype(np.int8),
    "uint8": lambda rows_ND: (_int8(rows_ND) + 128).astype(np.uint8),
    "binary": lambda rows_ND: _bits(rows_ND).astype(np.int16) - 128,
    "ubinary": lambda rows_ND: _bits(rows_ND),
}


def written(rows_ND: Rows, form: VectorForm) -> list[Written]:
    """The rows for `as_json`. base64: little-endian float32. binary: `ubinary` less 128, as Cohere and Jina have it.

    The row [0.6, -0.8] is [95, -127] as int8, [223, 1] as uint8, [128] as ubinary and [0] as binary.
    """
    return list(_WRITERS[form](rows_ND))


def as_json(answer: dict[str, Any] | list[Written]) -> bytes:
    """An answer that may hold what `written` gives."""
    return orjson.dumps(answer, default=_row_as_json)


def _row_as_json(row_D: Any) -> orjson.Fragment:
    # Row by row: other threads get a turn between two.
    return orjson.Fragment(orjson.dumps(row_D, option=orjson.OPT_SERIALIZE_NUMPY))

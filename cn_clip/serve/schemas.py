"""Requests and answers: how JSON bodies with pictures are read, what they hold, and errors in OpenAI's form.

The OpenAPI document is made of these.
"""

import json
import secrets
from collections.abc import Callable, Coroutine, Sequence
from typing import Annotated, Any, Literal, TypeAlias

from fastapi import Request, Response
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from cn_clip.clip.pictures import holds_picture, is_data_url
from cn_clip.serve.limits import (
    MAX_INPUTS,
    MAX_K,
    MAX_LABELS,
    MAX_NAME_CHARS,
    MAX_OFFSET,
    MAX_PARTS,
    MAX_TEMPLATES,
    MAX_TEXT_CHARS,
    MAX_WEIGHT,
)

# --- errors

# Characters of a message, and of what it shows of a request.
_MOST_CHARS = 1000
_SHOWN_CHARS = 80


class RefusalError(Exception):
    """An answer with an HTTP status of 400 or more.

    param: the field of the request that is at fault. retry_after: seconds after which to ask again.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after: int = 0
    ) -> None:
        message, param = message[:_MOST_CHARS], param and param[:_SHOWN_CHARS]
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.retry_after = status, message, param, code, retry_after

    def response(self) -> JSONResponse:
        """The answer."""
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return JSONResponse({"error": error}, self.status, headers)


def shown(value: object) -> str:
    """What a request named, as a message may repeat it."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


def stopping() -> RefusalError:
    """What is asked while the server ends."""
    return RefusalError(503, "the server is stopping", code="stopping", retry_after=5)


def queue_full(what: str, limit: int) -> RefusalError:
    """503: as many of `what` as admitted are waiting."""
    return RefusalError(503, f"the queue of {limit} {what} is full; ask again later", code="queue_full", retry_after=1)


# --- JSON bodies

# Strings that begin so, and of at least so many bytes, are cut out; of a body no more than so many are looked at.
_BEGIN, _LONG, _MOST = b'"data:', 1 << 16, 256


def loads(body: bytes) -> Any:
    """What `json.loads` gives; raises what it raises, but lets control characters in long data URLs pass.

    Long data URLs are cut out first, so that it reads the rest: `{"image": "data:…"}` becomes `{"image": "TOKEN 0"}`.
    What is cut out lies between two quotes and holds neither quote nor backslash, so the rest is JSON if the whole is.
    """
    if len(body) < _LONG:
        return json.loads(body)
    whole, pieces, strings, position, end = memoryview(body), list[bytes | memoryview](), dict[str, str](), 0, 0
    token = secrets.token_hex(16)
    for _ in range(_MOST):
        quote = body.find(_BEGIN, end)
        end = body.find(b'"', quote + 1)
        if quote < 0 or end < 0:
            break
        if end - quote < _LONG or body.find(b"\\", quote, end) >= 0:
            continue
        try:
            string = str(whole[quote + 1 : end], "ascii")
        except UnicodeDecodeError:
            continue
        name = f"{token} {len(strings)}"
        strings[name] = string
        pieces += [whole[position : quote + 1], name.encode()]
        position = end
    if not strings:
        return json.loads(body)
    return _put_back(json.loads(b"".join([*pieces, whole[position:]])), strings)


def _put_back(value: Any, strings: dict[str, str]) -> Any:
    """The value with the strings put back where they were; never deeper than `json.loads` goes."""
    if isinstance(value, str):
        return strings.get(value, value)
    if isinstance(value, list):
        return [_put_back(one, strings) for one in value]
    if isinstance(value, dict):
        return {strings.get(name, name): _put_back(one, strings) for name, one in value.items()}
    return value


class _JsonRequest(Request):
    async def body(self) -> bytes:
        if not hasattr(self, "_body"):
            # One piece, as the gate hands it on, is not copied.
            self._body = b"".join([piece async for piece in self.stream() if piece])
        return self._body

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            self._json = loads(await self.body())
        return self._json


class JsonRoute(APIRoute):
    """A route whose JSON body is read by `loads`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """That of the route, for which the body is read so."""
        handle = super().get_route_handler()

        async def answer(request: Request) -> Response:
            return await handle(_JsonRequest(request.scope, request.receive))

        return answer


# --- requests and answers


def _words(value: Any) -> Any:
    if isinstance(value, str) and is_data_url(value):
        raise PydanticCustomError("picture", 'expected words, got a picture as a data URL; send it as {"image": …}')
    return value


Text: TypeAlias = Annotated[
    str,
    Field(min_length=1, max_length=MAX_TEXT_CHARS, json_schema_extra={"not": {"pattern": "^data:image/"}}),
    BeforeValidator(_words),
]
Name: TypeAlias = Annotated[str, Field(max_length=MAX_NAME_CHARS)]
Template: TypeAlias = Annotated[str, Field(pattern=r"^[^{}]*\{\}[^{}]*$", max_length=MAX_TEXT_CHARS)]
DataUrl: TypeAlias = Annotated[
    str,
    Field(description="The picture itself as data:image/png;base64,… in any format that the commands read, no address"),
]
# Strings would do as numbers otherwise, and true as 1.
Number: TypeAlias = Annotated[float, Field(strict=True, allow_inf_nan=False)]
# How the numbers of a vector are written; see `forms`.
VectorForm: TypeAlias = Literal["float", "base64", "int8", "uint8", "binary", "ubinary"]
ItemId: TypeAlias = Annotated[int, Field(strict=True)] | Annotated[str, Field(max_length=MAX_TEXT_CHARS)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class OpenRequest(BaseModel):
    """A request whose unknown fields are kept, so that the answer can name them."""

    model_config = ConfigDict(extra="allow")

    @property
    def ignored(self) -> list[str]:
        """The names of the fields that were not looked at."""
        return list(self.model_extra or ())


def _address(value: Any) -> Any:
    return value["url"] if isinstance(value, dict) and set(value) >= {"url"} else value


_PICTURE_SCHEMA = {
    "description": "The picture itself, as data:image/png;base64,… or as base64 alone; no address",
    "anyOf": [
        {"type": "string"},
        {"type": "object", "properties": {"url": {"type": "string"}}, "required": ["url"]},
    ],
}
PartText: TypeAlias = Annotated[str, Field(max_length=MAX_TEXT_CHARS), BeforeValidator(_words)]
PartPicture: TypeAlias = Annotated[str, BeforeValidator(_address), WithJsonSchema(_PICTURE_SCHEMA)]


class Part(BaseModel):
    """A text or a picture, as clients write one: {"image": …}, or OpenAI's {"type": "image_url", "image_url": …}.

    Fields that are not named here, `type` and `detail` among them, are passed over.
    """

    text: PartText | None = None
    image: PartPicture | None = None
    image_url: PartPicture | None = None
    image_base64: PartPicture | None = None


class Item(Part):
    """One input as an object. Several parts become one vector, that of their even mixture."""

    content: PartText | Annotated[list[Part], Field(max_length=MAX_PARTS, fail_fast=True)] | None = None


class Message(Item):
    """One of a chat, as vLLM takes them; only those of the user are looked at."""

    role: Name = "user"


# Tags stand in the paths of errors, where brackets tell them from names of fields.
TAG_MARK = "<"


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "<url>" if holds_picture(value) else "<text>"
    if isinstance(value, (dict, BaseModel)):
        return "<picture>"
    if isinstance(value, list):
        return "<tokens>" if value and type(value[0]) is int else "<many>"
    return None


def invalid_field(path: Sequence[int | str], message: str) -> RefusalError:
    """400: a field is faulty, whose path is written as `input[3].image`; tags are left out."""
    names = [one for one in path if not str(one).startswith(TAG_MARK)]
    param = "".join(f"[{one}]" if isinstance(one, int) else f".{str(one)[:80]}" for one in names).lstrip(".")
    return RefusalError(400, f"{param}: {message}", param=param, code="invalid_value")


EXPECTED_INPUT = (
    'expected a string, {"text": …}, {"image": "data:image/png;base64,…"}, or a list of them; lists of token ids are '
    "not understood (in LangChain: check_embedding_ctx_length=False; or start the server with --token-table)"
)
_error: dict[str, Any] = {"custom_error_type": "input", "custom_error_message": EXPECTED_INPUT}
_TextInput: TypeAlias = Annotated[Text, Tag("<text>")]
_ItemInput: TypeAlias = Annotated[Item, Tag("<picture>")]
# Only said, not checked again: `_kind` has looked, and takes capitals too.
_UrlInput: TypeAlias = Annotated[DataUrl, Field(json_schema_extra={"pattern": "^data:image/"}), Tag("<url>")]
Input: TypeAlias = Annotated[_TextInput | _UrlInput | _ItemInput, Discriminator(_kind, **_error)]
Inputs: TypeAlias = Annotated[list[Input], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]
# The ids of OpenAI's tokenizer, which a table of the server turns into text.
_TokenIds: TypeAlias = Annotated[
    list[Annotated[int, Field(strict=True, ge=0)]], Field(min_length=1, fail_fast=True), Tag("<tokens>")
]
_WordsOrTokens: TypeAlias = Annotated[_TextInput | _UrlInput | _ItemInput | _TokenIds, Discriminator(_kind, **_error)]
_ManyInputs: TypeAlias = Annotated[
    list[_WordsOrTokens], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True), Tag("<many>")
]


class EmbeddingRequest(OpenRequest):
    """`/v1/embeddings`, as OpenAI's clients send it, and with pictures as those of vLLM, infinity and Jina do.

    Fields that are not named here are passed over, and named in the header x-ignored-fields of the answer.
    """

    model: Name
    input: (
        Annotated[_TextInput | _UrlInput | _ItemInput | _TokenIds | _ManyInputs, Discriminator(_kind, **_error)] | None
    ) = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True)] | None = Field(
        None, description="In place of input: one vector of what the user says and shows, as vLLM has it"
    )
    modality: Literal["text", "image"] | None = Field(None, description="image: strings are pictures, as infinity's")
    encoding_format: Literal["float", "base64"] | None = Field(None, description="null: float")
    embedding_type: VectorForm | None = Field(None, description="In place of encoding_format, as Jina's")
    dimensions: Annotated[int, Field(strict=True, ge=0)] | None = Field(
        None, description="Only the number that the model has; 0 and null: that number"
    )
    normalized: bool | None = Field(None, description="Vectors always have length 1; false is passed over")
    user: Name | None = Field(None, description="Not looked at")

    @property
    def inputs(self) -> dict[str, str | Item | list[int]]:
        """Each input by where it is in the request."""
        given = self.input
        if not isinstance(given, list):
            return {} if given is None else {"input": given}
        if token_ids := [one for one in given if isinstance(one, int)]:
            return {"input": token_ids}
        return {f"input[{position}]": one for position, one in enumerate(given) if not isinstance(one, int)}

    @property
    def ignored(self) -> list[str]:
        """The names of the fields that were not looked at, and of `normalized` when it was not obeyed."""
        return [*super().ignored, *(["normalized"] if self.normalized is False else [])]


class Embedding(BaseModel):
    """One vector: a list of numbers, or base64 of little-endian float32; whole numbers for forms other than float."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Usage(BaseModel):
    """Tokens of the texts, [CLS] and [SEP] included, cut to the model's length; pictures count none."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    """Unit vectors in the order of the inputs."""

    object: Literal["list"] = "list"
    model: str
    data: list[Embedding]
    usage: Usage


class ClassifyRequest(_Strict):
    """`/v1/classify`: one picture, and labels or the name of a set of labels that the server has."""

    model: Name | None = None
    image: DataUrl | None = None
    id: Annotated[ItemId | None, Field(description="In place of image: an item of the index, by its vector")] = None
    index: Annotated[Name | None, Field(description="The index that has the item; default: the first")] = None
    labels: Annotated[list[Text], Field(min_length=1, max_length=MAX_LABELS, fail_fast=True)] | None = None
    label_set: Name | None = None
    templates: Annotated[list[Template], Field(min_length=1, max_length=MAX_TEMPLATES, fail_fast=True)] | None = Field(
        None, description="Prompts with {} for the label; default: the general ones of `cn-clip zeroshot`"
    )


class ClassScore(BaseModel):
    """index: place among the labels. probability: softmax of scale times cosine over the labels."""

    index: int
    label: str
    probability: float
    cosine: float


class ClassifyResponse(BaseModel):
    """The labels, the most probable first."""

    object: Literal["classification"] = "classification"
    model: str
    scale: float
    data: list[ClassScore]


class QueryPart(_Strict):
    """One of text, image and id, and its weight."""

    text: Text | None = None
    image: DataUrl | None = None
    id: Annotated[ItemId | None, Field(description="An item of the index: its stored vector")] = None
    weight: Annotated[Number, Field(ge=-MAX_WEIGHT, le=MAX_WEIGHT)] = 1.0


_QUERY_ERROR: dict[str, Any] = {
    "custom_error_type": "query",
    "custom_error_message": 'expected a string, {"text"|"image"|"id": …, "weight": 1}, or a list of such objects',
}
_TextQuery: TypeAlias = Annotated[Text, Tag("<text>")]
_PartQuery: TypeAlias = Annotated[QueryPart, Tag("<picture>")]
_ManyQuery: TypeAlias = Annotated[
    list[QueryPart], Field(min_length=1, max_length=MAX_PARTS, fail_fast=True), Tag("<many>")
]


class SearchRequest(_Strict):
    """`/v1/search`: the nearest items of the index to a text, a picture, an item, or a weighted mixture of them."""

    model: Name | None = None
    index: Annotated[Name | None, Field(description="Which of the indexes in /v1/index; default: the first")] = None
    query: Annotated[_TextQuery | _UrlInput | _PartQuery | _ManyQuery, Discriminator(_kind, **_QUERY_ERROR)]
    k: Annotated[int, Field(strict=True, ge=1, le=MAX_K)] = 10
    offset: Annotated[int, Field(strict=True, ge=0, le=MAX_OFFSET)] = 0
    min_score: Annotated[Number, Field(ge=-1, le=1)] | None = None
    where: Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS)] | None = Field(
        None, description="A condition on items, such as (group=动物 or path~旅行) date>=2021-05"
    )
    words: Annotated[
        bool,
        Field(
            strict=True,
            description="Of a text alone: look for it in the words of the pictures, too, if these are known",
        ),
    ] = True
    metadata: Annotated[
        Literal["shown", "all"],
        Field(description="all: with source, path, size, mtime_ns and digest too, on a server that gives originals"),
    ] = "shown"

    @property
    def words_of_query(self) -> str | None:
        """A text that comes alone; None for any other query, and if words are not to be looked for."""
        first, *others = self.parts
        return first.text if self.words and not others and first.weight > 0 else None

    @property
    def parts(self) -> list[QueryPart]:
        """The query as weighted parts."""
        if isinstance(self.query, str):
            return [QueryPart(image=self.query) if holds_picture(self.query) else QueryPart(text=self.query)]
        return self.query if isinstance(self.query, list) else [self.query]


class ItemHit(BaseModel):
    """An item of an index.

    score: the cosine with the query; null where there is none. thumbnail, original: where to GET a small picture, and
    the file; null where there is none.
    """

    id: int | str
    score: float | None
    metadata: dict[str, Any]
    thumbnail: str | None
    original: str | None


class SearchResponse(BaseModel):
    """The best first."""

    object: Literal["list"] = "list"
    model: str
    index: str
    data: list[ItemHit]


class ItemList(BaseModel):
    """Items in an order; total: all that the condition admits."""

    object: Literal["list"] = "list"
    index: str
    total: int
    data: list[ItemHit]


class IndexCard(BaseModel):
    """An index. generation: rises with each change; null in Milvus. fields: what `where` may name."""

    name: str
    object: Literal["index"] = "index"
    model: str
    count: int
    generation: int | None
    fields: list[str]
    has_originals: bool
    has_thumbnails: bool
    orders: list[Literal["newest", "typical"]]


class IndexList(BaseModel):
    """The indexes that are open, the first of which requests mean that name none."""

    object: Literal["list"] = "list"
    data: list[IndexCard]


class ModelCard(BaseModel):
    """A model that is served. auto: why its backend and precision were taken, where nobody named them."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    embed_dim: int
    resolution: int
    context_length: int
    backend: str
    precision: str | None
    auto: str | None = None


class ModelList(BaseModel):
    """All that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Error(BaseModel):
    """message says what was expected; param names the field at fault."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """OpenAI's form of an error."""

    error: Error


STATUSES = (400, 401, 403, 404, 408, 413, 429, 431, 500, 503, 504)
ERRORS: dict[int | str, dict[str, Any]] = {status: {"model": ErrorResponse} for status in STATUSES}

"""What requests and answers look like; the OpenAPI document is made of these."""

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from cn_clip.clip.pictures import is_data_url
from cn_clip.serve.limits import (
    MAX_INPUTS,
    MAX_K,
    MAX_LABELS,
    MAX_NAME_CHARS,
    MAX_PARTS,
    MAX_TEMPLATES,
    MAX_TEXT_CHARS,
    MAX_WEIGHT,
)


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
    str, Field(description="The picture itself as data:image/png;base64,… (JPEG, PNG, WebP, GIF or BMP), no address")
]
# Strings would do as numbers otherwise, and true as 1.
Number: TypeAlias = Annotated[float, Field(strict=True, allow_inf_nan=False)]
ItemId: TypeAlias = Annotated[int, Field(strict=True)] | Annotated[str, Field(max_length=MAX_TEXT_CHARS)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ImageInput(_Strict):
    """A picture."""

    image: DataUrl


# Tags stand in the places of errors, where brackets tell them from names of fields.
TAG_MARK = "<"


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "<url>" if is_data_url(value) else "<text>"
    if isinstance(value, (dict, ImageInput)):
        return "<picture>"
    return "<many>" if isinstance(value, list) else None


EXPECTED_INPUT = (
    'expected a string, {"image": "data:image/png;base64,…"}, or a list of them; lists of token ids are not understood '
    "(in LangChain: check_embedding_ctx_length=False)"
)
_error: dict[str, Any] = {"custom_error_type": "input", "custom_error_message": EXPECTED_INPUT}
_TextInput: TypeAlias = Annotated[Text, Tag("<text>")]
_PictureInput: TypeAlias = Annotated[ImageInput, Tag("<picture>")]
# Only said, not checked again: `_kind` has looked, and takes capitals too.
_UrlInput: TypeAlias = Annotated[DataUrl, Field(json_schema_extra={"pattern": "^data:image/"}), Tag("<url>")]
Input: TypeAlias = Annotated[_TextInput | _UrlInput | _PictureInput, Discriminator(_kind, **_error)]
Inputs: TypeAlias = Annotated[list[Input], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)]


class EmbeddingRequest(_Strict):
    """`/v1/embeddings`, as OpenAI's clients send it, and with pictures."""

    model: Name
    input: Annotated[
        _TextInput | _UrlInput | _PictureInput | Annotated[Inputs, Tag("<many>")], Discriminator(_kind, **_error)
    ]
    encoding_format: Literal["float", "base64"] | None = Field(None, description="null: float")
    dimensions: Annotated[int, Field(strict=True, ge=1)] | None = Field(
        None, description="Only the number that the model has"
    )
    user: Name | None = Field(None, description="Not looked at")

    @property
    def inputs(self) -> list[str | ImageInput]:
        """The inputs as a list, also when one came alone."""
        return list(self.input) if isinstance(self.input, list) else [self.input]


class Embedding(BaseModel):
    """One vector: a list of numbers, or base64 of little-endian float32."""

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
    image: DataUrl
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
    query: Annotated[_TextQuery | _UrlInput | _PartQuery | _ManyQuery, Discriminator(_kind, **_QUERY_ERROR)]
    k: Annotated[int, Field(strict=True, ge=1, le=MAX_K)] = 10
    min_score: Annotated[Number, Field(ge=-1, le=1)] | None = None
    where: Annotated[str, Field(min_length=1, max_length=MAX_TEXT_CHARS)] | None = Field(
        None, description="A condition on metadata, such as group=动物 year>=2020"
    )

    @property
    def parts(self) -> list[QueryPart]:
        """The query as weighted parts."""
        if isinstance(self.query, str):
            return [QueryPart(image=self.query) if is_data_url(self.query) else QueryPart(text=self.query)]
        return self.query if isinstance(self.query, list) else [self.query]


class SearchHit(BaseModel):
    """score: the cosine with the query. thumbnail: where to GET a small picture; null where there is none."""

    id: int | str
    score: float
    metadata: dict[str, Any]
    thumbnail: str | None


class SearchResponse(BaseModel):
    """The best first."""

    object: Literal["list"] = "list"
    model: str
    data: list[SearchHit]


class ModelCard(BaseModel):
    """The model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str
    embed_dim: int
    resolution: int
    context_length: int


class ModelList(BaseModel):
    """The one model."""

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

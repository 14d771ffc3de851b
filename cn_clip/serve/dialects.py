"""Routes to vectors, as OpenAI's clients ask for them, and those of infinity, Cohere and Jina; and rerank.

A dialect is a translation: of its request into what is embedded, and of the rows into its answer.
"""

# N inputs, D embedding

import json
import time
import uuid
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Response
from pydantic import BaseModel, Field
from starlette.types import Scope

from cn_clip.clip.backends.base import Rows
from cn_clip.serve.forms import as_json, embedding_inputs, ignored_header, parts_of, written
from cn_clip.serve.gate import Shortcut
from cn_clip.serve.limits import MAX_INPUTS
from cn_clip.serve.runner import Picture, Runner, Text
from cn_clip.serve.schemas import (
    ERRORS,
    EmbeddingRequest,
    EmbeddingResponse,
    Input,
    Inputs,
    Item,
    Name,
    OpenRequest,
    PartPicture,
    RefusalError,
    Usage,
    VectorForm,
)
from cn_clip.serve.schemas import Text as TextField
from cn_clip.serve.service import Service

# Numbers; so few are written on the event loop, in half a millisecond: a thread and back would take longer.
SMALL_ANSWER = 16 << 10
# Bytes of a body; so many are read without the route.
SHORT_BODY = 64 << 10
# What infinity's clients call the model unless told of one.
ANY_MODEL = "default/not-specified"


def add_routes(app: FastAPI, service: Service) -> None:
    """Adds the routes of this module."""
    _add_embeddings(app, service)
    _add_infinity(app, service)
    _add_cohere(app, service)
    _add_rerank(app, service)


async def _json(service: Service, ignored: list[str], num_numbers: int, body: Callable[[], dict[str, Any]]) -> Response:
    """The answer. Not by FastAPI: thousands of numbers must neither be checked nor hold up the event loop."""

    def encoded() -> bytes:
        return as_json(body())

    content = encoded() if num_numbers <= SMALL_ANSWER else await service.runner.call(encoded)
    return Response(content, media_type="application/json", headers=ignored_header(ignored))


# --- OpenAI's form


def _add_embeddings(app: FastAPI, service: Service) -> None:
    @app.post("/v1/embeddings", response_model=EmbeddingResponse, responses=ERRORS)
    async def embeddings(request: EmbeddingRequest) -> Response:
        """Unit vectors of texts and pictures."""
        return await embedding_list(service, request, request.model)


async def embedding_list(service: Service, request: EmbeddingRequest, model: str | None) -> Response:
    """The vectors in OpenAI's form."""
    inputs = embedding_inputs(request, service.token_table)
    rows_ND, num_tokens = await service.embed(inputs, model=model, dimensions=request.dimensions)
    form = request.embedding_type or request.encoding_format or "float"

    def body() -> dict[str, Any]:
        data = [
            {"object": "embedding", "index": position, "embedding": vector}
            for position, vector in enumerate(written(rows_ND, form))
        ]
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        return {"object": "list", "model": service.runner_of(model).name, "data": data, "usage": usage}

    return await _json(service, request.ignored, rows_ND.size, body)


def shortcuts(service: Service) -> dict[str, Shortcut]:
    """What answers the paths to vectors in OpenAI's form, for the gate; anything unusual is left to the routes."""

    def shortcut(kind: type[EmbeddingRequest], model_of: Callable[[str | None], str | None]) -> Shortcut:
        async def answer(scope: Scope, body: bytes) -> Response | None:
            is_json = [value for name, value in scope["headers"] if name == b"content-type"] == [b"application/json"]
            if not is_json or len(body) > SHORT_BODY:
                return None
            try:
                request = kind.model_validate(json.loads(body))
            except (ValueError, RecursionError):
                return None  # the route says what is wrong
            return await embedding_list(service, request, model_of(request.model))

        return answer

    return {
        "/v1/embeddings": shortcut(EmbeddingRequest, lambda name: name),
        "/embeddings": shortcut(InfinityRequest, _named),
    }


# --- infinity


class InfinityRequest(EmbeddingRequest):
    """`/embeddings` of infinity: as `/v1/embeddings`, and the model may be left out."""

    model: Name = ANY_MODEL


class InfinityModel(BaseModel):
    """The model that is served. stats: how much is waiting, of how much."""

    id: str
    object: Literal["model"] = "model"
    owned_by: Literal["infinity"] = "infinity"
    created: int = 0
    backend: str
    capabilities: list[str] = Field(default_factory=lambda: ["embed", "image_embed", "rerank"])
    stats: dict[str, float]


class InfinityModels(BaseModel):
    """The models."""

    object: Literal["list"] = "list"
    data: list[InfinityModel]


def _add_infinity(app: FastAPI, service: Service) -> None:
    @app.post("/embeddings", response_model=EmbeddingResponse, responses=ERRORS)
    async def infinity_embeddings(request: InfinityRequest) -> Response:
        """Unit vectors, at infinity's path."""
        return await embedding_list(service, request, _named(request.model))

    @app.get("/models", responses=ERRORS)
    async def infinity_models() -> InfinityModels:
        """The models, as infinity tells them."""
        service.runner.check_ready()
        return InfinityModels(data=[_infinity_model(service, runner) for runner in service.runners])

    @app.get("/health", responses=ERRORS)
    async def infinity_health() -> dict[str, float]:
        """The time, while what is asked is being answered."""
        service.runner.check_moving()
        return {"unix": time.time()}


def _infinity_model(service: Service, runner: Runner) -> InfinityModel:
    waiting, most = runner.num_waiting, service.limits.slots + service.limits.text_slots
    stats = {
        "queue_fraction": waiting / most,
        "queue_absolute": waiting,
        "results_pending": waiting,
        "batch_size": service.limits.max_batch,
    }
    return InfinityModel(id=runner.name, backend="cn_clip", stats=stats)


def _named(model: str | None) -> str | None:
    return None if model == ANY_MODEL else model


# --- Cohere


class CohereRequest(OpenRequest):
    """`/v2/embed` of Cohere: one of texts, images and inputs."""

    model: Name
    texts: Annotated[list[TextField], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)] | None = None
    images: Annotated[list[PartPicture], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)] | None = None
    inputs: Annotated[list[Item], Field(min_length=1, max_length=MAX_INPUTS, fail_fast=True)] | None = None
    input_type: Name | None = Field(None, description="Not looked at: the models know one kind of text")
    embedding_types: Annotated[list[VectorForm], Field(max_length=6)] | None = None
    output_dimension: Annotated[int, Field(strict=True, ge=1)] | None = Field(
        None, description="Only the number that the model has"
    )
    truncate: Literal["NONE", "START", "END"] | None = Field(
        None, description="The end of a long text is cut off; others are passed over"
    )

    @property
    def ignored(self) -> list[str]:
        """The names of the fields that were not looked at, and of `truncate` when it was not obeyed."""
        return [*super().ignored, *(["truncate"] if self.truncate not in (None, "END") else [])]


class CohereMeta(BaseModel):
    """What the request would be billed by, and the version of the interface."""

    api_version: dict[str, str]
    billed_units: dict[str, int]


class CohereResponse(BaseModel):
    """The vectors by the form of their numbers; of `/v1/embed` without embedding_types, a bare list."""

    id: str
    embeddings: dict[VectorForm, list[list[float] | str]] | list[list[float]]
    texts: list[str]
    response_type: Literal["embeddings_by_type", "embeddings_floats"]
    meta: CohereMeta


def _add_cohere(app: FastAPI, service: Service) -> None:
    @app.post("/v2/embed", response_model=CohereResponse, responses=ERRORS)
    async def cohere_embed(request: CohereRequest) -> Response:
        """Unit vectors, as Cohere's clients ask for them."""
        return await _cohere_answer(service, request, "2")

    @app.post("/v1/embed", response_model=CohereResponse, responses=ERRORS)
    async def cohere_embed_v1(request: CohereRequest) -> Response:
        """Unit vectors, as Cohere's older clients ask for them."""
        return await _cohere_answer(service, request, "1")


async def _cohere_answer(service: Service, request: CohereRequest, version: str) -> Response:
    given: Mapping[str, Any] = {"texts": request.texts, "images": request.images, "inputs": request.inputs}
    chosen = [(field, values) for field, values in given.items() if values is not None]
    if len(chosen) != 1:
        message = "texts: expected one of texts, images and inputs"
        raise RefusalError(400, message, param="texts", code="invalid_value")
    ((field, values),) = chosen
    inputs = [
        parts_of(one, f"{field}[{position}]", are_pictures=field == "images") for position, one in enumerate(values)
    ]
    rows_ND, num_tokens = await service.embed(
        inputs, model=request.model, dimensions=request.output_dimension, field=field
    )
    is_bare = version == "1" and not request.embedding_types
    kinds: list[VectorForm] = request.embedding_types or ["float"]
    num_pictures = sum(isinstance(part, Picture) for parts in inputs for part in parts)

    def body() -> dict[str, Any]:
        return {
            "id": str(uuid.uuid4()),
            "embeddings": written(rows_ND, "float") if is_bare else {kind: written(rows_ND, kind) for kind in kinds},
            "texts": request.texts or [],
            "response_type": "embeddings_floats" if is_bare else "embeddings_by_type",
            "meta": _meta(version, input_tokens=num_tokens, images=num_pictures).model_dump(),
        }

    return await _json(service, request.ignored, rows_ND.size * len(kinds), body)


def _meta(version: str, **units: int) -> CohereMeta:
    return CohereMeta(api_version={"version": version}, billed_units=units)


# --- rerank


class RerankRequest(OpenRequest):
    """`/rerank` of Cohere, Jina and infinity; query and documents may be pictures too."""

    model: Name = ANY_MODEL
    query: Input
    documents: Inputs
    top_n: Annotated[int, Field(strict=True, ge=1)] | None = Field(None, description="So many of the best; null: all")
    return_documents: bool = Field(False, description="Send texts back beside their scores; pictures are not sent back")
    raw_scores: bool | None = Field(None, description="Not looked at: scores are cosines")


class RerankText(BaseModel):
    """A document."""

    text: str


class Ranked(BaseModel):
    """index: among the documents. relevance_score: the cosine with the query."""

    index: int
    relevance_score: float
    document: RerankText | str | None = None


class RerankResponse(BaseModel):
    """The best first."""

    id: str
    object: Literal["rerank"] = "rerank"
    created: int
    model: str
    results: list[Ranked]
    usage: Usage
    meta: CohereMeta


def _add_rerank(app: FastAPI, service: Service) -> None:
    @app.post("/rerank", responses=ERRORS, response_model_exclude_none=True)
    async def infinity_rerank(request: RerankRequest, response: Response) -> RerankResponse:
        """Documents by their cosine with the query, as infinity's clients ask; texts come back as strings."""
        return await _ranked(service, request, response, lambda text: text)

    @app.post("/v1/rerank", responses=ERRORS, response_model_exclude_none=True)
    async def rerank_v1(request: RerankRequest, response: Response) -> RerankResponse:
        """Documents by their cosine with the query, as Jina's clients ask, and Cohere's older ones."""
        return await _ranked(service, request, response, lambda text: RerankText(text=text))

    @app.post("/v2/rerank", responses=ERRORS, response_model_exclude_none=True)
    async def rerank_v2(request: RerankRequest, response: Response) -> RerankResponse:
        """Documents by their cosine with the query, as Cohere's clients ask."""
        return await _ranked(service, request, response, lambda text: RerankText(text=text))


async def _ranked(
    service: Service, request: RerankRequest, response: Response, sent_back: Callable[[str], RerankText | str]
) -> RerankResponse:
    """Scores (N,) are the cosines of /v1/search: what is 0.3 for one model is not for another."""
    documents = [parts_of(one, f"documents[{position}]") for position, one in enumerate(request.documents)]
    rows_ND, num_tokens = await service.embed(
        [parts_of(request.query, "query"), *documents], model=_named(request.model), field="documents"
    )
    scores_N: Rows = rows_ND[1:] @ rows_ND[0]
    order = sorted(range(len(documents)), key=lambda number: -scores_N[number])[: request.top_n]

    def document(number: int) -> RerankText | str | None:
        texts = [part.text for part in documents[number] if isinstance(part, Text)]
        return sent_back("\n".join(texts)) if request.return_documents and texts else None

    response.headers.update(ignored_header(request.ignored))
    return RerankResponse(
        id=str(uuid.uuid4()),
        created=int(time.time()),
        model=service.runner_of(_named(request.model)).name,
        results=[
            Ranked(index=number, relevance_score=float(scores_N[number]), document=document(number)) for number in order
        ],
        usage=Usage(prompt_tokens=num_tokens, total_tokens=num_tokens),
        meta=_meta("2", search_units=1),
    )

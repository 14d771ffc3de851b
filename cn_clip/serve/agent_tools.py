"""What agents may ask of the indexes: five tools over the service of the routes, each with bounded input and output.

`agent_server` speaks the Model Context Protocol for them. No tool opens a path or an address that a request names.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from cn_clip.clip.picture_names import begins_as_picture
from cn_clip.data.paths import readable
from cn_clip.serve.items import BOOKKEEPING, etag_of
from cn_clip.serve.limits import MAX_NAME_CHARS, MAX_OFFSET, MAX_TEXT_CHARS
from cn_clip.serve.schemas import (
    ClassifyRequest,
    DataUrl,
    ItemHit,
    ItemId,
    Number,
    QueryPart,
    RefusalError,
    SearchRequest,
    Text,
    invalid_field,
    shown,
)
from cn_clip.serve.service import Service, known_id
from cn_clip.terminal import shown as printable

logger = logging.getLogger(__name__)

# Results of one call, and labels: what an agent reads costs it much more than it costs a program.
MAX_RESULTS, MAX_LABELS = 50, 200
# Characters of one metadata value, its fields, and bytes of a small picture.
MAX_VALUE_CHARS, MAX_FIELDS, MAX_PICTURE_BYTES = 300, 40, 1 << 20

Index: TypeAlias = Annotated[
    str | None, Field(max_length=MAX_NAME_CHARS, description="Name of an index, see index_facts; default: the first")
]
Count: TypeAlias = Annotated[int, Field(strict=True, ge=1, le=MAX_RESULTS, description="Results")]
Where: TypeAlias = Annotated[
    str | None,
    Field(
        min_length=1,
        max_length=MAX_TEXT_CHARS,
        description="Condition on metadata, such as: date>=2021-05 and camera~Apple; index_facts names the fields",
    ),
]
Item: TypeAlias = Annotated[ItemId, Field(description="Id of an item, as search gives it")]
Offset: TypeAlias = Annotated[int, Field(strict=True, ge=0, le=MAX_OFFSET, description="Results to pass over")]


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid")

    index: Index = None


class Find(_Request):
    """Finds the pictures that best show what a text says, best first, with id, score (cosine) and metadata."""

    query: Annotated[Text, Field(description="What the pictures should show, in Chinese or English")]
    k: Count = 10
    offset: Offset = 0
    where: Where = None
    min_score: Annotated[Number, Field(ge=-1, le=1, description="Least cosine; 0.3 is a good match")] | None = None


class Alike(_Request):
    """Finds the pictures most like one of the index, perhaps with a text that changes what is sought."""

    id: Item
    text: Annotated[Text | None, Field(description="Mixed with the picture in equal parts, such as: at night")] = None
    k: Count = 10
    where: Where = None


class Show(_Request):
    """Shows an item as a small JPEG of at most 320 pixels a side."""

    id: Item


class Label(_Request):
    """Says how probable each label is for a picture: an item of the index, or a picture sent with the call."""

    id: Item | None = None
    image: DataUrl | None = None
    labels: Annotated[list[Text], Field(min_length=1, max_length=MAX_LABELS, description="Such as: 猫, 狗, 风景")]


class Look(BaseModel):
    """Says which indexes there are: their size, model, fields of metadata, and a few of their items."""

    model_config = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class Jpeg:
    """A picture as an answer."""

    data: bytes


Answer: TypeAlias = dict[str, Any] | Jpeg


@dataclass(frozen=True)
class Tool:
    """What an agent sees of a tool, and what answers it."""

    name: str
    request: type[BaseModel]
    answer: Callable[[Any], Awaitable[Answer]]

    @property
    def description(self) -> str:
        """One sentence."""
        return str(self.request.__doc__)


class AgentTools:
    """The tools of one service; its models need not be open yet, the first call waits for them."""

    def __init__(self, service: Service) -> None:
        """service: with originals, the paths of items are told."""
        self.service = service
        self.tools: Mapping[str, Tool] = {
            tool.name: tool
            for tool in (
                Tool("search", Find, self._search),
                Tool("similar", Alike, self._similar),
                Tool("thumbnail", Show, self._thumbnail),
                Tool("classify", Label, self._classify),
                Tool("index_facts", Look, self._facts),
            )
        }

    async def call(self, name: str, arguments: Mapping[str, Any] | None) -> Answer:
        """The answer of a tool; raises RefusalError alone, whose message is one line of printable text."""
        try:
            answer = await self._answer(name, arguments)
        except RefusalError as error:
            raise RefusalError(error.status, printable(error.message), param=error.param, code=error.code) from error
        return answer if isinstance(answer, Jpeg) else readable(answer)

    async def _answer(self, name: str, arguments: Mapping[str, Any] | None) -> Answer:
        tool = self.tools.get(name)
        if tool is None:
            raise RefusalError(404, f"there is no tool {shown(name)}, only {', '.join(self.tools)}")
        try:
            request = tool.request.model_validate(dict(arguments or {}))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise invalid_field(first["loc"] or ("arguments",), first["msg"]) from error
        try:
            for runner in self.service.runners:
                await runner.opened.wait()
            return await asyncio.wait_for(tool.answer(request), self.service.limits.timeout)
        except RefusalError:
            raise
        except asyncio.TimeoutError as error:
            message = f"{name} took longer than {self.service.limits.timeout:g} seconds; ask for less"
            raise RefusalError(503, message) from error
        except Exception as error:
            logger.exception("the tool %s failed", name)
            message = f"{name} failed ({type(error).__name__}); what the server writes to stderr tells why"
            raise RefusalError(500, message) from error

    async def _search(self, asked: Find) -> Answer:
        return await self._found(
            SearchRequest(
                index=asked.index,
                query=QueryPart(text=asked.query),
                k=asked.k,
                offset=asked.offset,
                where=asked.where,
                min_score=asked.min_score,
                metadata=self._metadata,
            ),
            asked.k,
        )

    async def _similar(self, asked: Alike) -> Answer:
        parts = [QueryPart(id=asked.id), *([QueryPart(text=asked.text)] if asked.text is not None else [])]
        # One more, for the item itself is the nearest of all.
        request = SearchRequest(
            index=asked.index,
            query=parts,
            k=asked.k + 1,
            where=asked.where,
            metadata=self._metadata,
        )
        opened = self.service.opened(asked.index)
        own = readable(await self.service.ask_index(opened, known_id, opened.index, asked.id))
        return await self._found(request, asked.k, without=own)

    async def _found(self, request: SearchRequest, k: int, *, without: object = None) -> Answer:
        opened, hits = await self.service.search(request)
        kept = [hit for hit in hits if hit.id != without][:k]
        return {"index": opened.name, "model": opened.runner.name, "results": [self._told(hit) for hit in kept]}

    async def _thumbnail(self, asked: Show) -> Answer:
        data = await self.service.thumbnail(str(asked.id), asked.index)
        small = await self.service.smaller(data, "medium", etag_of(data, "medium"))
        if len(small) > MAX_PICTURE_BYTES or not begins_as_picture(small[:32]):
            raise RefusalError(404, f"the item {shown(asked.id)} has no thumbnail that can be shown", param="id")
        return Jpeg(small)

    async def _classify(self, asked: Label) -> Answer:
        request = ClassifyRequest(
            index=asked.index, id=asked.id, image=asked.image, labels=asked.labels, templates=None
        )
        answer = await self.service.classify(request)
        return answer.model_dump(include={"model": True, "data": {"__all__": {"label", "probability", "cosine"}}})

    async def _facts(self, asked: Look) -> Answer:
        cards = []
        for card in await self.service.cards():
            some = list[ItemHit]()
            if card.orders:
                _, _, some = await self.service.listed(card.name, card.orders[0], limit=3, metadata=self._metadata)
            cards.append({**card.model_dump(exclude={"object", "has_originals"}), "some": list(map(self._told, some))})
        return {"indexes": cards}

    @property
    def _metadata(self) -> Any:
        return "all" if self.service.with_originals else "shown"

    def _told(self, hit: ItemHit) -> dict[str, Any]:
        """A result without addresses of the HTTP service; of how a file is found again, its path alone."""
        hidden = BOOKKEEPING - {"path"}
        metadata = {name: _short(value) for name, value in hit.metadata.items() if name not in hidden}
        told = {"id": hit.id, "metadata": dict(list(metadata.items())[:MAX_FIELDS])}
        return told if hit.score is None else {**told, "score": round(hit.score, 4)}


def _short(value: Any) -> Any:
    """A value of metadata, cut where it is long; what is inside of it as JSON writes it."""
    if isinstance(value, (bool, int, float)) or value is None:
        return value
    text = str(value)
    return text if len(text) <= MAX_VALUE_CHARS else f"{text[:MAX_VALUE_CHARS]}…"

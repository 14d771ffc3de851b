"""What the routes do, apart from HTTP: embed, classify and search with one runner, one index, some sets of labels."""

# N inputs, C classes, D embedding

import contextlib
import hashlib
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias, TypeVar
from urllib.parse import quote

import numpy as np

from cn_clip.clip import scoring
from cn_clip.clip.backends.base import Rows, unit_rows
from cn_clip.clip.templates import DEFAULT, load_templates
from cn_clip.data.paths import path_of, readable
from cn_clip.errors import AwayError, ConfigError, StoreError
from cn_clip.retrieval.addresses import Searchable, is_remote, item_called
from cn_clip.retrieval.conditions import parse_condition
from cn_clip.retrieval.listing import Order
from cn_clip.retrieval.query import mixed
from cn_clip.retrieval.segments import ItemId
from cn_clip.serve import items
from cn_clip.serve.circuits import RETRY_AFTER
from cn_clip.serve.collections import Collections, Opened
from cn_clip.serve.limits import MAX_PROMPT_CHARS, MAX_PROMPTS, Limits
from cn_clip.serve.recent import Recent
from cn_clip.serve.runner import Picture, Runner, Text
from cn_clip.serve.schemas import (
    ClassifyRequest,
    ClassifyResponse,
    ClassScore,
    IndexCard,
    ItemHit,
    QueryPart,
    RefusalError,
    SearchRequest,
    shown,
)
from cn_clip.serve.token_table import TokenTable

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")
# (id, score, metadata); null where there is no query.
_Hit: TypeAlias = tuple[ItemId, float | None, dict[str, Any]]

# Class vectors of the labels asked for last, kept in this many bytes.
CLASSIFIER_BYTES = 64 << 20
# And small pictures made of those in an index; 10,000 of the smallest take about as much.
SMALL_BYTES = 64 << 20


@dataclass
class Service:
    """The state behind the routes.

    runners: of the models, the first for requests that name none. label_sets: labels by the name of their set.
    with_originals: the files of items are given too. root_path: what all addresses in answers begin with.
    token_table: by which token ids are read as text.
    """

    runners: Sequence[Runner]
    limits: Limits
    collections: Collections = field(default_factory=Collections)
    label_sets: Mapping[str, Sequence[str]] = field(default_factory=dict)
    with_originals: bool = False
    root_path: str = ""
    token_table: TokenTable | None = None
    # By the names of model and set.
    _stored: dict[tuple[str, str], Rows] = field(default_factory=dict)
    _classifiers: Recent[bytes, Rows] = field(
        default_factory=lambda: Recent(CLASSIFIER_BYTES, lambda rows: rows.nbytes)
    )
    _small: Recent[str, bytes] = field(default_factory=lambda: Recent(SMALL_BYTES, len))

    @property
    def runner(self) -> Runner:
        """The first."""
        return self.runners[0]

    def runner_of(self, model: str | None) -> Runner:
        """The model of a name, None being the first; raises RefusalError: 503 before it is ready, 404 for another."""
        runner = next((one for one in self.runners if model in (None, one.name)), self.runner)
        runner.check_ready()
        if model not in (None, runner.name):
            known = ", ".join(repr(one.name) for one in self.runners)
            message = f"model: {shown(model)} is not served here, only {known}"
            raise RefusalError(404, message, param="model", code="model_not_found")
        return runner

    async def prepare(self, runner: Runner) -> None:
        """What requests would wait for: class vectors of the stored sets of labels, and the ids of the indexes."""
        for opened in self.collections:
            if opened.runner is runner:
                await runner.alone(opened.index.prepare)
        for name, labels in self.label_sets.items():
            # Past the queue, a batch at a time: whoever stops the server waits for one.
            texts = await runner.alone(scoring.prompts, labels, load_templates(DEFAULT))
            step = self.limits.max_batch
            parts = [
                await runner.alone(runner.encoder.encode_texts, texts[start : start + step])
                for start in range(0, len(texts), step)
            ]
            self._stored[runner.name, name] = scoring.class_vectors(np.concatenate(parts), len(labels))

    async def embed(
        self,
        inputs: Sequence[Sequence[Text | Picture]],
        *,
        model: str | None,
        dimensions: int | None = None,
        field: str = "input",
    ) -> tuple[Rows, int]:
        """(a unit row (N, D) for each input, the even mixture of its parts; tokens of the texts); raises RefusalError.

        dimensions: those asked for, at which the model's vectors may be cut; None or 0: as they are. field: where
        the inputs came in, for errors.
        """
        runner = self.runner_of(model)
        embed_dim = runner.encoder.embed_dim
        parts = [part for one in inputs for part in one]
        if len(parts) > self.limits.max_items:
            message = f"{field}: expected at most {self.limits.max_items} items, got {len(parts)}"
            raise RefusalError(400, message, param=field, code="too_many_items")
        known = [one for one in (*runner.encoder.facts.matryoshka, embed_dim) if one <= embed_dim]
        if dimensions and dimensions not in known:
            listed = f"{embed_dim}" if len(known) == 1 else f"any of {', '.join(map(str, known))}"
            message = f"dimensions: the model has {listed} and cannot give {dimensions}; leave it out"
            raise RefusalError(400, message, param="dimensions", code="unsupported_value")
        rows_PD, num_tokens = await runner.embed(parts)
        if dimensions and dimensions < embed_dim:
            rows_PD = unit_rows(rows_PD[:, :dimensions])
        if len(parts) == len(inputs):
            return rows_PD, num_tokens
        ends = list(itertools.accumulate(map(len, inputs)))
        try:
            rows = [
                mixed(rows_PD[end - len(one) : end], [1.0] * len(one)) for one, end in zip(inputs, ends, strict=True)
            ]
        except ConfigError as error:
            raise RefusalError(400, f"{field}: {error}", param=field, code="invalid_value") from error
        return np.stack(rows), num_tokens

    async def classify(self, request: ClassifyRequest) -> ClassifyResponse:
        """The labels by falling probability; raises RefusalError."""
        runner = self.runner_of(request.model)
        if (request.image is None) == (request.id is None):
            raise RefusalError(400, "image: expected either image or id", param="image", code="invalid_value")
        if (request.labels is None) == (request.label_set is None):
            raise RefusalError(400, "labels: expected either labels or label_set", param="labels", code="invalid_value")
        labels = self.label_sets.get(request.label_set or "") if request.labels is None else request.labels
        if labels is None:
            message = f"label_set: there is no {shown(request.label_set)}; known are {sorted(self.label_sets)}"
            raise RefusalError(404, message, param="label_set", code="label_set_not_found")
        templates = load_templates(DEFAULT) if request.templates is None else request.templates
        is_stored = request.label_set is not None and request.templates is None
        if not is_stored:  # those of the operator are as many as he likes, and are computed already
            num_prompts = len(labels) * len(templates)
            num_chars = len(templates) * sum(map(len, labels)) + len(labels) * sum(map(len, templates))
            if num_prompts > MAX_PROMPTS or num_chars > MAX_PROMPT_CHARS:  # before any are made
                raise RefusalError(
                    400,
                    f"labels: {len(labels)} labels in {len(templates)} templates are {num_prompts} texts of "
                    f"{num_chars} characters; expected at most {MAX_PROMPTS} texts of {MAX_PROMPT_CHARS} characters, "
                    "give fewer templates",
                    param="templates",
                    code="too_many_items",
                )
        if request.image is not None:
            image_1D, _ = await runner.embed([Picture(request.image, "image")])
        else:
            opened = self.opened(request.index, request.model)
            image_1D, runner = (await self.ask_index(opened, _vector, opened.index, request.id))[None], opened.runner
        if is_stored:
            classes_CD = self._stored[runner.name, str(request.label_set)]
        else:
            classes_CD = await self._classifier(runner, labels, templates)
        scale = runner.encoder.facts.logit_scale or scoring.LOGIT_SCALE
        (shares_C,) = scoring.probabilities(image_1D, classes_CD, scale=scale).tolist()
        (cosines_C,) = (image_1D @ classes_CD.T).tolist()
        order = sorted(range(len(labels)), key=lambda number: -shares_C[number])
        scores = [
            ClassScore(index=number, label=labels[number], probability=shares_C[number], cosine=cosines_C[number])
            for number in order
        ]
        return ClassifyResponse(model=runner.name, scale=scale, data=scores)

    async def search(self, request: SearchRequest, index: str | None = None) -> tuple[Opened, list[ItemHit]]:
        """The index and the hits, best first, with ids and metadata that JSON holds; raises RefusalError.

        index: its name, where the request itself gives none.
        """
        opened = self.opened(request.index or index, request.model)
        all_of_it = self.all_metadata(request.metadata)
        self.check_where(request.where)
        query_1D = await self._query(request.parts, opened)

        words = request.words_of_query if opened.index.has_words else None

        def hits() -> list[ItemHit]:
            (found,) = opened.index.search(
                query_1D,
                request.k,
                where=request.where,
                min_score=request.min_score,
                offset=request.offset,
                words=words,
            )
            return self._shown(opened, found, all_of_it=all_of_it)

        with _where_refused():
            return opened, await self.ask_index(opened, hits)

    async def listed(
        self,
        index: str | None,
        order: Order,
        *,
        where: str | None = None,
        offset: int = 0,
        limit: int = 50,
        metadata: str = "shown",
    ) -> tuple[Opened, int, list[ItemHit]]:
        """The index, how many items `where` admits, and some of them in an order; raises RefusalError."""
        opened, all_of_it = self.opened(index), self.all_metadata(metadata)
        self.check_where(where)

        def page() -> tuple[int, list[ItemHit]]:
            total, found = opened.index.listed(order, limit, offset=offset, where=where)
            return total, self._shown(opened, [(one, None, known) for one, known in found], all_of_it=all_of_it)

        with _where_refused():
            return opened, *await self.ask_index(opened, page)

    async def thumbnail(self, item_id: str, index: str | None = None) -> bytes:
        """The small JPEG of an item as it is kept; raises RefusalError (404)."""
        opened = self.opened(index)
        found = await self.ask_index(opened, lambda: opened.index.thumbnail(known_id(opened.index, item_id)))
        if found is None:
            raise RefusalError(404, f"the item {shown(item_id)} has no thumbnail", param="id", code="not_found")
        return found

    async def smaller(self, data: bytes, size: items.Size, tag: str) -> bytes:
        """What `thumbnail` gave, at a size; tag: its `etag_of`. Raises RefusalError (503) when too many wait."""
        if items.SIDES[size] is None:
            return data
        small = self._small.get(tag)
        if small is None:
            small = await self.runner.call(items.made_smaller, data, size)
            self._small.put(tag, small)
        return small

    async def original(self, item_id: str, index: str | None = None) -> items.Original:
        """The open file of an item; raises RefusalError: 403 on a server that gives none, 404."""
        if not self.with_originals:
            message = "the server gives no originals; start it with --originals"
            raise RefusalError(403, message, code="originals_not_shared")
        opened = self.opened(index)
        return await self.ask_index(
            opened, lambda: items.open_original(opened.index.metadata(known_id(opened.index, item_id)))
        )

    async def cards(self) -> list[IndexCard]:
        """What there is to say of each index."""
        for runner in self.runners:
            runner.check_ready()
        return [await self.ask_index(opened, self._card, opened) for opened in self.collections]

    def _card(self, opened: Opened) -> IndexCard:
        index = opened.index
        return IndexCard(
            name=opened.name,
            model=opened.runner.name,
            count=len(index),
            generation=getattr(index, "generation", None),
            fields=[field for field in index.fields if field not in items.BOOKKEEPING],
            has_originals=self.with_originals and "mtime_ns" in index.fields,  # any item is of a file
            has_thumbnails=index.has_thumbnails,
            orders=list(index.orders),
        )

    def _shown(self, opened: Opened, found: Sequence[_Hit], *, all_of_it: bool) -> list[ItemHit]:
        with_picture = opened.index.with_thumbnail(item_id for item_id, _, _ in found)
        hits = []
        for item_id, score, metadata in found:
            has_original = self.with_originals and items.has_original(metadata)
            hits.append(
                ItemHit(
                    id=readable(item_id),
                    score=score,
                    metadata=items.told(metadata, all_of_it=all_of_it),
                    thumbnail=self.address("thumbnails", item_id, opened) if item_id in with_picture else None,
                    original=self.address("items", item_id, opened) if has_original else None,
                )
            )
        return hits

    def address(self, what: Literal["items", "thumbnails"], item_id: ItemId, opened: Opened) -> str:
        """Where something of an item is, below the root of this machine's name."""
        query = "" if opened.is_first else f"?index={quote(opened.name, safe='')}"
        return f"{self.root_path}/v1/index/{what}/{quote(str(readable(item_id)), safe='')}{query}"

    def all_metadata(self, asked: str) -> bool:
        """Whether all metadata are asked for; raises RefusalError (403) on a server that does not give them."""
        if asked == "all" and not self.with_originals:
            message = "metadata: paths are told only by a server that gives originals; start it with --originals"
            raise RefusalError(403, message, param="metadata", code="originals_not_shared")
        return asked == "all"

    def check_where(self, where: str | None) -> None:
        """Raises RefusalError: 400 for a condition that cannot be read, 403 for one on metadata that are not told."""
        if where is None:
            return
        with _where_refused():
            named = parse_condition(where).fields
        if not self.with_originals and (hidden := sorted(named & items.UNTOLD)):
            message = (
                f"where: {', '.join(hidden)} is told only by a server that gives originals; start it with --originals"
            )
            raise RefusalError(403, message, param="where", code="originals_not_shared")

    async def ask_index(self, opened: Opened, function: Callable[..., ResultT], *args: object) -> ResultT:
        """Calls `function`, which reads an index; raises RefusalError (503) when the server that keeps it is away."""

        def asked() -> ResultT:
            opened.circuit.check()  # it may have opened while this waited for its turn
            return function(*args)

        opened.circuit.check()
        try:
            return await opened.runner.ask(asked, is_remote=is_remote(opened.index))
        except AwayError as error:
            opened.went_away(error)
            raise _unavailable() from error
        except StoreError as error:
            logger.error("%s", error)
            raise _unavailable() from error

    def opened(self, name: str | None, model: str | None = None) -> Opened:
        """The index asked for, as it is now; raises RefusalError: 503 before its model is ready, 404.

        model: where a request names one too, it must be that of the index; without a name, the first index of it.
        """
        runner = self.runner_of(model)
        opened = self.collections.get(name, model)
        if model is not None and opened.runner is not runner:
            message = f"model: the index {opened.name!r} is of the model {opened.runner.name!r}, not {shown(model)}"
            raise RefusalError(404, message, param="model", code="model_not_found")
        opened.runner.check_ready()
        return opened

    async def _classifier(self, runner: Runner, labels: Sequence[str], templates: Sequence[str]) -> Rows:
        key = await runner.call(_digest, runner.name, labels, templates)
        classes_CD = self._classifiers.get(key)
        if classes_CD is None:
            features = await runner.embed_many_texts(await runner.call(scoring.prompts, labels, templates))
            classes_CD = await runner.call(scoring.class_vectors, features, len(labels))
            self._classifiers.put(key, classes_CD)
        return classes_CD

    async def _query(self, parts: Sequence[QueryPart], opened: Opened) -> Rows:
        """The unit vector (1, D) of the weighted sum of the parts."""
        inputs: dict[int, Text | Picture] = {}
        rows_ND = np.empty((len(parts), opened.index.model.embed_dim), dtype=np.float32)
        for position, part in enumerate(parts):
            param = "query" if len(parts) == 1 else f"query[{position}]"
            if sum(value is not None for value in (part.text, part.image, part.id)) != 1:
                message = f"{param}: expected one of text, image and id"
                raise RefusalError(400, message, param=param, code="invalid_value")
            if part.text is not None:
                inputs[position] = Text(part.text)
            elif part.image is not None:
                inputs[position] = Picture(part.image, f"{param}.image")
        if inputs:
            rows_ND[list(inputs)], _ = await opened.runner.embed(list(inputs.values()))
        for position, part in enumerate(parts):
            if part.id is not None:
                rows_ND[position] = await self.ask_index(opened, _vector, opened.index, part.id)
        try:
            return mixed(rows_ND, [part.weight for part in parts])[None]
        except ConfigError as error:
            raise RefusalError(400, f"query: {error}", param="query", code="invalid_value") from error


def _unavailable() -> RefusalError:
    message = "the index does not answer; the server's log tells why"
    return RefusalError(503, message, code="index_unavailable", retry_after=RETRY_AFTER)


@contextlib.contextmanager
def _where_refused() -> Iterator[None]:
    """Makes a refusal of what an index says of a condition."""
    try:
        yield
    except ConfigError as error:
        param = "order" if str(error).startswith("order:") else "where"
        raise RefusalError(400, str(error), param=param, code="invalid_value") from error


def known_id(index: Searchable, item_id: int | str) -> int | str:
    """The id as the index has it, a name on a disk also from its spelling.

    Raises RefusalError (404) for an unknown one.
    """
    found = item_called(index, item_id)
    if found is not None:
        return found
    with contextlib.suppress(ValueError):  # no spelling
        if isinstance(item_id, str) and (path := path_of(item_id)) in index:
            return path
    raise RefusalError(404, f"id: the index has no item {shown(item_id)}", param="id", code="not_found")


def _vector(index: Searchable, item_id: int | str) -> Rows:
    return index.vector(known_id(index, item_id))


def _digest(model: str, labels: Sequence[str], templates: Sequence[str]) -> bytes:
    return hashlib.blake2b(json.dumps([model, labels, templates]).encode()).digest()

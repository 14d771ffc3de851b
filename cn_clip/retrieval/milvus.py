"""An index kept by a Milvus server, which finds the same items in the same order as one in a folder; see `places`."""

# Q queries, D dimensions

import base64
import contextlib
import hashlib
import json
import logging
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from cn_clip import extras
from cn_clip.errors import ConfigError, DataError, StoreError
from cn_clip.retrieval import filters
from cn_clip.retrieval.engines import OVERFETCH
from cn_clip.retrieval.filters import Condition
from cn_clip.retrieval.manifest import EngineName, ModelInfo
from cn_clip.retrieval.segments import FloatArray, ItemId
from cn_clip.retrieval.store import Hit, checked_queries
from cn_clip.retrieval.writer import NewItem, checked_lines

SCHEME = "milvus://"
GRAMMAR = "expected milvus://HOST:PORT/COLLECTION, the name of letters, digits and _"
DEFAULT_PORT = 19530
DEFAULT_TIMEOUT = 20.0

FORMAT = 1
GRAPH_OPTIONS = {"M": 16, "efConstruction": 200}
LEAST_EF = 128
# Milvus measures both in bytes of UTF-8; a picture travels as base64.
LARGEST_TEXT = 65535
LARGEST_THUMBNAIL = LARGEST_TEXT // 4 * 3
# Rows in one answer: with their vectors some 10 MB, and without.
LARGEST_LIMIT = 4096
WINDOW = 8192
# Half of what a Milvus of default settings takes in one request.
UPSERT_BYTES = 32 << 20
RETRY_PAUSE = 0.5

_COLLECTION = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_SOURCE = "cn_clip.source"
_KEY_BYTES = 16
_NO_CONNECTION = 2

Fields: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Address:
    """Where a collection is. timeout: seconds within which Milvus answers, or is given up."""

    host: str
    port: int
    collection: str
    timeout: float = DEFAULT_TIMEOUT
    user: str = ""
    password: str = ""

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{SCHEME}{host}:{self.port}/{self.collection}"


def parse_address(text: str) -> Address:
    """milvus://[USER:PASSWORD@]HOST[:PORT]/COLLECTION[?timeout=SECONDS]; raises ConfigError for anything else."""
    try:
        parts = urlsplit(text)
        port, settings = parts.port or DEFAULT_PORT, parse_qs(parts.query, strict_parsing=bool(parts.query))
        timeout = float(settings.pop("timeout", [str(DEFAULT_TIMEOUT)])[-1])
    except ValueError as error:
        raise ConfigError(f"{_without_password(text)}: {error}; {GRAMMAR}") from error
    name = parts.path.removeprefix("/")
    is_name = _COLLECTION.fullmatch(name) is not None
    if parts.scheme != "milvus" or not parts.hostname or not is_name or settings or not 0 < timeout < 86400:
        raise ConfigError(f"{_without_password(text)}: {GRAMMAR}; after it at most ?timeout=SECONDS")
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    return Address(parts.hostname, port, name, timeout, user, password)


def _without_password(text: str) -> str:
    return re.sub(r"//[^@/]*@", "//", text)


@dataclass(frozen=True)
class MilvusFacts:
    """What a collection says of itself, and how many items it has."""

    model: ModelInfo
    num_items: int
    source: str
    engine: str = "milvus"
    vector_type: str = "float32"


class Connection:
    """A collection on a server that answered."""

    def __init__(self, address: Address) -> None:
        """Raises StoreError when no server answers within the address's timeout, MissingExtraError."""
        self.address, self._client = address, _connect(address)

    def call(self, method: str, **options: Any) -> Any:
        """What the client's method returns for this collection; raises StoreError."""
        with _answering(self.address):
            function = getattr(self._client, method)
            return function(collection_name=self.address.collection, timeout=self.address.timeout, **options)

    def query(self, condition: str, fields: Sequence[str]) -> list[Fields]:
        """The rows that Milvus's own condition admits, in any order; all that was written before is seen."""
        found = self.call("query", filter=condition, output_fields=list(fields), consistency_level="Strong")
        return [dict(one) for one in found]

    def count(self, condition: str = "") -> int:
        """How many rows there are."""
        return int(self.query(condition, ["count(*)"])[0]["count(*)"])

    def scan(self, fields: Sequence[str]) -> Iterator[Fields]:
        """All rows in order of insertion; memory: `WINDOW` of them."""
        left, start = self.count(), 0
        while left > 0:
            rows = self.query(f"place >= {start} and place < {start + WINDOW}", [*fields, "place"])
            if not rows and not self.count(f"place >= {start}"):  # others have removed them meanwhile
                return
            yield from sorted(rows, key=lambda row: int(row["place"]))
            left, start = left - len(rows), start + WINDOW

    def facts(self) -> MilvusFacts | None:
        """None when there is no such collection; raises DataError for one that is no index."""
        if not self.call("has_collection"):
            return None
        described = self.call("describe_collection")
        try:
            values = json.loads(described["description"])
            model, version = ModelInfo(**values["model"]), values["cn_clip"]
            source = json.loads(described.get("properties", {}).get(_SOURCE, '""'))
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{self.address}: this collection is no index; give another name") from error
        if version != FORMAT:
            raise DataError(f"{self.address}: is of format {version!r}, this version reads {FORMAT}; build it again")
        self._open()
        return MilvusFacts(model, self.count(), source)

    def require(self) -> MilvusFacts:
        """Raises DataError when there is no such collection."""
        facts = self.facts()
        if facts is None:
            raise DataError(
                f"{self.address}: is no index; build one with: cn-clip index build PICTURES --store {self.address}"
            )
        return facts

    def create(self, model: ModelInfo, source: str) -> None:
        """Makes the collection of the vectors of a model."""
        from pymilvus import DataType, MilvusClient

        description = json.dumps({"cn_clip": FORMAT, "model": asdict(model)})
        schema = MilvusClient.create_schema(auto_id=False, enable_dynamic_field=False, description=description)
        schema.add_field("key", DataType.VARCHAR, is_primary=True, max_length=2 * _KEY_BYTES)
        schema.add_field("place", DataType.INT64)
        schema.add_field("item", DataType.VARCHAR, max_length=LARGEST_TEXT)
        schema.add_field("thumbnail", DataType.VARCHAR, max_length=LARGEST_TEXT)
        schema.add_field("vector", DataType.FLOAT_VECTOR, dim=model.embed_dim)
        self.call("create_collection", schema=schema, consistency_level="Strong")
        self.set_source(source)
        self._open()

    def set_source(self, source: str) -> None:
        """Notes what the index was built from."""
        self.call("alter_collection_properties", properties={_SOURCE: json.dumps(source)})

    def _open(self) -> None:
        """Also ends what a run that was killed had begun."""
        if not self.call("list_indexes"):
            params = self._client.prepare_index_params()
            params.add_index("vector", index_type="HNSW", metric_type="IP", params=GRAPH_OPTIONS)
            self.call("create_index", index_params=params)
        self.call("load_collection")


def _connect(address: Address) -> Any:
    pymilvus = extras.require("pymilvus", extra="milvus", purpose="an index in Milvus")
    # It logs tracebacks of what it raises as well.
    logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
    host = f"[{address.host}]" if ":" in address.host else address.host
    deadline = time.monotonic() + address.timeout
    while True:
        left = max(deadline - time.monotonic(), RETRY_PAUSE)
        with _answering(address):
            try:
                return pymilvus.MilvusClient(
                    uri=f"http://{host}:{address.port}", user=address.user, password=address.password, timeout=left
                )
            except pymilvus.MilvusException as error:
                if error.code != _NO_CONNECTION or time.monotonic() + RETRY_PAUSE > deadline:
                    raise
        time.sleep(RETRY_PAUSE)


@contextlib.contextmanager
def _answering(address: Address) -> Iterator[None]:
    """Makes one sentence of whatever goes wrong inside."""
    import grpc
    from pymilvus import MilvusException

    try:
        yield
    except (grpc.RpcError, MilvusException) as error:
        code = error.code() if isinstance(error, grpc.RpcError) else error.code
        name = getattr(code, "name", "")
        reason = str(getattr(error, "message", "") or name or error).splitlines()[0][:200]
        if name in ("DEADLINE_EXCEEDED", "UNAVAILABLE") or code == _NO_CONNECTION or "timeout" in reason.lower():
            raise StoreError(
                f"{address}: Milvus 在 {address.timeout:g} 秒内没有回答 / did not answer within "
                f"{address.timeout:g} s ({reason}); see that it runs there, or give it longer with ?timeout=SECONDS "
                "after the address"
            ) from error
        raise StoreError(f"{address}: Milvus 拒绝了请求 / refused the request ({reason})") from error


def key_of(item_id: ItemId) -> str:
    """The primary key of an item: alike for equal ids alone, and plain ASCII however wild the id."""
    return hashlib.blake2b(json.dumps(item_id).encode(), digest_size=_KEY_BYTES).hexdigest()


class _Row(NamedTuple):
    """A row with its score. place: rises in order of insertion."""

    score: float
    place: int
    id: ItemId
    metadata: dict[str, Any]


class MilvusIndex:
    """Items with their vectors, as they are on the server at every call. Several threads may search at once."""

    def __init__(self, address: Address) -> None:
        """Raises DataError when there is no such index, StoreError when no server answers."""
        self.address, self._connection = address, Connection(address)
        self._facts = self._connection.require()

    @property
    def place(self) -> str:
        """Where the index is."""
        return str(self.address)

    @property
    def model(self) -> ModelInfo:
        """The model of the vectors: name, fingerprint, embed_dim."""
        return self._facts.model

    def __len__(self) -> int:
        return self._connection.count()

    def __contains__(self, item_id: object) -> bool:
        return type(item_id) in (int, str) and bool(self._fields(item_id, "key"))  # type: ignore[arg-type]

    @property
    def ids(self) -> list[ItemId]:
        """All ids, in order of insertion."""
        return [item_id for item_id, _ in self.items()]

    def items(self) -> Iterator[tuple[ItemId, dict[str, Any]]]:
        """(id, metadata) in order of insertion."""
        for row in self._connection.scan(["item"]):
            yield _parsed(row, self.place)

    def search(
        self, vectors_QD: FloatArray, k: int, *, where: str | None = None, min_score: float | None = None
    ) -> list[list[Hit]]:
        """As `store.Index.search`; raises StoreError besides."""
        if k < 1:
            raise ConfigError(f"k: expected at least 1, got {k}")
        queries_QD = checked_queries(vectors_QD, self.model.embed_dim, self.place)
        condition = filters.parse(where) if where is not None else None
        limit = min(OVERFETCH * k + 16, LARGEST_LIMIT)
        at_once, results = max(1, LARGEST_LIMIT // limit), list[list[Hit]]()
        for start in range(0, len(queries_QD), at_once):
            part_QD = queries_QD[start : start + at_once]
            for query_D, rows in zip(part_QD, self._nearest(part_QD, limit), strict=True):
                best = self._best(query_D, k, condition, rows, limit)
                hits = [Hit(row.id, row.score, row.metadata) for row in best]
                results.append([hit for hit in hits if min_score is None or hit.score >= min_score])
        return results

    def vector(self, item_id: ItemId) -> FloatArray:
        """The vector (D,) of an item, float32; raises DataError for an unknown id."""
        return np.asarray(self._known(item_id, "vector")["vector"], dtype=np.float32)

    def metadata(self, item_id: ItemId) -> dict[str, Any]:
        """What is known of an item; raises DataError for an unknown id."""
        return _parsed(self._known(item_id, "item"), self.place)[1]

    def thumbnail(self, item_id: ItemId) -> bytes | None:
        """A small JPEG; None for an unknown id, or an item without a picture."""
        found = self._fields(item_id, "thumbnail")
        return base64.b64decode(found[0]["thumbnail"]) or None if found else None

    def _fields(self, item_id: ItemId, *fields: str) -> list[Fields]:
        return self._connection.query(f'key == "{key_of(item_id)}"', fields)

    def _known(self, item_id: ItemId, *fields: str) -> Fields:
        found = self._fields(item_id, *fields)
        if not found:
            raise DataError(f"{self.place}: has no item {item_id!r}")
        return found[0]

    def _nearest(self, queries_QD: FloatArray, limit: int) -> list[list[_Row]]:
        """What Milvus finds for each query, with exact scores."""
        found = self._connection.call(
            "search",
            data=queries_QD,
            limit=limit,
            output_fields=["place", "item", "vector"],
            search_params={"metric_type": "IP", "params": {"ef": max(limit, LEAST_EF)}},
            consistency_level="Strong",
        )
        return [
            self._scored(query_D, [hit["entity"] for hit in hits])
            for query_D, hits in zip(queries_QD, found, strict=True)
        ]

    def _scored(self, query_D: FloatArray, rows: Sequence[Mapping[str, Any]]) -> list[_Row]:
        vectors = np.array([row["vector"] for row in rows], dtype=np.float64).reshape(len(rows), len(query_D))
        scores = (vectors * query_D).sum(axis=1).astype(np.float32).tolist()
        return [
            _Row(score, int(row["place"]), *_parsed(row, self.place)) for score, row in zip(scores, rows, strict=True)
        ]

    def _best(
        self, query_D: FloatArray, k: int, condition: Condition | None, rows: list[_Row], limit: int
    ) -> list[_Row]:
        """The k best that fit: of `rows`, or, where these are too few, of more and at last of all."""
        while True:
            fitting = [row for row in rows if condition is None or condition.admits(row.metadata)]
            if len(fitting) >= k or (len(rows) < limit and len(rows) >= len(self)):
                return _first(fitting, k)
            if len(rows) < limit or limit == LARGEST_LIMIT:
                return self._best_of_all(query_D, k, condition)
            limit = min(8 * limit, LARGEST_LIMIT)
            rows = self._nearest(query_D[None], limit)[0]

    def _best_of_all(self, query_D: FloatArray, k: int, condition: Condition | None) -> list[_Row]:
        keys = [
            row["key"]
            for row in self._connection.scan(["key", "item"])
            if condition is None or condition.admits(_parsed(row, self.place)[1])
        ]
        best: list[_Row] = []
        for start in range(0, len(keys), LARGEST_LIMIT):
            chosen = f"key in {json.dumps(keys[start : start + LARGEST_LIMIT])}"
            rows = self._connection.query(chosen, ["place", "item", "vector"])
            best = _first([*best, *self._scored(query_D, rows)], k)
        return best


def _first(rows: Iterable[_Row], k: int) -> list[_Row]:
    return sorted(rows, key=lambda row: (-row.score, row.place))[:k]


def _parsed(row: Mapping[str, Any], where: str) -> tuple[ItemId, dict[str, Any]]:
    try:
        values = json.loads(row["item"])
        return values["id"], values["metadata"]
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(f"{where}: the item at {row.get('place')} is damaged ({error}); build it again") from error


@contextlib.contextmanager
def open_milvus_writer(address: Address, create: ModelInfo | None = None, source: str = "") -> "Iterator[MilvusWriter]":
    """Changes an index; create: the model of one that is not there yet.

    Raises DataError when there is none and `create` is None, StoreError when no server answers.
    """
    connection = Connection(address)
    if create is not None and connection.facts() is None:
        connection.create(create, source)
    yield MilvusWriter(connection, connection.require())


class MilvusWriter:
    """Adds and removes items, which count at once. Memory: all metadata."""

    def __init__(self, connection: Connection, facts: MilvusFacts) -> None:
        self._connection, self._facts = connection, facts
        self._items: dict[ItemId, dict[str, Any]] = {}
        self._next_place = 0
        for row in connection.scan(["item"]):
            item_id, metadata = _parsed(row, str(connection.address))
            self._items[item_id] = metadata
            self._next_place = int(row["place"]) + 1

    @property
    def manifest(self) -> MilvusFacts:
        """What the index says of itself."""
        return replace(self._facts, num_items=len(self))

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, item_id: object) -> bool:
        return item_id in self._items

    def items(self) -> Iterator[tuple[ItemId, dict[str, Any]]]:
        """(id, metadata) in order of insertion."""
        yield from list(self._items.items())

    def stored(self, item_id: ItemId) -> NewItem:
        """An item of the index, as it would be added again."""
        (row,) = self._connection.query(f'key == "{key_of(item_id)}"', ["vector", "thumbnail"])
        vector_D = np.asarray(row["vector"], dtype=np.float32)
        return NewItem(item_id, vector_D, self._items[item_id], base64.b64decode(row["thumbnail"]))

    def describe(self, *, engine: EngineName | None, source: str) -> None:
        """Notes the source; raises ConfigError for an engine, for Milvus has its own."""
        if engine is not None:
            raise ConfigError(f"{self._connection.address}: Milvus searches by itself; leave --engine out")
        if source != self._facts.source:
            self._connection.set_source(source)
            self._facts = replace(self._facts, source=source)

    def commit(self, items: Sequence[NewItem] = (), remove: Iterable[ItemId] = ()) -> None:
        """Adds items, in place of those of the same id, and removes others; ids that are not there are passed over.

        When it returns, every reader sees the change. A run that is killed meanwhile leaves every item once, the old
        or the new. Raises DataError, with nothing changed, for what `writer.IndexWriter.commit` refuses and for more
        metadata or larger thumbnails than Milvus holds.
        """
        lines = checked_lines(items, self._facts.model.embed_dim, "float32")
        rows = [
            _fields_of(item, line, self._next_place + number)
            for number, (item, line) in enumerate(zip(items, lines, strict=True))
        ]
        kept = {item.id for item in items}
        gone = [one for one in dict.fromkeys(remove) if one in self._items and one not in kept]
        for part in _parts(rows, self._facts.model.embed_dim):
            self._connection.call("upsert", data=part)
        for start in range(0, len(gone), WINDOW):
            self._connection.call("delete", ids=[key_of(one) for one in gone[start : start + WINDOW]])
        self._next_place += len(rows)
        for item_id in (*gone, *kept):
            self._items.pop(item_id, None)
        self._items.update({item.id: dict(item.metadata) for item in items})

    def finish(self) -> None:
        """Nothing is left to do: Milvus brings its graph up by itself."""


def _fields_of(item: NewItem, line: bytes, place: int) -> Fields:
    if len(line) > LARGEST_TEXT:
        raise DataError(f"id {item.id!r}: its metadata take {len(line)} bytes, Milvus holds {LARGEST_TEXT}")
    if len(item.thumbnail) > LARGEST_THUMBNAIL:
        raise DataError(
            f"id {item.id!r}: its thumbnail has {len(item.thumbnail)} bytes, Milvus holds {LARGEST_THUMBNAIL}; give "
            "a smaller --thumbnail-size"
        )
    return {
        "key": key_of(item.id),
        "place": place,
        "item": line.decode(),
        "thumbnail": base64.b64encode(item.thumbnail).decode(),
        "vector": item.vector_D.astype(np.float32),
    }


def _parts(rows: Sequence[Fields], embed_dim: int) -> Iterator[list[Fields]]:
    """As many rows as go into a request."""
    part, num_bytes = list[Fields](), 0
    for row in rows:
        size = len(row["item"]) + len(row["thumbnail"]) + 4 * embed_dim + 64
        if part and num_bytes + size > UPSERT_BYTES:
            yield part
            part, num_bytes = [], 0
        part.append(row)
        num_bytes += size
    if part:
        yield part

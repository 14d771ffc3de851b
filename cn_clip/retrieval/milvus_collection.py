"""A collection on a Milvus server: what it says of itself, and calls that end in time; rows for `remote`."""

import base64
import contextlib
import json
import logging
import re
import secrets
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

from cn_clip import extras
from cn_clip.errors import AwayError, DataError, StoreError
from cn_clip.language import both
from cn_clip.leases import TTL_S, Lease, LeaseLostError, held
from cn_clip.retrieval.conditions import Condition
from cn_clip.retrieval.manifest import ModelInfo, PictureFacts
from cn_clip.retrieval.milvus_address import Address
from cn_clip.retrieval.milvus_connection import (
    OLDEST,
    away,
    closing_with,
    connect,
    is_away,
    reason_of,
    refusal,
    too_old,
)
from cn_clip.retrieval.milvus_language import MilvusLanguage
from cn_clip.retrieval.remote_columns import COLUMNS, columns_of, filter_of, filter_of_field, without_fields
from cn_clip.retrieval.remote_rows import (
    KEY_BYTES,
    WINDOW,
    Facts,
    Fields,
    NewRow,
    ReplacedError,
    TooLargeError,
    check_followed,
)

logger = logging.getLogger(__name__)

# Of format 1 are those without columns and without a guard.
FORMAT = 2
GRAPH_OPTIONS = {"M": 16, "efConstruction": 200}
# Milvus measures it in bytes of UTF-8.
LARGEST_TEXT = 65535
# Rows of a run that are worth a segment of their own, with a graph: of fewer Milvus looks at all, about as quickly, and
# its graph misses some where many vectors are equal (of 234 searches over 2,000 such items 37 were not a folder's).
LEAST_FLUSHED = 20_000
LEAST_EF = 256
# Half of what a Milvus of default settings takes in one request.
UPSERT_BYTES = 32 << 20
# What "too large" is to a server: of default settings 64 MB an answer to the client, 100 MB within the server.
_TOO_LARGE = re.compile(r"larger than max|exceeds? the (limit size|maxOutputSize)", re.I)
_SHRINKS_BY = 4

_LANGUAGE = MilvusLanguage()
_FACTS = "cn_clip.facts"
_SOURCE, _PICTURES = "cn_clip.source", "cn_clip.pictures"
# The claim of the writer, see `leases`; and what is more than every place of a row.
_LEASE, _NEXT_PLACE, _NOTES = "cn_clip.lease", "cn_clip.next_place", "cn_clip.notes"
# Bytes: properties lie in etcd, which takes 1.5 MB at once.
LARGEST_NOTES = 1 << 19


class Collection:
    """A collection on a server that answered.

    Each request about rows names a field, the guard, that only this collection has: one that was dropped and made again
    under the same name, perhaps of another model, refuses it. consistency: of reading; "Strong" sees all that was
    written before, and waits for it, "Bounded" may be some seconds behind. A call asks for `WINDOW` rows; of larger
    items fewer fit, which an answer that is refused says.
    """

    name = "Milvus"
    largest_text = LARGEST_TEXT
    # It travels as base64.
    largest_thumbnail = LARGEST_TEXT // 4 * 3

    def __init__(self, address: Address, *, consistency: str = "Strong", is_reader: bool = False) -> None:
        """is_reader: goes on with a collection of the same model that was made in place of the one it opened.

        Raises StoreError when no server answers within the address's timeout, MissingExtraError.
        """
        self.address, self.consistency, self.is_reader = address, consistency, is_reader
        self._guard, self._opened = "", Facts(ModelInfo("", "", 0), 0, "")
        # Of a writer: what ends with it, and its lease, which a collection that is not there yet cannot hold.
        self._alone: contextlib.ExitStack | None = None
        self._lease: Lease | None = None
        self._package, self._grpc = (
            extras.require(name, extra="milvus", purpose="an index in Milvus") for name in ("pymilvus", "grpc")
        )
        self._client = connect(address, self._package, self._grpc)
        closing_with(self, self._client, address)

    def call(self, method: str, **options: Any) -> Any:
        """What the client's method returns for this collection; raises StoreError."""
        with self._answering():
            function = getattr(self._client, method)
            return function(collection_name=self.address.collection, timeout=self.address.timeout, **options)

    @property
    def has_columns(self) -> bool:
        """Whether conditions can be asked of it; one of format 1 has none."""
        return bool(self._guard)

    def query(self, condition: str | None, fields: Sequence[str], *, limit: int | None = None) -> list[Fields]:
        """The rows that Milvus's own condition admits, in any order, at most `limit`; raises TooLargeError."""
        more = {} if limit is None else {"limit": limit}

        def rows(guard: str) -> Any:
            named = [*fields, guard] if guard else list(fields)
            return self.call(
                "query", filter=condition or "", output_fields=named, consistency_level=self.consistency, **more
            )

        return [_read(one) for one in self._guarded(lambda guard: self._checked(rows(guard), guard))]

    def count(self, condition: str | None = None) -> int:
        """How many rows there are."""

        def rows(guard: str) -> Any:
            admitted = " and ".join(one for one in (condition, f"{guard} == 0" if guard else "") if one)
            return self.call("query", filter=admitted, output_fields=["count(*)"], consistency_level=self.consistency)

        return int(self._guarded(rows)[0]["count(*)"])

    def has_any(self, condition: str) -> bool:
        """Whether there are rows that Milvus's own condition admits."""
        return bool(self.query(condition, ["key"], limit=1))

    def nearest(self, vectors_QD: Any, limit: int, fields: Sequence[str], condition: str | None) -> list[list[Fields]]:
        """For each vector up to `limit` rows that Milvus's graph finds, best first; raises TooLargeError."""

        def rows(guard: str) -> Any:
            return self.call(
                "search",
                data=vectors_QD,
                limit=limit,
                filter=condition or "",
                output_fields=[*fields, guard] if guard else list(fields),
                search_params={"metric_type": "IP", "params": {"ef": max(limit, LEAST_EF)}},
                consistency_level=self.consistency,
            )

        def hits(guard: str) -> list[Sequence[Fields]]:
            return [self._checked([hit["entity"] for hit in one], guard) for one in rows(guard)]

        return [[dict(row) for row in one] for one in self._guarded(hits)]

    def _checked(self, rows: Sequence[Fields], guard: str) -> Sequence[Fields]:
        """The rows; raises StoreError without the guard that was asked for: Milvus Lite then leaves out the field."""
        if guard and rows and guard not in rows[0]:
            raise StoreError("Milvus refused the request (no such field)", at=self.address)
        return rows

    def ping(self) -> None:
        """Asks for as little as shows that the server answers."""
        self.call("has_collection")

    def filter_of(self, condition: Condition) -> str | None:
        """See `remote_columns`."""
        return filter_of(condition, _LANGUAGE) if self.has_columns else None

    def with_field(self, field: str) -> list[Fields]:
        """Nothing, where rows cannot be asked for it."""
        return self.query(filter_of_field(field, _LANGUAGE), ["item"], limit=1) if self.has_columns else []

    def is_sure_of_fields(self) -> bool:
        """Not where rows do not note their fields."""
        return self.has_columns and not self.has_any(without_fields(_LANGUAGE))

    def has_thumbnails(self) -> bool:
        """Whether any row has one."""
        return self.has_any("has_thumbnail == true" if self.has_columns else 'thumbnail != ""')

    def with_thumbnail(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys whose rows have one."""
        if self.has_columns:
            return {row["key"] for row in self.of_keys(keys, ["key", "has_thumbnail"]) if row["has_thumbnail"]}
        return {row["key"] for row in self.of_keys(keys, ["key"], 'thumbnail != ""')}

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Holds a lease in the properties of the collection, from when it is there.

        Raises ConfigError where another process renews one, which takes a third of its time to see; of a process that
        was killed it runs out by itself.
        """
        with contextlib.ExitStack() as self._alone:
            try:
                if self._is_there():
                    self._hold()
                yield
            finally:
                self._alone = self._lease = None

    def _hold(self) -> None:
        if self._alone is None or self.address.lite:  # which one process alone may open
            return

        def waiting(sentence: str) -> None:
            told = both(
                f"；最多等 {TTL_S:g} 秒，看它是否还在运行", f"; waiting up to {TTL_S:g} s to see whether it still runs"
            )
            logger.warning("%s%s", sentence, told)

        lease = Lease(_Board(self), f"{self.address}: another process is changing this index", ttl_s=TTL_S)
        self._lease = self._alone.enter_context(held(lease, waiting=waiting))

    def _confirm(self) -> None:
        """Raises ReplacedError, and LeaseLostError where another writer took this one for dead."""
        if self._alone is not None and self._lease is None:  # another process has made it meanwhile
            self._hold()
        if self._lease is None:
            return
        try:
            self._lease.confirm()
        except AwayError:
            raise
        except (LeaseLostError, StoreError):  # of a collection that was made again it is another's
            self._check_replaced(self._guard)
            raise

    def next_place(self) -> int:
        """Noted with the collection; one of another version's writer is looked for."""
        noted = self._properties().get(_NEXT_PLACE, "")
        low = int(noted) if str(noted).isdecimal() else 0
        if not self.has_any(f"place >= {low}"):
            return low
        step = 1  # there is a row at or after `low`
        while self.has_any(f"place >= {low + step}"):
            low, step = low + step, 2 * step
        high = low + step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.has_any(f"place >= {middle}") else (low, middle)
        return high

    def notes(self) -> bytes:
        """A property; longer ones than `LARGEST_NOTES` are not kept."""
        return str(self._properties().get(_NOTES, "")).encode()

    def write(self, rows: Sequence[NewRow], remove: Sequence[str], notes: bytes | None = None) -> None:
        """In requests of at most `UPSERT_BYTES`."""
        self._confirm()
        if rows:
            self._alter({_NEXT_PLACE: str(max(row.place for row in rows) + 1)})
        part, num_bytes = list[Fields](), 0
        for row in rows:
            fields = self.fields_of(row)
            size = len(row.line) + len(fields["thumbnail"]) + fields["vector"].nbytes + 64
            size += len(json.dumps(fields.get(COLUMNS, "")))
            if part and num_bytes + size > UPSERT_BYTES:
                self.upsert(part)
                part, num_bytes = [], 0
            part.append(fields)
            num_bytes += size
        if part:
            self.upsert(part)
        if remove:
            self.delete(remove)
        if notes is not None:
            self._alter({_NOTES: notes.decode() if len(notes) <= LARGEST_NOTES else ""})

    def fields_of(self, row: NewRow) -> Fields:
        """A row as Milvus takes it."""
        item = row.item
        columns = {"has_thumbnail": bool(item.thumbnail), COLUMNS: columns_of(item.id, item.metadata)}
        return {
            **(columns if self.has_columns else {}),
            "key": row.key,
            "place": row.place,
            "item": row.line.decode(),
            "thumbnail": base64.b64encode(item.thumbnail).decode(),
            "vector": item.vector_D.astype("float32"),
        }

    def finish(self, num_written: int) -> None:
        """Has Milvus make its graph of what was written, if that is much, and not when it has long been idle."""
        if num_written >= LEAST_FLUSHED:
            # It allows few such requests in a minute, and does it later by itself.
            with contextlib.suppress(StoreError):
                self.call("flush")

    def upsert(self, rows: Sequence[Fields]) -> None:
        """Writes rows in place of those of the same keys."""
        self._guarded(lambda guard: self.call("upsert", data=[{**row, guard: 0} if guard else row for row in rows]))

    def delete(self, keys: Sequence[str]) -> None:
        """Removes the rows with these keys, as many as there are."""
        for start in range(0, len(keys), WINDOW):
            some = list(keys[start : start + WINDOW])

            def removed(guard: str, some: list[str] = some) -> Any:
                if not guard:
                    return self.call("delete", ids=some)
                return self.call("delete", filter=f"key in {json.dumps(some)} and {guard} == 0")

            self._guarded(removed)

    def _guarded(self, act: Callable[[str], Any]) -> Any:
        """What `act` returns for the collection that was opened, or for the one that a reader may follow."""
        guard = self._guard
        if not guard:  # a collection of format 1 has nothing that would refuse
            self._check_replaced(guard)
            return act(guard)
        try:
            return act(guard)
        except (TooLargeError, AwayError):
            raise
        except StoreError:
            self._check_replaced(guard)
            if self._guard == guard:
                raise
            return act(self._guard)

    def _check_replaced(self, guard: str) -> None:
        """Raises ReplacedError where the collection is another one now; a reader goes on with one of the same model."""
        try:
            now, before = self._described() if self._is_there() else None, self._opened
        except DataError as error:
            raise ReplacedError(
                f"the collection was made again by another program ({error})", at=self.address
            ) from error
        if now is not None and now.guard == guard and now.model == before.model:
            return
        if now is None:
            raise ReplacedError("the collection is gone since it was opened; build it again", at=self.address)
        check_followed(now, before, is_reader=self.is_reader, at=self.address)
        self._open()
        self._opened, self._guard = now, now.guard

    def of_keys(self, keys: Sequence[str], fields: Sequence[str], condition: str = "") -> Iterator[Fields]:
        """As `query`, of the rows with these keys; one call for `WINDOW` of them, or for as many as an answer holds."""
        start, size = 0, WINDOW
        while start < len(keys):
            chosen = f"key in {json.dumps(keys[start : start + size])}"
            try:
                rows = self.query(f"{chosen} and {condition}" if condition else chosen, fields)
            except TooLargeError:
                size = min(size, len(keys) - start) // _SHRINKS_BY
                if not size:
                    raise
                continue
            yield from rows
            start += size

    def scan(self, fields: Sequence[str], condition: str | None = None) -> Iterator[Fields]:
        """The rows that Milvus's own condition admits, in order of insertion; memory: about `WINDOW` of them."""
        with contextlib.suppress(TooLargeError):
            rows = self.query(condition or "place >= 0", [*fields, "place"], limit=WINDOW)
            if len(rows) < WINDOW:
                yield from sorted(rows, key=lambda row: int(row["place"]))
                return
        left, start, size = self.count(condition), 0, WINDOW
        more = f" and {condition}" if condition else ""
        while left > 0:
            try:
                rows = self.query(f"place >= {start} and place < {start + size}{more}", [*fields, "place"])
            except TooLargeError:
                size //= _SHRINKS_BY
                if not size:
                    raise
                continue
            if not rows and not self.has_any(f"place >= {start}{more}"):  # others have removed them meanwhile
                return
            yield from sorted(rows, key=lambda row: int(row["place"]))
            left, start = left - len(rows), start + size
            size = size * 2 if len(rows) < size // 4 else size  # of items that were replaced nothing is left there

    def facts(self, *, with_count: bool = True) -> Facts | None:
        """None when there is no such collection; raises DataError for one that is no index."""
        if not self._is_there():
            return None
        facts = self._described()
        self._opened, self._guard = facts, facts.guard
        self._open()
        return replace(facts, num_items=self.count()) if with_count else facts

    def _is_there(self) -> bool:
        """Whether there is such a collection; raises StoreError if there is no such database either."""
        if self.call("has_collection"):
            return True
        if self.address.database:  # of one that is not there, Milvus says only that it has no such collection
            with self._answering():
                self._client.list_collections(timeout=self.address.timeout)
        return False

    def _properties(self) -> dict[str, Any]:
        return dict(self.call("describe_collection").get("properties", {}))

    def _alter(self, properties: dict[str, str]) -> None:
        """Notes facts beside those that are there."""
        self.call("alter_collection_properties", properties=properties)

    def _described(self) -> Facts:
        """What the collection says of itself, but how many items it has; raises DataError as `facts`."""
        described = self.call("describe_collection")
        try:
            properties = described.get("properties", {})
            values = json.loads(properties[_FACTS] if self.address.lite else described["description"])
            model, version = ModelInfo(**values["model"]), values["cn_clip"]
            source, seen = (
                json.loads(properties.get(name, empty)) for name, empty in ((_SOURCE, '""'), (_PICTURES, "null"))
            )
            pictures = None if seen is None else PictureFacts(**seen)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError("this collection is no index; give another name", at=self.address) from error
        if version not in (1, FORMAT):
            raise DataError(f"is of format {version!r}, this version reads {FORMAT}; build it again", at=self.address)
        return Facts(model, 0, source, pictures, guard="" if version == 1 else str(values["guard"]))

    def create(self, model: ModelInfo, source: str, pictures: PictureFacts | None) -> None:
        """Makes the collection of the vectors of a model."""
        kinds, guard = self._package.DataType, f"built_{secrets.token_hex(8)}"
        description = json.dumps({"cn_clip": FORMAT, "model": asdict(model), "guard": guard})
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False, description=description)
        schema.add_field("key", kinds.VARCHAR, is_primary=True, max_length=2 * KEY_BYTES)
        schema.add_field("place", kinds.INT64)
        schema.add_field("item", kinds.VARCHAR, max_length=LARGEST_TEXT)
        schema.add_field("thumbnail", kinds.VARCHAR, max_length=LARGEST_TEXT)
        schema.add_field("has_thumbnail", kinds.BOOL)
        schema.add_field(COLUMNS, kinds.JSON)
        schema.add_field(guard, kinds.INT8)
        schema.add_field("vector", kinds.FLOAT_VECTOR, dim=model.embed_dim)
        # Milvus Lite keeps no descriptions.
        more = {"properties": {_FACTS: description}} if self.address.lite else {}
        self.call("create_collection", schema=schema, consistency_level="Strong", **more)
        self._hold()
        self.describe(source, pictures)
        self._open()

    def describe(self, source: str, pictures: PictureFacts | None) -> None:
        """Notes what the index was built from, and how its pictures were seen."""
        if self._opened.model.embed_dim:
            self._confirm()
            self._check_replaced(self._guard)
        seen = None if pictures is None else asdict(pictures)
        self._alter({_SOURCE: json.dumps(source), _PICTURES: json.dumps(seen)})

    def _open(self) -> None:
        """Also ends what a run that was killed had begun."""
        if not self.call("list_indexes"):
            params = self._client.prepare_index_params()
            kind, options = ("FLAT", {}) if self.address.lite else ("HNSW", GRAPH_OPTIONS)  # that of Lite misses some
            params.add_index("vector", index_type=kind, metric_type="IP", params=options)
            self.call("create_index", index_params=params)
        self.call("load_collection")

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Makes one sentence of whatever goes wrong inside."""
        try:
            yield
        except (self._grpc.RpcError, self._package.MilvusException) as error:
            if _TOO_LARGE.search(str(error)):
                reason = str(error).splitlines()[0][:200]
                raise TooLargeError(
                    f"an answer would be larger than Milvus sends ({reason})", at=self.address
                ) from error
            if is_away(error, self._grpc):
                raise away(self.address, reason_of(error)) from error
            told = refusal(error, self.address, self._grpc)
            if version := too_old(self._client, self.address.timeout):
                raise StoreError(
                    f"{told.sentence}; it is Milvus {version}, expected {OLDEST[0]}.{OLDEST[1]} or later",
                    at=self.address,
                ) from error
            raise told from error


class _Board(NamedTuple):
    """The claim of a writer as a property of a collection. Milvus changes properties one request after the other."""

    collection: Collection

    def read(self) -> str | None:
        return str(self.collection._properties().get(_LEASE, ""))

    def write(self, text: str) -> None:
        self.collection._alter({_LEASE: text})

    def erase(self) -> None:  # servers of 2.3 drop no property
        self.write("")


def _read(row: Any) -> Fields:
    """A row as `remote` reads it."""
    fields = dict(row)
    if "thumbnail" in fields:
        fields["thumbnail"] = base64.b64decode(fields["thumbnail"])
    return fields

"""A table in Postgres with pgvector: what it says of itself, and statements that end in time; rows for `remote`.

What an index is stands in the comment of its table, made with it in one transaction. Each statement about rows names a
column, the guard, that only this table has: one that was dropped and made again under the same name, perhaps of another
model, refuses it.
"""

# Q queries, D dimensions

import contextlib
import hashlib
import json
import secrets
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

from cn_clip.errors import DataError, StoreError
from cn_clip.retrieval.conditions import Condition
from cn_clip.retrieval.manifest import ModelInfo, PictureFacts
from cn_clip.retrieval.postgres_address import Address
from cn_clip.retrieval.postgres_connection import OLDEST_PGVECTOR, LostError, answering, connect, packages
from cn_clip.retrieval.postgres_language import PostgresLanguage
from cn_clip.retrieval.remote_columns import columns_of, filter_of, filter_of_field, without_fields
from cn_clip.retrieval.remote_rows import Facts, Fields, NewRow, ReplacedError, check_followed
from cn_clip.retrieval.segments import FloatArray

T = TypeVar("T")

FORMAT = 1
# Below so many rows a scan is quick, and exact.
LEAST_GRAPH = 20_000
# What pgvector makes a graph of, in dimensions: of vectors, of their halves. Of longer ones all rows are looked at.
LARGEST_OF_GRAPH, LARGEST_HALF = 2000, 4000
# Vectors of so many dimensions stay beside the other columns of their row, where a scan finds them.
LARGEST_INLINE = 1536
LEAST_EF, LARGEST_EF = 100, 1000
# Rows of one answer, of which each may have `largest_text`.
WINDOW = 2000
# How long a writer waits for one that was killed: the server notices soon.
LOCK_SECONDS = 5.0
LOST_PAUSE = 0.05

_LANGUAGE = PostgresLanguage()
_MARK = "cn_clip"


@dataclass(frozen=True)
class _Opened:
    """What the comment of a table says. change: differs after each change of rows. notes: of the writer."""

    facts: Facts
    change: str
    notes: str = ""


class Table:
    """A table on a server that answered. Several threads may use it at once."""

    name = "Postgres"
    largest_text = 1 << 20
    largest_thumbnail = 16 << 20

    def __init__(self, address: Address, *, is_reader: bool = False) -> None:
        """is_reader: goes on with a table of the same model that was made in place of the one it opened.

        Raises StoreError when no server answers within the address's timeout, MissingExtraError.
        """
        self.address, self.is_reader = address, is_reader
        self._psycopg, self._pgvector = packages()
        self._idle, self._taking = list[Any](), threading.Lock()
        # Of a writer: it has one connection, which holds the lock of the index.
        self._is_alone, self._one_at_a_time = False, threading.RLock()
        self._guard, self._before = "", _Opened(Facts(ModelInfo("", "", 0), 0, ""), "")
        # Of a commit whose answer may be lost with the connection.
        self._next_change = ""
        weakref.finalize(self, _close, self._idle)
        self._keep(self._connected())

    # --- connections

    def _run(self, act: Callable[[Any], T]) -> T:
        """What `act` returns for a connection; with a new one, within the timeout, where it was lost meanwhile."""
        deadline = time.monotonic() + self.address.timeout
        with self._one_at_a_time if self._is_alone else contextlib.nullcontext():
            while True:
                try:
                    return self._tried(act)
                except LostError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(LOST_PAUSE)

    def _tried(self, act: Callable[[Any], T]) -> T:
        with self._taking:
            connection = self._idle.pop() if self._idle else None
        connection = connection or self._connected()
        try:
            with answering(self.address, self._psycopg):
                result = act(connection)
        except BaseException:
            connection.close()
            raise
        self._keep(connection)
        return result

    def _keep(self, connection: Any) -> None:
        with self._taking:
            self._idle.append(connection)

    def _connected(self) -> Any:
        connection = connect(self.address, self._psycopg)
        try:
            with answering(self.address, self._psycopg):
                self._prepare(connection)
                if self._is_alone:
                    self._lock(connection)
        except BaseException:
            connection.close()
            raise
        return connection

    def _prepare(self, connection: Any) -> None:
        """Has the server keep to the timeout, and looks for pgvector."""
        connection.execute(
            "SELECT set_config('statement_timeout', %s, false), set_config('tcp_keepalives_idle', '30', false), "
            "set_config('tcp_keepalives_interval', '10', false), set_config('tcp_keepalives_count', '3', false)",
            [f"{max(1, round(self.address.timeout * 1000))}"],
        )
        self._find_pgvector(connection)

    def _find_pgvector(self, connection: Any) -> bool:
        """Whether the database has it; raises StoreError for an old one."""
        found = connection.execute(
            "SELECT extversion, nspname FROM pg_extension JOIN pg_namespace ON pg_namespace.oid = extnamespace "
            "WHERE extname = 'vector'"
        ).fetchone()
        if found is None:
            return False
        if tuple(int(part) for part in found[0].split(".")[:2]) < OLDEST_PGVECTOR:
            raise StoreError(
                f"the database has pgvector {found[0]}, expected {'.'.join(map(str, OLDEST_PGVECTOR))} or later; "
                "update it, then run ALTER EXTENSION vector UPDATE there",
                at=self.address,
            )
        # It may be in a schema of its own.
        connection.execute(
            "SELECT set_config('search_path', current_setting('search_path') || ', ' || quote_ident(%s), false)",
            [found[1]],
        )
        self._pgvector.register_vector(connection)
        return True

    # --- a writer by itself

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """By an advisory lock, which the server gives back with the connection of its holder."""
        with self._taking:
            _close(self._idle)
        self._is_alone = True
        try:
            self._keep(self._connected())
            yield
        finally:
            self._is_alone = False
            with self._taking:
                _close(self._idle)

    def _lock(self, connection: Any) -> None:
        (schema,) = connection.execute("SELECT current_schema()").fetchone()
        number = hashlib.blake2b(f"{_MARK} {schema} {self.address.name}".encode(), digest_size=8).digest()
        deadline = time.monotonic() + min(LOCK_SECONDS, self.address.timeout)
        asked = "SELECT pg_try_advisory_lock(%s)", [int.from_bytes(number, "big", signed=True)]
        while not connection.execute(*asked).fetchone()[0]:
            if time.monotonic() > deadline:
                raise StoreError("another process is changing this index; wait for it, or end it", at=self.address)
            time.sleep(0.1)
        if self._guard:
            now = self._described(connection)
            if (
                now is not None
                and now.facts.guard == self._guard
                and now.change not in (self._before.change, self._next_change)
            ):
                raise StoreError(
                    "another process has changed this index while the connection was lost; run the command again",
                    at=self.address,
                )

    # --- what the table says of itself

    def ping(self) -> None:
        """Asks for as little as shows that the server answers."""
        self._run(lambda connection: connection.execute("SELECT 1"))

    def facts(self, *, with_count: bool = True) -> Facts | None:
        """None when there is no such table; raises DataError for one that is no index."""
        found = self._run(self._described)
        if found is None:
            return None
        self._before, self._guard = found, found.facts.guard
        return replace(found.facts, num_items=self.count()) if with_count else found.facts

    def _described(self, connection: Any) -> _Opened | None:
        found = connection.execute(
            "SELECT obj_description(oid, 'pg_class'), relkind = 'r' FROM pg_class WHERE oid = to_regclass(%s)",
            [self._quoted],
        ).fetchone()
        if found is None:
            return None
        try:
            values = json.loads(found[0])
            version, change = values[_MARK], values["change"]
            model, seen, notes = ModelInfo(**values["model"]), values["pictures"], str(values.get("notes", ""))
            pictures = None if seen is None else PictureFacts(**seen)
            facts = Facts(model, 0, values["source"], pictures, guard=values["guard"], engine="pgvector")
        except (ValueError, TypeError, KeyError) as error:
            raise DataError("this table is no index; give another name", at=self.address) from error
        if version != FORMAT:
            raise DataError(f"is of format {version!r}, this version reads {FORMAT}; build it again", at=self.address)
        return _Opened(facts, change, notes)

    def create(self, model: ModelInfo, source: str, pictures: PictureFacts | None) -> None:
        """Makes the table of the vectors of a model, and pgvector in the database where the user may."""
        guard = f"built_{secrets.token_hex(8)}"
        opened = _Opened(Facts(model, 0, source, pictures, guard=guard, engine="pgvector"), "")

        def made(connection: Any) -> None:
            if not self._find_pgvector(connection):
                self._make_pgvector(connection)
            with connection.transaction():
                connection.execute(
                    f'CREATE TABLE {self._quoted} (key text COLLATE "C" PRIMARY KEY, place bigint NOT NULL, '
                    "item text NOT NULL, thumbnail bytea NOT NULL, columns jsonb NOT NULL, "
                    f"vector vector({model.embed_dim}) NOT NULL, {guard} boolean)"
                )
                connection.execute(f"ALTER TABLE {self._quoted} ALTER thumbnail SET STORAGE EXTERNAL")
                if model.embed_dim <= LARGEST_INLINE:
                    connection.execute(f"ALTER TABLE {self._quoted} ALTER vector SET STORAGE PLAIN")
                connection.execute(f"CREATE INDEX ON {self._quoted} (place)")
                connection.execute(f"CREATE INDEX ON {self._quoted} USING gin (columns jsonb_path_ops)")
                self._note(connection, opened)

        self._run(made)
        self._before, self._guard = opened, guard

    def _make_pgvector(self, connection: Any) -> None:
        errors = self._psycopg.errors
        try:
            connection.execute("CREATE EXTENSION IF NOT EXISTS vector")
        except (errors.UndefinedFile, errors.FeatureNotSupported) as error:
            raise StoreError(
                "the server has no pgvector; install it there, or use the image pgvector/pgvector", at=self.address
            ) from error
        except errors.InsufficientPrivilege as error:
            raise StoreError(
                "the database has no pgvector, and this user may not make it; have an administrator run "
                "CREATE EXTENSION vector there",
                at=self.address,
            ) from error
        self._find_pgvector(connection)

    def _note(self, connection: Any, opened: _Opened) -> None:
        """Writes the comment; it is a literal in all statements that make one."""
        facts = opened.facts
        seen = None if facts.pictures is None else asdict(facts.pictures)
        text = json.dumps(
            {
                _MARK: FORMAT,
                "model": asdict(facts.model),
                "guard": facts.guard,
                "change": opened.change,
                "notes": opened.notes,
                "source": facts.source,
                "pictures": seen,
            }
        )
        literal = self._psycopg.sql.Literal(text).as_string(connection)
        connection.execute(f"COMMENT ON TABLE {self._quoted} IS {literal}")

    def describe(self, source: str, pictures: PictureFacts | None) -> None:
        """Notes what the index was built from, and how its pictures were seen."""
        now = replace(self._before, facts=replace(self._before.facts, source=source, pictures=pictures))

        def noted(connection: Any, guard: str) -> None:
            with connection.transaction():
                connection.execute(f"SELECT {guard} FROM {self._quoted} LIMIT 0")
                self._note(connection, now)

        self._guarded(noted)
        self._before = now

    @property
    def _quoted(self) -> str:
        """Its letters are those of `postgres_address`."""
        return f'"{self.address.name}"'

    # --- rows

    def _guarded(self, act: Callable[[Any, str], T]) -> T:
        """What `act` returns for the table that was opened, or for the one that a reader may follow."""
        errors, guard = self._psycopg.errors, self._guard

        def tried(connection: Any) -> T | None:
            try:
                return act(connection, guard)
            except (errors.UndefinedColumn, errors.UndefinedTable, errors.FeatureNotSupported):
                self._check_replaced(connection, guard)
                if self._guard == guard:
                    raise
            return act(connection, self._guard)

        return self._run(tried)  # type: ignore[return-value]

    def _check_replaced(self, connection: Any, guard: str) -> None:
        """Raises ReplacedError where the table is another one now; a reader goes on with one of the same model."""
        try:
            now = self._described(connection)
        except DataError as error:
            raise ReplacedError(f"the table was made again by another program ({error})", at=self.address) from error
        if now is None:
            raise ReplacedError("the table is gone since it was opened; build it again", at=self.address)
        if now.facts.guard != guard:
            check_followed(now.facts, self._before.facts, is_reader=self.is_reader, at=self.address)
            self._before, self._guard = now, now.facts.guard

    def _asked(
        self,
        fields: Sequence[str],
        condition: str | None,
        more: str = "",
        values: Sequence[Any] = (),
        *,
        by_index: bool = False,
    ) -> list[Fields]:
        """by_index: looks at all rows only where no index helps."""

        def rows(connection: Any, guard: str) -> list[Fields]:
            asked = f"SELECT {', '.join(fields)} FROM {self._quoted} {_where(condition, guard)} {more}"
            with connection.transaction() if by_index else contextlib.nullcontext():
                if by_index:
                    connection.execute("SET LOCAL enable_seqscan = off")
                found = connection.execute(asked, values, binary=True).fetchall()
            return [_read(fields, row) for row in found]

        return self._guarded(rows)

    def query(self, condition: str | None, fields: Sequence[str], *, limit: int | None = None) -> list[Fields]:
        """The rows that a filter of Postgres admits, in any order, at most `limit`."""
        # With a limit the planner thinks a scan ends soon, and leaves the index of conditions aside.
        more, by_index = ("", False) if limit is None else (f"LIMIT {limit}", condition is not None)
        return self._asked(fields, condition, more, by_index=by_index)

    def count(self, condition: str | None = None) -> int:
        """How many rows it admits."""
        return int(self._asked(["count(*)"], condition)[0]["count(*)"])

    def nearest(
        self, vectors_QD: FloatArray, limit: int, fields: Sequence[str], condition: str | None
    ) -> list[list[Fields]]:
        """For each vector up to `limit` rows, the nearest, or about so with a graph; in one exchange."""
        dim = vectors_QD.shape[1]
        is_half = LARGEST_OF_GRAPH < dim <= LARGEST_HALF
        near = f"vector::halfvec({dim}) <#> %s::halfvec({dim})" if is_half else "vector <#> %s"
        ef = min(max(limit, LEAST_EF), LARGEST_EF)

        def rows(connection: Any, guard: str) -> list[list[Fields]]:
            asked = f"SELECT {', '.join(fields)} FROM {self._quoted} {_where(condition, guard)}"
            asked = f"{asked} ORDER BY {near} LIMIT {limit}"
            self._widen(connection, ef)
            # Several vectors in one exchange; of one, an exchange by itself is quicker.
            with connection.pipeline() if len(vectors_QD) > 1 else contextlib.nullcontext():
                found = [connection.execute(asked, [one.astype("float32")], binary=True) for one in vectors_QD]
                return [[_read(fields, row) for row in one.fetchall()] for one in found]

        return self._guarded(rows)

    def _widen(self, connection: Any, ef: int) -> None:
        """Has the graph look at so many candidates, if there is one; it stays so for the connection."""
        if ef > getattr(connection, "ef", 0):
            connection.execute(
                "SELECT set_config('hnsw.ef_search', %s, false), "
                "set_config('hnsw.iterative_scan', 'relaxed_order', false)",
                [str(ef)],
            )
            connection.ef = ef

    def of_keys(self, keys: Sequence[str], fields: Sequence[str]) -> Iterator[Fields]:
        """The rows with these keys, in any order."""
        for start in range(0, len(keys), WINDOW):
            some = list(keys[start : start + WINDOW])
            yield from self._asked(fields, "key = ANY(%s)", values=[some])

    def scan(self, fields: Sequence[str], condition: str | None = None) -> Iterator[Fields]:
        """The rows that a filter admits, in order of insertion; memory: `WINDOW` of them."""
        after, names = -1, list(dict.fromkeys([*fields, "place"]))
        while True:
            left = f"place > {after}" if condition is None else f"({condition}) AND place > {after}"
            rows = self._asked(names, left, f"ORDER BY place LIMIT {WINDOW}")
            yield from rows
            if len(rows) < WINDOW:
                return
            after = int(rows[-1]["place"])

    def filter_of(self, condition: Condition) -> str | None:
        """See `remote_columns`."""
        return filter_of(condition, _LANGUAGE)

    def with_field(self, field: str) -> list[Fields]:
        """At most one."""
        return self.query(filter_of_field(field, _LANGUAGE), ["item"], limit=1)

    def is_sure_of_fields(self) -> bool:
        """Not where rows do not note their fields."""
        return not self.query(without_fields(_LANGUAGE), ["key"], limit=1)

    def has_thumbnails(self) -> bool:
        """Whether any row has one."""
        return bool(self.query("length(thumbnail) > 0", ["key"], limit=1))

    def with_thumbnail(self, keys: Sequence[str]) -> set[str]:
        """Those of the keys whose rows have one."""
        rows = self._asked(["key"], "key = ANY(%s) AND length(thumbnail) > 0", values=[list(keys)])
        return {row["key"] for row in rows}

    def next_place(self) -> int:
        """By the index of places."""
        last = self._asked(["place"], None, "ORDER BY place DESC LIMIT 1")
        return int(last[0]["place"]) + 1 if last else 0

    def notes(self) -> bytes:
        """In the comment."""
        return self._before.notes.encode()

    def write(self, rows: Sequence[NewRow], remove: Sequence[str], notes: bytes | None = None) -> None:
        """In one transaction."""
        gone, self._next_change = [*(row.key for row in rows), *remove], secrets.token_hex(8)
        now = replace(self._before, change=self._next_change)
        if notes is not None:
            now = replace(now, notes=notes.decode())

        def written(connection: Any, guard: str) -> None:
            with connection.transaction():
                connection.execute(f"DELETE FROM {self._quoted} {_where('key = ANY(%s)', guard)}", [gone])
                if rows:
                    self._copy(connection, rows)
                self._note(connection, now)

        self._guarded(written)
        self._before = now

    def _copy(self, connection: Any, rows: Sequence[NewRow]) -> None:
        columns = "key, place, item, thumbnail, columns, vector"
        with (
            connection.cursor() as cursor,
            cursor.copy(f"COPY {self._quoted} ({columns}) FROM STDIN (FORMAT BINARY)") as copy,
        ):
            copy.set_types(["text", "int8", "text", "bytea", "jsonb", "vector"])
            for row in rows:
                item = row.item
                held = self._psycopg.types.json.Jsonb(columns_of(item.id, item.metadata))
                vector = item.vector_D.astype("float32")
                copy.write_row((row.key, row.place, row.line.decode(), item.thumbnail, held, vector))

    def finish(self, num_written: int) -> None:
        """Makes the graph of a table that has become large, and has the planner look at what was written."""
        if not num_written:
            return
        dim, is_large = self._before.facts.model.embed_dim, self.count() >= LEAST_GRAPH

        def made(connection: Any, guard: str) -> None:
            limit, connection.limit.seconds = connection.limit.seconds, None
            try:
                with connection.transaction():
                    connection.execute("SET LOCAL statement_timeout = 0")
                    connection.execute(f"SELECT {guard} FROM {self._quoted} LIMIT 0")
                    connection.execute(f"ANALYZE {self._quoted}")
                    if is_large and dim <= LARGEST_HALF and not self._has_graph(connection):
                        what = "vector vector_ip_ops"
                        if dim > LARGEST_OF_GRAPH:
                            what = f"(vector::halfvec({dim})) halfvec_ip_ops"
                        connection.execute(f"CREATE INDEX ON {self._quoted} USING hnsw ({what})")
            finally:
                connection.limit.seconds = limit

        self._guarded(made)

    def _has_graph(self, connection: Any) -> bool:
        found = connection.execute(
            "SELECT 1 FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid JOIN pg_am ON pg_am.oid = relam "
            "WHERE indrelid = to_regclass(%s) AND amname = 'hnsw' AND indisvalid",
            [self._quoted],
        )
        return found.fetchone() is not None


def _close(connections: list[Any]) -> None:
    for one in connections:
        one.close()
    connections.clear()


def _where(condition: str | None, guard: str) -> str:
    return f"WHERE {guard} IS NULL" + (f" AND ({condition})" if condition else "")


def _read(fields: Sequence[str], row: Sequence[Any]) -> Fields:
    found = dict(zip(fields, row, strict=True))
    if "vector" in found:
        found["vector"] = found["vector"].to_numpy()
    return found

"""A collection on a Milvus server: where it is, what it says of itself, and calls that end in time; for `milvus`."""

import contextlib
import json
import logging
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias
from urllib.parse import parse_qs, unquote, urlsplit

from cn_clip import extras
from cn_clip.errors import ConfigError, DataError, StoreError
from cn_clip.retrieval.manifest import ModelInfo, PictureFacts

SCHEME = "milvus://"
GRAMMAR = "expected milvus://HOST:PORT/COLLECTION, the name of letters, digits and _"
DEFAULT_PORT = 19530
DEFAULT_TIMEOUT = 20.0

FORMAT = 1
GRAPH_OPTIONS = {"M": 16, "efConstruction": 200}
# Milvus measures it in bytes of UTF-8.
LARGEST_TEXT = 65535
KEY_BYTES = 16
# Rows without their vectors in one answer: some 10 MB.
WINDOW = 8192
RETRY_PAUSE = 0.5

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,254}")
_SOURCE, _PICTURES = "cn_clip.source", "cn_clip.pictures"
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
    # A password may hold anything, `@` and `/` too.
    without_password = re.sub(r"^([a-z]*:)?.*@", r"\1//", text, flags=re.DOTALL)
    refused = ConfigError(f"{without_password}: {GRAMMAR}; after it at most ?timeout=SECONDS")
    try:
        parts = urlsplit(text)
        port, settings = parts.port or DEFAULT_PORT, parse_qs(parts.query, strict_parsing=bool(parts.query))
        timeout = float(settings.pop("timeout", [str(DEFAULT_TIMEOUT)])[-1])
    except ValueError:  # which may repeat the password
        raise refused from None
    name = parts.path.removeprefix("/")
    is_name = _NAME.fullmatch(name) is not None
    if parts.scheme != "milvus" or not parts.hostname or not is_name or settings or not 0 < timeout < 86400:
        raise refused
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    return Address(parts.hostname, port, name, timeout, user, password)


@dataclass(frozen=True)
class Facts:
    """What a collection says of itself, and how many items it has."""

    model: ModelInfo
    num_items: int
    source: str
    pictures: PictureFacts | None = None
    engine: str = "milvus"
    vector_type: str = "float32"


class Collection:
    """A collection on a server that answered."""

    def __init__(self, address: Address) -> None:
        """Raises StoreError when no server answers within the address's timeout, MissingExtraError."""
        self.address = address
        self._package, self._grpc = (
            extras.require(name, extra="milvus", purpose="an index in Milvus") for name in ("pymilvus", "grpc")
        )
        # It logs tracebacks of what it raises as well.
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)
        host = f"[{address.host}]" if ":" in address.host else address.host
        uri, deadline = f"http://{host}:{address.port}", time.monotonic() + address.timeout
        while True:
            left = max(deadline - time.monotonic(), RETRY_PAUSE)
            with self._answering():
                try:
                    self._client = self._package.MilvusClient(
                        uri=uri, user=address.user, password=address.password, timeout=left
                    )
                    return
                except self._package.MilvusException as error:
                    if error.code != _NO_CONNECTION or time.monotonic() + RETRY_PAUSE > deadline:
                        raise
            time.sleep(RETRY_PAUSE)

    def call(self, method: str, **options: Any) -> Any:
        """What the client's method returns for this collection; raises StoreError."""
        with self._answering():
            function = getattr(self._client, method)
            return function(collection_name=self.address.collection, timeout=self.address.timeout, **options)

    def query(self, condition: str, fields: Sequence[str]) -> list[Fields]:
        """The rows that Milvus's own condition admits, in any order; all that was written before is seen."""
        found = self.call("query", filter=condition, output_fields=list(fields), consistency_level="Strong")
        return [dict(one) for one in found]

    def of_keys(self, keys: Sequence[str], fields: Sequence[str], condition: str = "") -> Iterator[Fields]:
        """As `query`, of the rows with these keys; one call for `WINDOW` of them."""
        for start in range(0, len(keys), WINDOW):
            chosen = f"key in {json.dumps(keys[start : start + WINDOW])}"
            yield from self.query(f"{chosen} and {condition}" if condition else chosen, fields)

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

    def facts(self) -> Facts | None:
        """None when there is no such collection; raises DataError for one that is no index."""
        if not self.call("has_collection"):
            return None
        described = self.call("describe_collection")
        try:
            values = json.loads(described["description"])
            model, version = ModelInfo(**values["model"]), values["cn_clip"]
            properties = described.get("properties", {})
            source, seen = (
                json.loads(properties.get(name, empty)) for name, empty in ((_SOURCE, '""'), (_PICTURES, "null"))
            )
            pictures = None if seen is None else PictureFacts(**seen)
        except (ValueError, TypeError, KeyError) as error:
            raise DataError("this collection is no index; give another name", at=self.address) from error
        if version != FORMAT:
            raise DataError(f"is of format {version!r}, this version reads {FORMAT}; build it again", at=self.address)
        self._open()
        return Facts(model, self.count(), source, pictures)

    def require(self) -> Facts:
        """Raises DataError when there is no such collection."""
        facts = self.facts()
        if facts is None:
            raise DataError(
                f"is no index; build one with: cn-clip index build PICTURES --output {self.address}", at=self.address
            )
        return facts

    def create(self, model: ModelInfo, source: str, pictures: PictureFacts | None) -> None:
        """Makes the collection of the vectors of a model."""
        kinds = self._package.DataType
        description = json.dumps({"cn_clip": FORMAT, "model": asdict(model)})
        schema = self._client.create_schema(auto_id=False, enable_dynamic_field=False, description=description)
        schema.add_field("key", kinds.VARCHAR, is_primary=True, max_length=2 * KEY_BYTES)
        schema.add_field("place", kinds.INT64)
        schema.add_field("item", kinds.VARCHAR, max_length=LARGEST_TEXT)
        schema.add_field("thumbnail", kinds.VARCHAR, max_length=LARGEST_TEXT)
        schema.add_field("vector", kinds.FLOAT_VECTOR, dim=model.embed_dim)
        self.call("create_collection", schema=schema, consistency_level="Strong")
        self.describe(source, pictures)
        self._open()

    def describe(self, source: str, pictures: PictureFacts | None) -> None:
        """Notes what the index was built from, and how its pictures were seen."""
        seen = None if pictures is None else asdict(pictures)
        self.call("alter_collection_properties", properties={_SOURCE: json.dumps(source), _PICTURES: json.dumps(seen)})

    def _open(self) -> None:
        """Also ends what a run that was killed had begun."""
        if not self.call("list_indexes"):
            params = self._client.prepare_index_params()
            params.add_index("vector", index_type="HNSW", metric_type="IP", params=GRAPH_OPTIONS)
            self.call("create_index", index_params=params)
        self.call("load_collection")

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Makes one sentence of whatever goes wrong inside."""
        try:
            yield
        except (self._grpc.RpcError, self._package.MilvusException) as error:
            code = error.code() if isinstance(error, self._grpc.RpcError) else error.code
            name = getattr(code, "name", "")
            reason = str(getattr(error, "message", "") or name or error).splitlines()[0][:200]
            if name in ("DEADLINE_EXCEEDED", "UNAVAILABLE") or code == _NO_CONNECTION or "timeout" in reason.lower():
                raise StoreError(
                    f"Milvus did not answer within {self.address.timeout:g} s ({reason}); check that it runs there, or "
                    "give it more time with ?timeout=SECONDS after the address",
                    at=self.address,
                ) from error
            raise StoreError(f"Milvus refused the request ({reason})", at=self.address) from error

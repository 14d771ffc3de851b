"""How Postgres is asked about the columns of rows, kept as jsonb; `postgres_table` uses it.

What is asked with `@>` is found by a GIN index. No value of a condition stands in it as it was typed: keys and digests
are hexadecimal, texts letters from a to p.
"""

import json
from collections.abc import Sequence
from typing import Any

from cn_clip.retrieval.remote_columns import COLUMNS


class PostgresLanguage:
    """See `remote_columns.Language`."""

    def has(self, key: str) -> str:
        """columns @> '{"has": ["0a1b"]}'"""
        return _contains({"has": [key]})

    def is_rough(self, keys: Sequence[str]) -> str:
        """Any of them."""
        return _any([{"rough": [key]} for key in keys])

    def holds_text(self, key: str, digests: Sequence[str]) -> str:
        """Any of them."""
        return _any([{key: {"t": [digest]}} for digest in digests])

    def holds_pairs(self, key: str, pairs: Sequence[int]) -> str:
        """All of them."""
        return _contains({key: {"g": list(pairs)}})

    def bound(self, key: str, kind: str, end: int, sign: str, value: float | str) -> str:
        """coalesce((columns #>> '{0a1b,n,0}')::float8 <= 2.5, false)"""
        told = f"{COLUMNS} #>> '{{{key},{kind},{end}}}'"
        if isinstance(value, str):
            return f"coalesce(({told}) COLLATE \"C\" {sign} '{value}', false)"
        return f"coalesce(({told})::float8 {sign.replace('==', '=')} {value!r}::float8, false)"


def _contains(part: dict[str, Any]) -> str:
    return f"{COLUMNS} @> '{json.dumps(part)}'"


def _any(parts: Sequence[dict[str, Any]]) -> str:
    return "(" + " or ".join(_contains(part) for part in parts) + ")"

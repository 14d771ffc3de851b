"""How Milvus is asked about the columns of rows; `milvus_collection` uses it. All versions since 2.3 know these."""

import json
from collections.abc import Sequence

from cn_clip.retrieval.remote_columns import COLUMNS


class MilvusLanguage:
    """See `remote_columns.Language`."""

    def has(self, key: str) -> str:
        """json_contains(columns["has"], "0a1b")"""
        return f'json_contains({COLUMNS}["has"], "{key}")'

    def is_rough(self, keys: Sequence[str]) -> str:
        """One key, or any of several."""
        if len(keys) == 1:
            return f'json_contains({COLUMNS}["rough"], "{keys[0]}")'
        return f'json_contains_any({COLUMNS}["rough"], {json.dumps(list(keys))})'

    def holds_text(self, key: str, digests: Sequence[str]) -> str:
        """Any of them."""
        return f'json_contains_any({COLUMNS}["{key}"]["t"], {json.dumps(list(digests))})'

    def holds_pairs(self, key: str, pairs: Sequence[int]) -> str:
        """All of them."""
        return f'json_contains_all({COLUMNS}["{key}"]["g"], {json.dumps(list(pairs))})'

    def bound(self, key: str, kind: str, end: int, sign: str, value: float | str) -> str:
        """columns["0a1b"]["n"][0] <= 2.5"""
        return f'{COLUMNS}["{key}"]["{kind}"][{end}] {sign} {json.dumps(value)}'

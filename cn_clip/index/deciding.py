"""Which pictures of a source have to be read, by what the index knows of them: sizes, times, tables, failures."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from cn_clip.data import facts
from cn_clip.index.failures import Failures
from cn_clip.index.skips import Skipped, too_small
from cn_clip.index.sources import FACTS, OWN_FIELDS, TABLE_FIELDS, Candidate, Table, row_of
from cn_clip.retrieval.segments import ItemId


@dataclass
class Decision:
    """pending: to be read, with all metadata that is known before; skipped: why others do not go into the index."""

    pending: list[Candidate] = field(default_factory=list)
    num_unchanged: int = 0
    skipped: list[tuple[Candidate, Skipped]] = field(default_factory=list)


def decide(
    candidates: Iterable[Candidate],
    known: Mapping[ItemId, Mapping[str, Any]],
    failures: Failures,
    *,
    table: Table | None,
    id_prefix: str,
    min_size: int,
    needed: Collection[str] = (),
) -> Decision:
    """known: the metadata of the items of the index. needed: fields without which a picture is read again.

    Without a table, an item keeps the metadata it had. What a table says of a picture goes before what the source and
    the picture itself say.
    """
    decision = Decision()
    for one in candidates:
        before = known.get(one.id, {})
        seen, kept = parted(before)
        seen.pop("live", None)  # the other half of a Live Photo may be gone
        more: Mapping[str, Any] = kept
        if table is not None:
            row = row_of(table, one.id, id_prefix) or {}
            told = sorted(row.keys() & set(FACTS))
            more = {**row, TABLE_FIELDS: told} if told else row
        # A caption of the table goes before one of the source.
        caption = {"caption": more["caption"]} if "caption" in more else {}
        wanted = {**more, **one.metadata, **caption}
        if one.is_dated and before == {**seen, **wanted} and before.keys() >= set(needed):
            if skipped := too_small(one.id, before, min_size):
                decision.skipped.append((one, skipped))
            else:
                decision.num_unchanged += 1
        elif failure := failures.find(one.metadata, min_size=min_size):
            skipped = Skipped(one.id, failure.reason, failure.kind, is_remembered=True)
            decision.skipped.append((one, skipped))
        else:
            name = facts.of_name(one.id, id_prefix) if one.is_dated else {}
            decision.pending.append(replace(one, metadata={**name, **wanted}))
    return decision


def parted(known: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields of an item that come from its file, and those that it keeps when the file has changed."""
    kept = {TABLE_FIELDS, *known.get(TABLE_FIELDS, ())}
    of_file = {*OWN_FIELDS, *FACTS} - kept
    own = {name: value for name, value in known.items() if name in of_file}
    return own, {name: value for name, value in known.items() if name not in of_file}

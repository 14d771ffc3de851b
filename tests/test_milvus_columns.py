"""What a condition asks a Milvus server for: never less than it admits, whatever items and conditions hold."""

import functools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import stores
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cn_clip.errors import ConfigError
from cn_clip.retrieval import addresses, remote_columns, store
from cn_clip.retrieval.conditions import parse_condition
from cn_clip.retrieval.manifest import Manifest, ModelInfo
from cn_clip.retrieval.milvus_collection import Collection
from cn_clip.retrieval.milvus_language import MilvusLanguage
from cn_clip.retrieval.postgres_table import Table
from cn_clip.retrieval.remote import RemoteIndex
from cn_clip.retrieval.remote_columns import columns_of
from cn_clip.retrieval.writer import NewItem, open_writer

filter_of = functools.partial(remote_columns.filter_of, language=MilvusLanguage())
filter_of_field = functools.partial(remote_columns.filter_of_field, language=MilvusLanguage())

TEXTS = [
    *("a", "A", "Ａ", "b", "海", "山", "abc", "", "a b", "x'y", 'q"u', "\\", "%", "_", "é", "e\u0301", "٣", "null"),
    *("2021", "2021-05", "2021-05-03", "2021-05-03 14:22:10", "2021-05-03T14:22:10", "2021-05-03 1", "2021/5"),
    *("5", "5.0", "-3", "1e3", "1e999", "true", "True", "nan", "inf", "a" * 30, "a" * 30 + "b", "z" * 500),
]
NUMBERS = [5, 0, -3, 2021, 2**53, 2**53 + 1, -(2**53) - 1, 2**70, 5.0, 0.1, -0.0, 1e308, 1.7e308]
FIELDS = ["f", "g", "价格(元)", "path", "id"]
ASKED = [
    *("2021", "2021-05", "2021/5", "2021-05-03", "2021-05-03T14", "2021-05-03T14:22:10", "5", "5.0", "-3", "1e3", "海"),
    *("a", "abc", "true", "9007199254740993", "9007199254740992", "1e999", "2020..2022", "2021-04..2021-06", "1..5"),
    *("2021-05..2022", "0.1", "a" * 31, "5.", "0"),
]

texts = st.one_of(st.sampled_from([*TEXTS, "\ud800"]), st.text(max_size=6))
numbers = st.one_of(st.sampled_from([*NUMBERS, 10**400, float("inf")]), st.integers(-5, 5), st.integers(), st.floats())
scalars = st.one_of(texts, numbers, st.booleans(), st.none())
values = st.one_of(
    scalars,
    st.lists(scalars, max_size=4),
    st.dictionaries(texts, scalars, max_size=2),
    st.lists(st.lists(scalars, max_size=2), max_size=2),
)
items = st.tuples(
    st.one_of(st.integers(), texts), st.dictionaries(st.sampled_from(["f", "g", "价格(元)", "id"]), values, max_size=4)
)


def quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@st.composite
def terms(draw: st.DrawFn) -> str:
    sign = draw(st.sampled_from(["=", "!=", ">=", "<=", ">", "<", "~", "!~"]))
    asked = st.one_of(texts.map(quoted), st.sampled_from(ASKED))
    several = draw(st.lists(asked, min_size=1, max_size=3 if sign in ("=", "!=", "~", "!~") else 1))
    return draw(st.sampled_from(FIELDS)) + sign + ",".join(several)


conditions = st.recursive(
    terms(),
    lambda one: st.one_of(
        st.tuples(one, one).map(lambda both: f"({both[0]} or {both[1]})"),
        st.tuples(one, one).map(lambda both: f"({both[0]} {both[1]})"),
        one.map(lambda text: f"not ({text})"),
    ),
    max_leaves=4,
)


class Truth:
    """True, false or, where a server says so of what a row lacks, neither."""

    def __init__(self, value: bool | None) -> None:
        self.value = value

    def __and__(self, other: "Truth") -> "Truth":
        both = (self.value, other.value)
        return Truth(False if False in both else None if None in both else True)

    def __or__(self, other: "Truth") -> "Truth":
        return ~(~self & ~other)

    def __invert__(self) -> "Truth":
        return Truth(None if self.value is None else not self.value)


def answered(asked: str, columns: dict[str, Any], of_missing: bool | None) -> bool:
    """What a server says of a row; of_missing: what a comparison with what it lacks is, false or neither."""

    def found(*path: Any) -> Any:
        at: Any = columns
        for one in path:
            at = at[one] if (isinstance(at, dict) and one in at) or isinstance(at, list) else None
        return at

    def contains(path: tuple[Any, ...], wanted: list[Any], how: Any) -> Truth:
        there = found(*path)
        return Truth(of_missing if there is None else how(one in there for one in wanted))

    def compared(path: tuple[Any, ...], sign: str, wanted: Any) -> Truth:
        there = found(*path)
        if there is None:
            return Truth(of_missing)
        signs = {"<": there < wanted, "<=": there <= wanted, ">": there > wanted, ">=": there >= wanted}
        return Truth({**signs, "==": there == wanted}[sign])

    path = r'columns((?:\["?\w+"?\])+)'
    python = re.sub(rf'{path} (<=|>=|<|>|==) ("[^"]*"|[-+.\w]+)', r"compared(P\1E, '\2', \3)", asked)
    python = re.sub(rf"json_contains_(any|all)\({path}, (\[.*?\])\)", r"contains(P\2E, \3, \1)", python)
    python = re.sub(rf'json_contains\({path}, ("[^"]*")\)', r"contains(P\1E, [\2], any)", python)
    python = python.replace("P[", "(").replace("][", ",").replace("]E", ",)")
    for word, sign in (("and", "&"), ("or", "|"), ("not", "~")):
        python = re.sub(rf"(?<=[ (]){word}(?= )", sign, python)
    return eval(python, {"compared": compared, "contains": contains, "any": any, "all": all}).value is True


def as_sent(item_id: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    """The columns as a server holds them."""
    sent: dict[str, Any] = json.loads(json.dumps(columns_of(item_id, metadata), allow_nan=False))
    return sent


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(items, min_size=1, max_size=4), st.lists(conditions, min_size=1, max_size=4))
@example([(0, {"f": [2**53 + 1]}), (1, {"f": None}), (2, {})], ["f!=9007199254740992", "not f>5", "f!=海"])
@example([(0, {"f": "2021-05-03 14"})], ["not f<2021-05-03T10", 'not f>="2021-05-03 1"'])
@example([(0, {"f": float("nan")})], ["f=nan", "f!=5", "f~na"])
def test_a_filter_admits_all_that_the_condition_admits(rows: list[Any], asked: list[str]) -> None:
    sent = [as_sent(*one) for one in rows]
    for text in asked:
        try:
            condition = parse_condition(text)
        except ConfigError:
            continue
        told = filter_of(condition)
        for (item_id, metadata), columns in zip(rows, sent, strict=True):
            try:
                is_wanted = condition.admits(item_id, metadata)
            except ValueError:  # of a number of more digits than Python writes
                continue
            for of_missing in (False, None):
                if is_wanted and told is not None:
                    assert answered(told, columns, of_missing), (text, item_id, metadata)


@pytest.mark.parametrize(
    ("text", "fits", "others"),
    [
        ("f=海", "海", ["山", None, 5]),
        ("f=5", "5.0", [6, "山", None]),
        ("f=5,7,山", 7, [6, "海", None]),
        ("f>=2021", 2021.5, [2020, None, "2020"]),
        ("f=2021-05", "2021-05-03 14:22:10", ["2021-04-30", "2021-06-01", None, 5]),
        ("f=2021-04..2021-06", "2021-05-03", ["2021-03-31", "2021-07", None]),
        ("f=1..5", 3, [0, 6, None]),
        ("f~旅行", "我的旅行 1", ["旅店", None, 5]),
        ("f!=海", "山", ["海"]),
        ("not f=5", 6, [5, "5.0"]),
        ("f=海 and not g=1", "海", ["山", None]),
    ],
)
def test_a_filter_leaves_out_what_does_not_fit(text: str, fits: Any, others: list[Any]) -> None:
    told = filter_of(parse_condition(text))
    assert told is not None
    for value, is_wanted in ((fits, True), *((one, False) for one in others)):
        metadata = {} if value is None else {"f": value}
        assert answered(told, as_sent("x", metadata), None) is is_wanted, value


def test_what_would_ask_for_all_is_not_asked() -> None:
    assert filter_of(parse_condition("f!~a")) is None
    assert filter_of(parse_condition("f=1 or f!~a")) is None
    assert filter_of(parse_condition("not f~a f=1")) == filter_of(parse_condition("f=1"))
    many = ",".join(str(number) for number in range(900))
    told = filter_of(parse_condition(f"f={many}"))
    assert told is not None
    assert len(told) < remote_columns.LARGEST_FILTER
    assert answered(told, as_sent(0, {"f": 899.0}), False)
    assert not answered(told, as_sent(0, {"f": 900}), False)


def test_items_of_too_many_or_too_large_fields_are_told_in_part() -> None:
    large = {"small": 1, "large": [f"{number}" for number in range(5000)]}
    columns = as_sent("x", large)
    assert len(json.dumps(columns)) < remote_columns.LARGEST_COLUMNS
    assert answered(str(filter_of(parse_condition("small=1"))), columns, None)
    assert not answered(str(filter_of(parse_condition("small=2"))), columns, None)
    assert answered(str(filter_of(parse_condition("large=77"))), columns, None)
    assert answered(filter_of_field("large"), columns, None)
    assert not answered(filter_of_field("other"), columns, None)
    columns = as_sent("x", {f"f{number}": number for number in range(3000)})
    assert len(json.dumps(columns)) < remote_columns.LARGEST_COLUMNS
    assert answered(str(filter_of(parse_condition("f77=77"))), columns, None)
    assert answered(str(filter_of(parse_condition("f77!=78"))), columns, None)
    assert answered(filter_of_field("f77"), columns, None)


def some_items(count: int) -> list[NewItem]:
    """Items of wild metadata, as both kinds of index hold them."""
    chance = random.Random(7)

    def value(depth: int = 0) -> Any:
        kind = chance.randrange(9 if depth == 0 else 7)
        if kind < 4:
            return chance.choice(TEXTS)
        if kind < 6:
            return chance.choice(NUMBERS)
        if kind == 6:
            return chance.choice([True, False, None])
        return [value(1) for _ in range(chance.randrange(4))] if kind == 7 else {"k": value(1)}

    vectors = np.random.default_rng(7).normal(size=(count, 4)).astype(np.float32)
    vectors[::7] = vectors[0]
    found = []
    for number in range(count):
        metadata = {field: value() for field in ("f", "g", "价格(元)", "id") if chance.random() < 0.6}
        item_id = number if number % 3 else f"{chance.choice(TEXTS)}{number}"
        found.append(NewItem(item_id, vectors[number], metadata))
    return found


@pytest.fixture(scope="module", params=stores.REMOTE)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[store.Index, RemoteIndex]]:
    """The same items in a folder and in Milvus, or Milvus Lite."""
    facts = Manifest(ModelInfo("Tiny", "0123", 4))
    folder: Path = tmp_path_factory.mktemp("index") / "i"
    wild = some_items(300)
    with stores.kept_by(request.param) as address, open_writer(folder, facts) as here:
        with addresses.open_writer(address, facts) as there:
            for writer in (here, there):
                writer.commit(wild)
        here.finish()
        assert len(addresses.open_index(address)) == 300  # seen, so that reading need not wait
        yield store.open_index(folder), addresses.open_index(address, is_served=True)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(conditions.filter(lambda text: not re.search("[\ud800-\udfff]", text)), st.sampled_from([1, 7, 300]))
def test_milvus_finds_what_a_folder_finds(both: tuple[store.Index, RemoteIndex], where: str, k: int) -> None:
    query = np.random.default_rng(k).normal(size=(2, 4)).astype(np.float32)
    try:
        expected = both[0].search(query, k, where=where)
    except ConfigError as error:
        with pytest.raises(ConfigError, match=re.escape(str(error)[:30])):
            both[1].search(query, k, where=where)
        return
    assert both[1].search(query, k, where=where) == expected


def test_a_condition_that_fits_few_or_none_costs_one_request(
    both: tuple[store.Index, RemoteIndex], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, call, run = list[str](), Collection.call, Table._run

    def counted(collection: Collection, method: str, **options: Any) -> Any:
        calls.append(method)
        return call(collection, method, **options)

    def counted_run(table: Table, act: Any) -> Any:
        calls.append("query")
        return run(table, act)

    monkeypatch.setattr(Collection, "call", counted)
    monkeypatch.setattr(Table, "_run", counted_run)
    both[1].prepare()
    query = np.ones((1, 4), dtype=np.float32)
    for where, count in (("f=absent", 0), ("id=1..9 f=海,5", None), ("path~absent", 0), ("g=2022.1..2022.2", 0)):
        calls.clear()
        found = both[1].search(query, 10, where=where)[0]
        assert calls == ["query"], where
        assert found == both[0].search(query, 10, where=where)[0]
        assert count is None or len(found) == count
    calls.clear()
    with pytest.raises(ConfigError, match="no item has the field 'absent'"):
        both[1].search(query, 10, where="absent=1")
    assert len(calls) <= 4

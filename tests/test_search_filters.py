"""Conditions on metadata: what they admit, how values compare, and what is refused."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cn_clip.errors import ConfigError
from cn_clip.retrieval import columns
from cn_clip.retrieval.conditions import Between, Term, Value, fields_of, parse_condition
from cn_clip.retrieval.query import ItemTable, mixed

ITEM: dict[str, Any] = {
    "group": "动物",
    "year": 2021,
    "size": "12",
    "rating": 4.5,
    "name": "a b,c",
    "day": "2021-06-30",
    "tags": ["海", "山"],
    "is_new": True,
    "nothing": None,
    "nested": {"a": 1},
}


@pytest.mark.parametrize(
    ("condition", "admits"),
    [
        ("group=动物", True),
        ("group = 动物", True),
        ("group=植物", False),
        ('year="2021"', True),
        ('year="2021.0"', False),
        ('size="012"', False),
        ("size=012", True),
        ('size>"9"', False),
        ("group!=植物", True),
        ("group=植物,动物", True),
        ("group!=植物,动物", False),
        ("year=2021", True),
        ("year=2021.0", True),
        ("year>=2021 year<2022", True),
        ("year>2021", False),
        ("year<=2020", False),
        ("size>9", True),  # text that reads as a number
        ("size=12.0", True),
        ("rating<4.6", True),
        ("rating>-1e3", True),
        ('name="a b,c"', True),
        ("name='a b,c',x", True),
        (r'name="a \"b"', False),
        ("day>=2021-06-01 day<2021-07-01", True),
        ("tags=山", True),
        ("tags!=山", False),
        ("tags=河", False),
        ("is_new=true", True),
        ("is_new=1", False),
        ("is_new>0", False),
        ("absent=1", False),
        ("absent!=1", True),
        ("absent<1", False),
        ("nothing!=1", True),
        ("nested>0", False),
        ("group=动物 year=1", False),
        ("group=__import__('os')", None),
        ("group", None),
        ("group=", None),
        ("=a", None),
        ("group==动物", None),
        ("year>=1,2", None),
        ('name="a', None),
        ('name="a"b', None),
        ("group=a,", None),
        ("", None),
        ("  ", None),
    ],
)
def test_conditions(condition: str, admits: bool | None) -> None:
    if admits is None:
        with pytest.raises(ConfigError, match=r"^where: "):
            parse_condition(condition)
    else:
        assert parse_condition(condition).admits("旅行/2021/IMG_1.jpg", ITEM) is admits


def test_quotes_hold_anything_and_backslashes_free_what_follows() -> None:
    assert parse_condition(r'name="a \"b\" \\ c" x=1').admits("", {"name": r'a "b" \ c', "x": 1})


@pytest.mark.parametrize(
    ("condition", "sentence"),
    [
        ("group=动物 year>", "character 15: expected a value after >; found the end in 'group=动物 year>'"),
        ("a=1 or", "character 7: expected a condition such as group=动物 .*; found the end in 'a=1 or'"),
        ("  (a=1 b=2", "character 11: expected and, or, another condition or the closing bracket \\); found the end"),
        ("a=1) b=2", "character 4: expected and, or, another condition or the end; found '\\) b=2'"),
        ("a=1 或 b", "character 7: expected a condition such as .*; found 'b'"),
        ("()", "character 2: expected a condition such as .*; found '\\)'"),
        ("a<1,2", "character 5: expected one value, for < takes no more; found '2'"),
        (
            "a=x=1",
            "character 4: expected a blank after the value of a; values of other signs stand in quotes; found '=1'",
        ),
        (33 * "(" + "a=1" + 33 * ")", "character 33: expected brackets and not in at most 32 levels"),
        (40 * "not " + "a=1", "character 129: expected brackets and not in at most 32 levels"),
        (" ", "is empty; expected a condition such as group=动物"),
    ],
)
def test_refusal_shows_where_and_what_was_expected(condition: str, sentence: str) -> None:
    with pytest.raises(ConfigError, match=f"^where: {sentence}"):
        parse_condition(condition)


def test_brackets_may_be_as_deep_as_is_said() -> None:
    assert parse_condition(32 * "(" + "a=1" + 32 * ")").admits("", {"a": 1})


PHOTO = {"date": "2021-05-31T23:59:59", "camera": "Apple iPhone 13", "folder": "旅行/2021", "价格(元)": 5, "or": 1}


@pytest.mark.parametrize(
    ("condition", "admits"),
    [
        # a date without its end is all of that time
        ("date=2021", True),
        ("date=2021-05", True),
        ("date=2021-5", True),
        ("date=2021/05/31", True),
        ("date=2021-05-31T23", True),
        ("date=2021-05-31T23:59:59", True),
        ("date=2020", False),
        ("date=2021-06", False),
        ("date!=2021", False),
        ("date>=2021-05", True),
        ("date>2021-05", False),
        ("date>2021", False),
        ("date<=2021", True),
        ("date<=2021-05-31", True),
        ("date<=2021-05-30", False),
        ("date<2022", True),
        ("date<2021-05", False),
        ("date<2021-06", True),
        ("date=2021-05..2021-08", True),
        ("date=2020..2021", True),
        ("date=2021-06..2021-08", False),
        ("date=2019,2021-01..2021-05", True),
        ("date!=2021-05..2021-08", False),
        ('date="2021"', False),  # in quotes it is text
        ('date~"2021-05"', True),
        # contains
        ("path~旅行", True),
        ("path~img", True),
        ("path~ＩＭＧ", True),
        ("path!~img", False),
        ("path!~png", True),
        ("id~2022,2021", True),
        ("id=旅行/2021/IMG_1.jpg", True),
        ("id=IMG_1.jpg", False),
        ("path!=旅行/2021/IMG_1.jpg", False),
        ("camera~iphone", True),
        ("camera~'PHONE 13'", True),
        ("价格(元)>=5", True),
        ("价格(元)=1..4", False),
        ("价格(元)=5..9", True),
        # and, or, not, brackets
        ("date=2020 or camera~apple", True),
        ("date=2020 或 camera~apple", True),
        ("date=2020 and camera~apple", False),
        ("date=2020 且 camera~apple", False),
        ("not date=2020", True),
        ("非 date=2021", False),
        ("NOT date=2021 OR camera~apple", True),
        ("not (date=2021 or camera~apple)", False),
        ("not(date=2020)", True),
        ("date=2021 or date=2021 camera~nikon", True),
        ("(date=2021 or date=2020) camera~nikon", False),
        ("（date=2020 或 date=2021）camera~apple", True),
        ("not date=2020 camera~nikon", False),
        ("not not date=2021", True),
        ("or=1", True),
        ("or = 1 or or=2", True),
        ("not or=1", False),
        # brackets in values
        ("folder=旅行(1)", False),
        ("(folder=旅行/2021)", True),
        ("folder~(1) or folder~行", True),
    ],
)
def test_conditions_on_photos(condition: str, admits: bool) -> None:
    assert parse_condition(condition).admits("旅行/2021/IMG_1.jpg", PHOTO) is admits


def test_names_with_accents_are_found_as_a_mac_writes_them() -> None:
    assert parse_condition("path~CAFÉ").admits("cafe\u0301.jpg", {})


class Held:
    """What a table asks of a segment, in memory."""

    def __init__(self, rows: Sequence[tuple[int | str, dict[str, Any]]]) -> None:
        self._rows, self.tables = rows, dict[str, Any]()

    def __len__(self) -> int:
        return len(self._rows)

    def derived(self, _: str) -> None:
        """None was written."""

    def items(self, start: int, stop: int) -> Iterator[tuple[int | str, dict[str, Any]]]:
        """(id, metadata)."""
        return iter(self._rows[start:stop])

    def item(self, row: int) -> tuple[int | str, dict[str, Any]]:
        """(id, metadata)."""
        return self._rows[row]


def table_of(rows: Sequence[tuple[int | str, dict[str, Any]]], alive: Any = None, *, size: int = 100) -> ItemTable:
    """A table of segments of `size` rows."""
    segments: Any = [Held(rows[start : start + size]) for start in range(0, len(rows), size)]
    return ItemTable(segments, np.ones(len(rows), dtype=np.bool_) if alive is None else alive)


def test_an_id_of_a_table_goes_before_that_of_the_item() -> None:
    assert parse_condition("id=7 path=a").admits("a", {"id": 7, "path": "/photos/a"})
    table = table_of([("a", {"id": 7, "path": "/b"}), ("b", {})])
    for condition, mask in (("id=7", [True, False]), ("id=b", [False, True]), ("path=a,b", [True, True])):
        assert table.mask(parse_condition(condition)).tolist() == mask


def test_a_field_that_no_item_has_is_refused_with_the_nearest() -> None:
    table = table_of([("a", {"camera": "x", "date": "2021"})])
    with pytest.raises(
        ConfigError,
        match=r"^where: no item has the field 'kamera'; did you mean 'camera'\? there are: camera, date, id, path$",
    ):
        table.mask(parse_condition("date=2021 or not kamera=x"))


def test_long_conditions_are_refused() -> None:
    with pytest.raises(ConfigError, match="where: expected at most 4096 characters, got 4098"):
        parse_condition("a=" + 4096 * "1")


@given(st.text(), st.text())
def test_wild_text_is_parsed_or_refused(text: str, value: str) -> None:
    for condition in (text, f"a={text}", f'a="{text}"', f"a<{text} b!={text}"):
        try:
            parsed = parse_condition(condition)
        except ConfigError:
            continue
        assert parsed.admits(text, {"a": value, "b": [value]}) in (True, False)


@given(st.text())
def test_any_text_can_be_asked_for_in_quotes(value: str) -> None:
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    if value:
        assert parse_condition(f'a="{quoted}"').admits("", {"a": value})
        assert parse_condition(f'not a!~"{quoted}"').admits("", {"a": f"x{value}y"})


VALUES = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([1.0, -0.5, "1", "1.0", "甲", "true", ""])
HELD = VALUES | st.sampled_from(["2021-05-03", "2021-05", "2020-12-31 10:00"])
METADATA = st.dictionaries(
    st.sampled_from(["a", "b", "c", "id", "path"]), HELD | st.lists(HELD, max_size=3) | st.just({"a": 1})
)
TERMS = st.sampled_from(
    [
        "a=1",
        "a!=1",
        'a="1"',
        "a>=1",
        "b<甲",
        "b!=true",
        "b=true",
        "a=1,甲",
        "c!=1,2",
        'b="1.0"',
        "a~2021",
        "b!~1",
        "a=2021",
        "b<=2021-05",
        "c=2020..2021",
        "c=0..2",
        "id~id1",
        "id=1",
        "path=id0,id2",
        "path!~3",
    ]
)
CONDITIONS = st.recursive(
    TERMS,
    lambda one: (
        st.tuples(one, st.sampled_from([" ", " and ", " or ", " 或 "]), one).map(lambda three: f"({''.join(three)})")
        | one.map(lambda text: f"not {text}")
    ),
    max_leaves=6,
)


@given(st.lists(st.tuples(METADATA, st.booleans()), max_size=12), CONDITIONS, st.integers(1, 5), st.integers(1, 5))
def test_columns_answer_as_each_item_by_itself_would(
    rows: list[tuple[dict[str, Any], bool]], where: str, size: int, stripe_rows: int
) -> None:
    alive = np.array([is_alive for _, is_alive in rows], dtype=np.bool_)
    items = [(row, f"id{row}", metadata) for row, (metadata, is_alive) in enumerate(rows) if is_alive]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(columns, "STRIPE_ROWS", stripe_rows)
        table = table_of([(f"id{row}", metadata) for row, (metadata, _) in enumerate(rows)], alive, size=size)
        assert table.ids == [item_id for _, item_id, _ in items]
    condition = parse_condition(where)
    assert table.fields == list(dict.fromkeys(name for *_, one in items for name in one if name != "path"))
    for name in table.fields:
        held = [one.get(name) if is_alive else None for one, is_alive in rows]
        assert list(map(repr, table.values(name))) == list(map(repr, held))
    known = {field for _, item_id, metadata in items for field in fields_of(item_id, metadata)}
    if known and not condition.fields <= known:
        with pytest.raises(ConfigError, match="no item has the field"):
            table.mask(condition)
    else:
        expected = [is_alive and condition.admits(f"id{row}", one) for row, (one, is_alive) in enumerate(rows)]
        assert table.mask(condition).tolist() == expected


WILD = st.lists(
    st.text(max_size=6) | st.sampled_from(["ＡＢＣ", "ß", "e\u0301", "\u0301", "a\nb", "2021-05-03 10:00", "2021-05"]),
    max_size=9,
) | st.lists(st.integers() | st.floats() | st.integers(2**53 - 2, 2**53 + 2) | st.booleans(), max_size=9)


@given(
    WILD, st.text(min_size=1, max_size=3) | st.integers().map(str) | st.sampled_from(["2021", "2021-05", "1e3", "é"])
)
def test_many_values_are_judged_as_each_by_itself(found: list[Any], asked: str) -> None:
    between = Between(Value.read("2021"), Value.read("2021-06")), Between(Value.read("-1"), Value.read("1e16"))
    for sign in ("=", "!=", ">=", "<=", ">", "<", "~", "!~"):
        for values in ((Value.read(asked),), (Value(asked),), (Value.read(asked), Value("a"))):
            term = Term("a", sign, values)
            assert term.admits_each(found) == [term.admits({"a": one}) for one in found]
        for values in between if sign in ("=", "!=") else ():
            term = Term("a", sign, (values,))
            assert term.admits_each(found) == [term.admits({"a": one}) for one in found]


@given(CONDITIONS, CONDITIONS, METADATA)
def test_not_and_or_mean_what_they_say(one: str, other: str, metadata: dict[str, Any]) -> None:
    a, b = (parse_condition(text).admits("id1", metadata) for text in (one, other))
    for text, expected in (
        (f"not {one} {other}", not a and b),
        (f"{one} or not {other}", a or not b),
        (f"{one} {other} or not {one}", (a and b) or not a),
        (f"not ({one} or {other})", not (a or b)),
    ):
        assert parse_condition(text).admits("id1", metadata) is expected


def test_a_mixed_query_is_the_unit_vector_of_the_weighted_sum() -> None:
    rows = np.eye(2, dtype=np.float32)
    np.testing.assert_allclose(mixed(rows, [3, 4]), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(mixed(rows, [1, -1]), [2**-0.5, -(2**-0.5)], rtol=1e-6)
    with pytest.raises(ConfigError, match="cancel each other out"):
        mixed(rows[[0, 0]], [0.5, -0.5])

"""Conditions on metadata: what they admit, how values compare, and what is refused."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cn_clip.errors import ConfigError
from cn_clip.retrieval.query import ItemTable, mixed, parse_condition

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
        assert parse_condition(condition).admits(ITEM) is admits


def test_quotes_hold_anything_and_backslashes_free_what_follows() -> None:
    assert parse_condition(r'name="a \"b\" \\ c" x=1').terms[0].values == (r'a "b" \ c',)


def test_refusal_shows_where_and_what_was_expected() -> None:
    with pytest.raises(
        ConfigError, match=r"where: 'year>' is no condition; expected terms such as group=动物 year>=2020"
    ):
        parse_condition("group=动物 year>")


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
        assert parsed.admits({"a": value, "b": [value]}) in (True, False)


@given(st.text())
def test_any_text_can_be_asked_for_in_quotes(value: str) -> None:
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    if value:
        assert parse_condition(f'a="{quoted}"').admits({"a": value})


VALUES = st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from([1.0, -0.5, "1", "1.0", "甲", "true", ""])
METADATA = st.dictionaries(st.sampled_from("abc"), VALUES | st.lists(VALUES, max_size=3) | st.just({"a": 1}))
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
        "c=0 a!=-0.5",
        'b="1.0"',
        "a=1.0 b>0",
    ]
)


@given(st.lists(st.tuples(METADATA, st.booleans()), max_size=12), TERMS)
def test_columns_answer_as_each_item_by_itself_would(rows: list[tuple[dict[str, Any], bool]], where: str) -> None:
    alive = np.array([is_alive for _, is_alive in rows], dtype=np.bool_)
    items = [(row, f"id{row}", metadata) for row, (metadata, is_alive) in enumerate(rows) if is_alive]
    table, condition = ItemTable(items, alive), parse_condition(where)
    assert table.positions == {f"id{row}": row for row, _, _ in items}
    known = {field for _, _, metadata in items for field in metadata}
    if known and not condition.fields <= known:
        with pytest.raises(ConfigError, match="no item has the field"):
            table.mask(condition)
    else:
        expected = [is_alive and condition.admits(metadata) for metadata, is_alive in rows]
        assert table.mask(condition).tolist() == expected


def test_a_mixed_query_is_the_unit_vector_of_the_weighted_sum() -> None:
    rows = np.eye(2, dtype=np.float32)
    np.testing.assert_allclose(mixed(rows, [3, 4]), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_allclose(mixed(rows, [1, -1]), [2**-0.5, -(2**-0.5)], rtol=1e-6)
    with pytest.raises(ConfigError, match="cancel each other out"):
        mixed(rows[[0, 0]], [0.5, -0.5])

"""Words beside vectors: what counts as a word, which items hold them, and one ranking of both."""

from pathlib import Path

import numpy as np
import pytest

from cn_clip.errors import ConfigError
from cn_clip.retrieval import words
from cn_clip.retrieval.manifest import Manifest, ModelInfo, PictureFacts
from cn_clip.retrieval.store import Index, open_index
from cn_clip.retrieval.words import WordTable, fused, words_of
from cn_clip.retrieval.writer import NewItem, open_writer


def test_words_are_pairs_of_characters_and_runs_of_letters() -> None:
    assert words_of("WiFi 密码：８８A") == ["wifi", "密", "码", "密码", "88a"]
    assert words_of("WiFi 密码", is_query=True) == ["wifi", "密码"]
    assert words_of("码", is_query=True) == ["码"]
    assert words_of("海边的日落", is_query=True) == ["海边", "边的", "的日", "日落"]
    assert words_of(" \n。") == []


def test_items_are_ranked_by_how_much_of_the_query_they_hold() -> None:
    table, all_5 = WordTable([(0, "会议室密码"), (1, "密码"), (2, "今天开会"), (4, "密码 密码 wifi")]), np.ones(5, bool)
    assert table.search("密码", all_5, 9).tolist() == [4, 1, 0]  # twice; alone; in a longer text
    assert table.search("WIFI密码", all_5, 9).tolist() == [4]  # the others hold less than half of its weight
    assert table.search("密码", np.array([True, True, True, True, False]), 1).tolist() == [1]
    assert table.search("没有", all_5, 9).tolist() == []
    assert table.search("", all_5, 9).tolist() == []
    assert WordTable([]).search("密码", np.zeros(0, bool), 9).tolist() == []


def test_a_place_in_both_rankings_is_worth_more_than_the_first_in_one() -> None:
    assert fused([[7, 8, 9], [9]]) == [9, 7, 8]  # 1/63 + 1/61 > 1/61 > 1/62
    assert fused([[7, 8], [5]]) == [7, 5, 8]  # 1/61 each: as in the first ranking
    assert fused([[], []]) == []


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """Items 0 to 9 at angles of 0 to 90 degrees; 7 holds words, 3 a caption."""
    folder = tmp_path / "i"
    angles = np.linspace(0, np.pi / 2, 10)
    with open_writer(folder, Manifest(ModelInfo("", "", 2), pictures=PictureFacts(ocr=True))) as writer:
        told = {3: {"caption": "密码本"}, 7: {"text": "wifi密码", "group": "a"}}
        writer.commit(
            [
                NewItem(number, np.array([np.cos(angle), np.sin(angle)], np.float32), told.get(number, {"text": ""}))
                for number, angle in enumerate(angles)
            ]
        )
    return open_index(folder)


EAST = np.array([[1, 0]], np.float32)


def test_items_that_hold_the_words_come_in_by_rank_and_keep_their_cosine(index: Index) -> None:
    assert index.has_words
    (hits,) = index.search(EAST, 4, words="密码")
    # By vector 0, 1, 2, 3 …; by words 7 and 3: 7 scores 1/68 + 1/61, 3 scores 1/64 + 1/62, 0 scores 1/61.
    assert [hit.id for hit in hits] == [3, 7, 0, 1]
    np.testing.assert_allclose([hit.score for hit in hits], np.cos(np.radians([30, 70, 0, 10])), atol=1e-6)
    assert [hit.id for hit in index.search(EAST, 2, words="密码", offset=1)[0]] == [7, 0]
    assert [hit.id for hit in index.search(EAST, 9, words="密码", min_score=0.5)[0]] == [3, 0, 1, 2, 4, 5, 6]
    assert [hit.id for hit in index.search(EAST, 9, words="密码", where="group=a")[0]] == [7]
    assert index.search(EAST, 4, words="没有")[0] == index.search(EAST, 4)[0]


def test_what_lies_deeper_than_the_rankings_go_is_found_only_by_words(
    index: Index, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cn_clip.retrieval.store.DEPTH", 2)
    (hits,) = index.search(EAST, 3, words="wifi")
    assert [hit.id for hit in hits] == [0, 7, 1]
    np.testing.assert_allclose(hits[1].score, np.cos(np.radians(70)), atol=1e-6)
    everything = [hit.id for hit in index.search(EAST, 10, words="wifi")[0]]
    assert everything == [0, 7, 1, 2, 3, 4, 5, 6, 8, 9]
    pages = [[hit.id for hit in index.search(EAST, 2, words="wifi", offset=at)[0]] for at in range(0, 10, 2)]
    assert sum(pages, []) == everything  # noqa: RUF017


def test_words_go_with_one_query(index: Index) -> None:
    with pytest.raises(ConfigError, match="words"):
        index.search(np.concatenate([EAST, EAST]), 3, words="密码")
    assert words.DEPTH == 100

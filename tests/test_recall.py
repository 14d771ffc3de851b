"""Recall: worked by hand on a 4 x 8 matrix, and the two forms against each other."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cn_clip.errors import DataError
from cn_clip.retrieval.recall import Recall, RecallBothWays, recall_at_k, recall_from_features

# Similarity of 4 pictures (rows) to 8 texts (columns).
SIMILARITY = np.array(
    [
        [9, 2, 1, 0, 3, 4, 5, 6],
        [8, 7, 6, 5, 4, 3, 2, 1],
        [1, 2, 3, 4, 4, 6, 7, 8],
        [5, 5, 5, 5, 5, 5, 5, 5],
    ],
    dtype=np.float32,
)
# Text 5 has no picture and picture 3 no text.
PAIRS = [(0, 0), (0, 4), (1, 1), (1, 7), (2, 2), (2, 3), (2, 6)]


def test_recall_both_ways_worked_by_hand() -> None:
    # With unit vectors as pictures the features give SIMILARITY itself.
    found = recall_from_features(np.eye(4, dtype=np.float32), SIMILARITY.T.copy(), PAIRS, ks=(1, 2, 3, 5))
    # Picture 0 finds text 0 first. Picture 1 ranks 0, 1: text 1 second. Picture 2 ranks 7, 6: text 6 second.
    # Picture 3 has no text: it is no query, as it stands in no picture-to-text annotation.
    assert found.image_to_text.at == {1: 1 / 3, 2: 3 / 3, 3: 3 / 3, 5: 3 / 3}
    # The texts rank the pictures, equal ones by position, and find the right one:
    # 0: 0 1 3 2, right 0, first   1: 1 3 0 2, right 1, first  2: 1 3 2 0, right 2, third  3: 1 3 2 0, right 2, third
    # 4: 3 1 2 0, right 0, fourth  5: 2 3 0 1, no right one    6: 2 0 3 1, right 2, first  7: 2 0 3 1, right 1, fourth
    assert found.text_to_image.at == {1: 3 / 8, 2: 3 / 8, 3: 5 / 8, 5: 7 / 8}


def test_recall_of_rankings_worked_by_hand() -> None:
    ranked = [[3, 1, 2], ["甲", "乙", "丙"], [5, 6, 7], [1, 2, 3]]
    relevant = [[1, 9], ["甲"], [8], []]
    found = recall_at_k(ranked, relevant, ks=(1, 2, 3))
    assert found.at == {1: 1 / 4, 2: 2 / 4, 3: 2 / 4}


def test_a_query_with_several_right_answers_counts_once() -> None:
    assert recall_at_k([[1, 2, 3], [4, 5, 6]], [{1, 2, 3}, {9}]).at == {1: 0.5, 5: 0.5, 10: 0.5}


def test_the_line_is_in_percent_and_the_mean_over_k() -> None:
    recall = Recall({1: 0.712, 5: 0.905, 10: 0.953})
    assert recall.line() == "R@1: 71.20 R@5: 90.50 R@10: 95.30"
    assert recall.mean == (0.712 + 0.905 + 0.953) / 3.0


def test_both_ways_have_one_mean_and_a_name_for_each_value() -> None:
    found = RecallBothWays(Recall({1: 0.25, 5: 0.5, 10: 0.75}), Recall({1: 0.5, 5: 0.75, 10: 1.0}))
    assert found.mean == 0.625
    assert found.values() == {
        "text_to_image_r1": 0.25,
        "text_to_image_r5": 0.5,
        "text_to_image_r10": 0.75,
        "text_to_image_mean_recall": 0.5,
        "image_to_text_r1": 0.5,
        "image_to_text_r5": 0.75,
        "image_to_text_r10": 1.0,
        "image_to_text_mean_recall": 0.75,
    }


@settings(deadline=None)
@given(st.lists(st.integers(0, 97), min_size=3, max_size=3))
def test_the_mean_rounds_as_a_plain_sum_on_every_python(hits: list[int]) -> None:
    r1, r5, r10 = (count * 1.0 / 97 for count in hits)
    assert Recall({1: r1, 5: r5, 10: r10}).mean == (r1 + r5 + r10) / 3.0


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_features_and_rankings_give_the_same_recall(data: st.DataObject) -> None:
    num_images, num_texts = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 12))
    cell = st.tuples(st.integers(0, num_images - 1), st.integers(0, num_texts - 1))
    pairs = data.draw(st.lists(cell, min_size=1, max_size=20))
    generator = np.random.default_rng(data.draw(st.integers(0, 1000)))
    images = generator.integers(-2, 3, (num_images, 3)).astype(np.float32)
    texts = generator.integers(-2, 3, (num_texts, 3)).astype(np.float32)
    found = recall_from_features(images, texts, np.array(pairs, dtype=np.int64), ks=(1, 3, 10))
    ranked = np.argsort(-(images @ texts.T), axis=1, kind="stable").tolist()
    relevant = [{text for image, text in pairs if image == row} for row in range(num_images)]
    described = [row for row in range(num_images) if relevant[row]]
    expected = recall_at_k([ranked[row] for row in described], [relevant[row] for row in described], ks=(1, 3, 10))
    assert found.image_to_text == expected


def test_tensors_of_any_float_type_give_the_recall_of_their_float32_values() -> None:
    images = torch.eye(4, dtype=torch.bfloat16, requires_grad=True)
    texts = torch.from_numpy(SIMILARITY.T.copy()).half()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = recall_from_features(images, texts, torch.tensor(PAIRS))
    assert found == recall_from_features(np.eye(4, dtype=np.float32), SIMILARITY.T.copy(), PAIRS)


def test_faulty_input_is_refused() -> None:
    rows = np.eye(3, dtype=np.float32)
    for pairs in ([(3, 0)], [(0, 3)], [(-1, 0)]):
        with pytest.raises(DataError, match="outside the 3 pictures and 3 texts"):
            recall_from_features(rows, rows, pairs)
    with pytest.raises(DataError, match="3 pictures and 0 texts"):
        recall_from_features(rows, rows[:0], [])
    with pytest.raises(DataError, match="no queries"):
        recall_at_k([], [])
    with pytest.raises(DataError, match="1 rankings, but 0 sets"):
        recall_at_k([[1]], [])

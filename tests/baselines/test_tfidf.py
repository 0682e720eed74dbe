from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from lorasweep.baselines.tfidf import TfidfBaseline
from lorasweep.core.corpora import TextSplit


def predicted(train: TextSplit, texts: list[str]) -> list[int]:
    return TfidfBaseline().predict(train, texts, 2).argmax(axis=1).tolist()


@pytest.mark.parametrize(
    ("rows", "texts"),
    [
        pytest.param(
            [("the food was good", 1), ("the food was bad", 0)],
            ["really good", "really bad"],
            id="words",
        ),
        pytest.param(
            [("not good at all, dear", 0), ("good, not at all dear", 1)],
            ["it is not good", "it is not at all dear"],
            id="pairs of words",
        ),
        pytest.param(
            [("这家餐厅的菜很好吃", 1), ("这家餐厅的菜很难吃", 0)],
            ["酒店的早餐真好", "酒店的早餐真难"],
            id="Chinese, without spaces",
        ),
        pytest.param(
            [("この映画は好きです", 1), ("この映画は嫌いです", 0)],
            ["好き", "嫌い"],
            id="Japanese",
        ),
        pytest.param([("A", 1), ("F", 0)], ["a", "f"], id="one letter"),
        pytest.param([("👍", 1), ("👎", 0)], ["so 👍", "so 👎"], id="symbols alone"),
        pytest.param(
            [("I don't like it", 0), ("I do like it", 1)],
            ["they don't", "they do"],
            id="apostrophes",
        ),
    ],
)
def test_what_tells_labels_apart_is_counted(
    rows: list[tuple[str, int]], texts: list[str], split: Callable[..., TextSplit]
) -> None:
    labels = [label for _, label in rows]
    assert predicted(split(rows * 5), texts) == labels


def test_word_pairs_reach_across_commas(split: Callable[..., TextSplit]) -> None:
    rows = [("good, but dear", 0), ("dear, but good", 1)] * 5
    assert predicted(split(rows), ["but, dear", "but, good"]) == [0, 1]


@pytest.mark.parametrize("rows", [[(".", 0), ("...", 1), (",", 1)], [("", 0), ("", 1), (" ", 1)]])
def test_texts_without_any_word_give_frequencies(
    rows: list[tuple[str, int]], split: Callable[..., TextSplit]
) -> None:
    found = TfidfBaseline().predict(split(rows), ["anything", ""], 2)
    np.testing.assert_allclose(found, [[1 / 3, 2 / 3]] * 2)


def test_a_text_of_unknown_words_gets_an_answer(split: Callable[..., TextSplit]) -> None:
    found = TfidfBaseline().predict(split([("good", 1), ("bad", 0)] * 5), ["zzz", ""], 2)
    np.testing.assert_allclose(found, 0.5, atol=0.05)


def test_word_counts_find_something_in_real_sentences(
    real_data, split: Callable[..., TextSplit]
) -> None:
    import csv

    def read(name: str) -> list[tuple[str, int]]:
        with (real_data / "sst2" / name).open(encoding="utf-8", newline="") as file:
            return [(row["text"], int(row["label"])) for row in csv.DictReader(file)]

    train, held_out = read("sentences_train.csv"), read("sentences_validation.csv")
    found = predicted(split(train), [text for text, _ in held_out])
    right = np.mean(np.asarray(found) == [label for _, label in held_out])
    assert 0.78 < right < 0.86

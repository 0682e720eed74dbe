"""Cleaning changes what it says, counts what it drops, and spares the test split."""

from __future__ import annotations

import pytest

from lorasweep.core.corpora import TextSplit
from lorasweep.data.cleaning import thin, tidy, word_count, words
from lorasweep.spec.schema import CleanSpec


def rows(*texts: str) -> TextSplit:
    return TextSplit("train", texts, (), tuple(f"f:{n + 1}" for n in range(len(texts))))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It 's GREAT,  really!", ["it", "s", "great", "really"]),
        ("ＦＵＬＬ－ＷＩＤＴＨ", ["full", "width"]),
        ("cafe\u0301 Straße", ["café", "strasse"]),
        ("房间很大 OK。", ["房", "间", "很", "大", "ok"]),
        ("हिन्दी में", ["हिन्दी", "में"]),
        ("!!!", ["!!!"]),
        ("🥺 🥺", ["🥺", "🥺"]),
    ],
)
def test_words(text: str, expected: list[str]) -> None:
    assert words(text) == expected


def test_word_count_goes_by_white_space_and_by_character_where_there_is_none() -> None:
    assert word_count("so - so") == 3
    assert word_count("早餐太差。") == 4
    assert word_count("早餐 ok") == 3


def test_white_space_is_collapsed_and_counted() -> None:
    split, report = tidy(rows(" a  b\r\nc ", "plain", "x\u3000y"), [0, 1, 0], CleanSpec())
    assert split.texts == ("a b c", "plain", "x y")
    assert report.changed == {"whitespace collapsed": 2}
    assert (report.read, report.kept, report.dropped) == (3, 3, {})


def test_white_space_stays_when_the_spec_says_so() -> None:
    spec = CleanSpec(collapse_whitespace=False)
    split, report = tidy(rows(" a  b ", " \t "), [0, 1], spec)
    assert split.texts == (" a  b ",)
    assert report.changed == {}
    assert report.dropped == {"empty": 1}


def test_empty_and_unlabelled_rows_are_dropped_and_counted_and_ids_stay() -> None:
    split, report = tidy(rows("a", "", "b", "  ", "c"), [0, 1, None, None, 1], CleanSpec())
    assert split.ids == ("f:1", "f:5")
    assert split.labels == (0, 1)
    assert report.dropped == {"no label": 2, "empty": 1}
    assert report.read - sum(report.dropped.values()) == report.kept == 2


def test_short_and_repeated_texts_go_only_where_asked() -> None:
    texts = ("a b c", "a b", "A, b c!", "x y z")
    split, report = tidy(rows(*texts), [0, 0, 1, 1], CleanSpec())
    same, _ = thin(split, report, CleanSpec())
    assert same == split
    spec = CleanSpec(min_words=3, drop_duplicates=True)
    thinned, counted = thin(split, report, spec)
    assert thinned.ids == ("f:1", "f:4")
    assert counted.dropped == {"fewer than 3 words": 1, "duplicate": 1}
    assert counted.kept == 2


def test_repeated_and_contradicting_texts_are_told() -> None:
    _, report = tidy(rows("Good film", "good film!", "bad", "bad"), [1, 0, 0, 0], CleanSpec())
    repeated, conflicting = report.notes
    assert repeated.startswith("2 texts occur more than once")
    assert "2 rows too many" in repeated
    assert "1 text occurs with different labels; the first is f:1 and f:2." in conflicting

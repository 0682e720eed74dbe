"""The measurement that convicts a split, held to a definition too slow for real use."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from lorasweep.core.corpora import TextSplit
from lorasweep.data.leakage import measure_leakage

SENTENCES = st.lists(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=30).map(" ".join), max_size=12
)


def split(name: str, *texts: str) -> TextSplit:
    return TextSplit(name, texts, (0,) * len(texts), tuple(map(str, range(len(texts)))))


def test_what_counts_as_leaked() -> None:
    train = split("train", "A very good film indeed.", "the plot", "so so so")
    held = split(
        "test",
        "very GOOD film",  # lies inside
        "film",  # lies inside, however short
        "it is a very good film indeed , truly",  # contains
        "the plot",  # equal, but to a text of two words
        "so - so, so",  # equal
        "the plot thickens",  # contains a text of two words only
        "good indeed",  # no run of words
        "filmindeed",
    )
    report = measure_leakage(train, held)
    assert report.held_out == "test"
    assert report.rows == 8
    assert report.contained == 4
    assert report.duplicated == 2
    assert report.known == 5  # "so so so" is both
    assert report.share == 5 / 8


def test_repeated_held_out_rows_count_each() -> None:
    report = measure_leakage(split("train", "a b c d"), split("test", "b c", "b c", "e"))
    assert report.contained == 2


def test_nothing_held_out_is_nothing_leaked() -> None:
    assert measure_leakage(split("train", "a b c"), split("test")).share == 0.0


@settings(deadline=None)
@given(SENTENCES, SENTENCES)
def test_agrees_with_the_definition(train: list[str], held: list[str]) -> None:
    def inside(inner: str, outer: str) -> bool:
        return f" {inner} " in f" {outer} "

    long = [text for text in train if len(text.split()) >= 3]
    expected = sum(any(inside(row, text) or inside(text, row) for text in long) for row in held)
    report = measure_leakage(split("train", *train), split("validation", *held))
    assert report.contained == expected
    assert report.duplicated == sum(row in train for row in held)
    either = (
        row in train or any(inside(row, text) or inside(text, row) for text in long) for row in held
    )
    assert report.known == sum(either)

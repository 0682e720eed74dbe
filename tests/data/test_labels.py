"""Which values are classes, in which order, under which names; and which can't be."""

from __future__ import annotations

import pytest

from lorasweep.core.errors import DataError
from lorasweep.data.labels import Labelled, check_counts, read_labels
from lorasweep.data.tables import LabelValue, RawTable


def table(*labels: LabelValue | None, origin: str = "a.csv", **more: object) -> RawTable:
    places = tuple(range(2, len(labels) + 2))
    return RawTable(origin, "a", "line", places, ("t",) * len(labels), labels, **more)  # type: ignore[arg-type]


def read(
    *labels: LabelValue | None, names: tuple[str, ...] | None = None, drop: bool = False
) -> tuple[tuple[str, ...], tuple[int | None, ...]]:
    found = read_labels({"train": table(*labels)}, names, drop)
    return found.names, found.indices["train"]


def told(names: tuple[str, ...] | None = None, **tables: RawTable) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_labels(tables, names, drop_unlabelled=False)
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("labels", "names", "indices"),
    [
        ((1, 0, 1), ("0", "1"), (1, 0, 1)),
        (("10", "9", "10"), ("9", "10"), (1, 0, 1)),
        (("1.0", "0", "2.0"), ("0", "1", "2"), (1, 0, 2)),
        ((1.0, 0, 2), ("0", "1", "2"), (1, 0, 2)),
        (("-1", "+1"), ("-1", "1"), (0, 1)),
        ((True, False), ("false", "true"), (1, 0)),
        (("True", "FALSE", "true"), ("false", "true"), (1, 0, 1)),
        ((" spam", "ham ", "spam"), ("ham", "spam"), (1, 0, 1)),
        (("负", "正"), ("正", "负"), (1, 0)),
    ],
)
def test_values_in_order(
    labels: tuple[LabelValue, ...], names: tuple[str, ...], indices: tuple[int, ...]
) -> None:
    assert read(*labels) == (names, indices)


def test_names_of_the_spec() -> None:
    assert read("1", "0", names=("negative", "positive")) == (("negative", "positive"), (1, 0))
    assert read(True, False, names=("no", "yes")) == (("no", "yes"), (1, 0))
    # The same words in another order: that order is the order.
    assert read("ham", "spam", names=("spam", "ham")) == (("spam", "ham"), (1, 0))
    # Other words: names in order of the value.
    assert read("spam", "ham", names=("fine", "junk")) == (("fine", "junk"), (1, 0))


def test_names_of_the_source() -> None:
    carried = table(1, 0, 1, class_names=("bad", "good"))
    assert read_labels({"train": carried}, None, False).names == ("bad", "good")
    turned = read_labels({"train": carried}, ("good", "bad"), False)
    assert (turned.names, turned.indices["train"]) == (("good", "bad"), (0, 1, 0))
    renamed = read_labels({"train": carried}, ("minus", "plus"), False)
    assert (renamed.names, renamed.indices["train"]) == (("minus", "plus"), (1, 0, 1))
    gap = read_labels({"train": table(2, 0, class_names=("a", "b", "c"))}, None, False)
    assert (gap.names, gap.indices["train"]) == (("a", "c"), (1, 0))
    assert "'b' but has no row" in gap.notes[0]


def test_splits_that_name_their_labels_differently_are_refused() -> None:
    one, other = table(0, 1, class_names=("bad", "good")), table(0, class_names=("good", "bad"))
    assert "name their labels differently" in told(train=one, test=other)[0]


def test_held_out_splits_share_the_classes_of_train() -> None:
    found = read_labels({"train": table("b", "a"), "test": table("b", origin="b.csv")}, None, False)
    assert found == Labelled(("a", "b"), {"train": (1, 0), "test": (1,)})


def test_missing_labels_are_counted_listed_and_dropped_only_if_asked() -> None:
    labels = ["a", "b", "", None, "nan", "N/A", float("nan"), *[None] * 9]
    (problem,) = told(train=table(*labels))
    assert problem.startswith("a.csv:4: no label in 14 of 16 rows (lines 4, 5, 6, 7, 8, 9, 10, 11")
    assert "and 4 more" in problem
    assert "'N/A', 'nan' count as none" in problem
    assert "data.clean.drop_unlabelled: true" in problem
    assert read(*labels, drop=True)[1] == (0, 1, *[None] * 14)


def test_a_class_called_none_can_be_meant() -> None:
    assert read("none", "for", names=("none", "for")) == (("none", "for"), (0, 1))


@pytest.mark.parametrize(
    ("labels", "what"),
    [
        (("a", "b", "0", "a"), "a.csv:4: the labels mix 3 words such as 'a' and 1 numbers"),
        ((1, "1", 1, 0), "a.csv:3: the labels mix 3 numbers such as 1 and 1 number in quotes"),
        ((True, 0, True), "a.csv:3: the labels mix 2 bools"),
        (("0.5", "1"), "a.csv:2: the label '0.5' is a number but not a whole one"),
        ((0.5, 1), "a.csv:2: the label 0.5"),
        (("a", "a"), "a.csv: has one class only: 'a'"),
        (("Good", "good", "bad", "good"), "a.csv:2: the labels 'Good' and 'good' differ in case"),
    ],
)
def test_labels_that_cannot_be_classes(labels: tuple[LabelValue, ...], what: str) -> None:
    (problem,) = told(train=table(*labels))
    assert problem.startswith(what)


def test_names_that_do_not_fit() -> None:
    unlisted, unused = told(names=("negative", "posative"), train=table("negative", "positive"))
    assert unlisted.startswith("a.csv:3: the label 'positive' isn't listed in data.labels (line 3)")
    assert "Did you mean 'posative'?" in unlisted
    assert unused.startswith("data.labels: lists 'posative', of which a.csv has no row")
    (more,) = told(names=("a", "b"), train=table(0, 1, 2))
    assert more.startswith("data.labels: names 2 labels, but a.csv has 3: 0, 1, 2")
    (fewer,) = told(names=("a", "b", "c"), train=table(0, 2))
    assert "has 2: 0, 2" in fewer
    (carried,) = told(names=("a", "b", "c"), train=table(0, 1, class_names=("x", "y")))
    assert "has 2: x, y" in carried


def test_labels_that_train_does_not_know() -> None:
    train = table("good", "bad")
    first, second = told(
        train=train,
        validation=table("good", "goood", origin="v.csv"),
        test=table("so-so", "bad", "so-so", origin="t.csv"),
    )
    assert first.startswith("v.csv:3: the label 'goood' (line 3) occurs in no row of a.csv")
    assert "Did you mean 'good'?" in first
    assert second.startswith("t.csv:2: the label 'so-so' (lines 2 and 4)")
    (kind,) = told(train=train, test=table(0, 1, origin="t.csv"))
    assert "its labels are numbers, those of a.csv words" in kind


def test_problems_of_all_splits_come_at_once() -> None:
    problems = told(train=table("a", "b", None), test=table("a", "1", origin="t.csv"))
    assert len(problems) == 2


def test_classes_with_one_row_or_none_are_refused() -> None:
    check_counts("a.csv", ("a", "b"), (0, 0, 1, 1))
    with pytest.raises(DataError) as caught:
        check_counts("a.csv", ("a", "b", "c"), (0, 0, 1))
    single, none = caught.value.problems
    assert "'b' has a single row" in single.what
    assert "'c' has no row" in none.what

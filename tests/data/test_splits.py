"""Splits lose no row, are seeded, keep each class on both sides, and don't cut groups."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lorasweep.core.corpora import TextSplit
from lorasweep.core.errors import DataError
from lorasweep.data.containment import containments, short_hosts, unique_texts
from lorasweep.data.files import read_file
from lorasweep.data.leakage import measure_leakage
from lorasweep.data.splits import HeldOut, draw_stratified, hold_out

STRATEGIES = ["random", "stratified", "grouped"]
TEXT = st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=9).map(" ".join)
CORPUS = st.lists(st.tuples(TEXT, st.integers(0, 2)), min_size=2, max_size=60)


def divided(texts: list[str], labels: list[int], share: float, strategy: str, seed: int) -> HeldOut:
    return hold_out(texts, labels, share, strategy, seed, "data.split.validation")


@settings(deadline=None)
@given(CORPUS, st.sampled_from(STRATEGIES), st.floats(0.05, 0.6), st.integers(0, 2**31 - 1))
def test_no_row_is_lost_or_doubled_and_classes_are_on_both_sides(
    corpus: list[tuple[str, int]], strategy: str, share: float, seed: int
) -> None:
    texts, labels = [text for text, _ in corpus], [label for _, label in corpus]
    try:
        first = divided(texts, labels, share, strategy, seed)
    except DataError:
        assume(False)
        raise
    assert sorted([*first.kept, *first.held]) == list(range(len(corpus)))
    assert list(first.kept) == sorted(first.kept)
    for side in (first.kept, first.held):
        assert {labels[row] for row in side} == set(labels)
    again = divided(texts, labels, share, strategy, seed)
    assert list(again.held) == list(first.held)


@settings(deadline=None)
@given(CORPUS, st.integers(0, 2**31 - 1))
def test_whole_groups_leak_nothing(corpus: list[tuple[str, int]], seed: int) -> None:
    texts, labels = [text for text, _ in corpus], [label for _, label in corpus]
    try:
        parts = divided(texts, labels, 0.3, "grouped", seed)
    except DataError:
        assume(False)
        raise
    assume(not any("separated" in note for note in parts.notes))

    def side(name: str, rows: np.ndarray) -> TextSplit:
        chosen = tuple(texts[row] for row in rows)
        return TextSplit(name, chosen, (0,) * len(chosen), chosen)

    report = measure_leakage(side("train", parts.kept), side("validation", parts.held))
    assert (report.contained, report.duplicated) == (0, 0)


@settings(deadline=None)
@given(st.lists(TEXT, max_size=30))
def test_containments_agree_with_the_definition(texts: list[str]) -> None:
    unique = unique_texts(texts)
    shown = {int(number): text for number, text in zip(unique.of_row, texts, strict=True)}

    def pairs(found: tuple[np.ndarray, np.ndarray]) -> set[tuple[str, str]]:
        return {(shown[int(a)], shown[int(b)]) for a, b in zip(*found, strict=True)}

    inside = {
        (a, b) for a in texts for b in texts if a != b and f" {a} " in f" {b} " and b.count(" ") > 1
    }
    assert pairs(containments(unique)) == {pair for pair in inside if pair[0].count(" ") > 1}
    assert pairs(short_hosts(unique)) == {pair for pair in inside if pair[0].count(" ") <= 1}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_seed_is_another_split_of_the_same_size(strategy: str) -> None:
    texts = [f"text number {n} of them" for n in range(200)]
    labels = [n % 2 for n in range(200)]
    splits = [divided(texts, labels, 0.25, strategy, seed) for seed in (1, 2)]
    assert [len(split.held) for split in splits] == [50, 50]
    assert list(splits[0].held) != list(splits[1].held)


def test_stratified_and_grouped_keep_class_shares() -> None:
    texts = [f"text number {n} of them" for n in range(1000)]
    labels = [0] * 900 + [1] * 80 + [2] * 20
    for strategy in ("stratified", "grouped"):
        held = divided(texts, labels, 0.1, strategy, 5).held
        assert np.bincount(np.array(labels)[held]).tolist() == [90, 8, 2], strategy


def test_one_giant_group_is_cut_and_said_so() -> None:
    # Each text overlaps the next by a text of three words: one chain of 300.
    texts = [f"w{n} w{n + 1} w{n + 2}" for n in range(300)]
    texts += [f"w{n} w{n + 1} w{n + 2} w{n + 3}" for n in range(300)]
    labels = [n % 2 for n in range(600)]
    parts = divided(texts, labels, 0.2, "grouped", 1)
    assert len(parts.held) >= 100
    assert "separated" in parts.notes[0]


def test_what_a_split_cannot_do_is_told() -> None:
    for texts, labels, strategy, what in (
        (["a b c", "d e f", "g h i"], [0, 0, 1], "stratified", "both sides"),
        (["a b c"] * 4 + ["d e f"] * 4, [0] * 4 + [1] * 4, "grouped", "too small for its classes"),
        ([f"{n}" for n in range(100)], [0] * 98 + [1, 1], "random", "no row of class 1"),
    ):
        with pytest.raises(DataError, match=what) as caught:
            divided(texts, labels, 0.02, strategy, 1)
        assert caught.value.problems[0].where == "data.split.validation"


def test_stratified_draws_give_every_class_a_row() -> None:
    labels = np.array([0] * 95 + [1] * 4 + [2])
    drawn = draw_stratified(labels, 10, np.random.default_rng(0))
    assert len(drawn) == 10
    assert set(labels[drawn]) == {0, 1, 2}
    assert list(drawn) == sorted(drawn)


def test_million_character_words_and_texts_without_spaces() -> None:
    rng = np.random.default_rng(0)
    long = "".join(rng.choice(list("很大房间不错早餐服务"), size=100_000))
    texts = ["x" * 1_000_000, long, long[500:900], "ha " * 50_000, "ha ha ha ha", "a b c d"]
    labels = [0, 1, 1, 0, 0, 1]
    parts = divided(texts, labels, 0.4, "grouped", 1)
    sides = [set(parts.kept.tolist()), set(parts.held.tolist())]
    for group in ({1, 2}, {3, 4}):
        assert any(group <= side for side in sides)


@pytest.mark.data
@pytest.mark.parametrize("seed", [1, 2])
def test_sst2_phrases(real_data: Path, seed: int) -> None:
    table = read_file(str(real_data / "sst2" / "glue_train.csv"), "sentence", "label")
    labels = [int(str(label)) for label in table.labels]
    assert len(table) == 67_349

    def share(strategy: str) -> float:
        parts = divided(list(table.texts), labels, 0.15, strategy, seed)
        assert len(parts.held) == pytest.approx(0.15 * len(table), rel=0.02)
        held = [labels[row] for row in parts.held]
        assert sum(held) / len(held) == pytest.approx(sum(labels) / len(labels), abs=0.01)

        def side(name: str, rows: np.ndarray) -> TextSplit:
            chosen = tuple(table.texts[row] for row in rows)
            return TextSplit(name, chosen, (0,) * len(chosen), chosen)

        return measure_leakage(side("train", parts.kept), side("validation", parts.held)).share

    assert share("grouped") <= 0.01
    assert share("random") >= 0.95


@pytest.mark.data
def test_chinese_reviews(real_data: Path) -> None:
    table = read_file(str(real_data / "nasty" / "ChnSentiCorp_htl_all.csv"), "review", "label")
    kept = [row for row in range(len(table)) if table.texts[row].strip()]
    texts = [table.texts[row] for row in kept]
    labels = [int(str(table.labels[row])) for row in kept]
    parts = divided(texts, labels, 0.15, "grouped", 1)
    assert len(parts.held) == pytest.approx(0.15 * len(texts), rel=0.02)
    assert parts.notes == ()

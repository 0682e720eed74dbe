from __future__ import annotations

import hashlib
import re
from collections import Counter

import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from lorasweep.core.errors import DataError
from lorasweep.data.embedded import LARGEST_SIZE, EmbeddedReviews, Review, generate_reviews
from lorasweep.data.review_grammar import GROUPS
from lorasweep.data.review_vocabulary import ALL_TOPICS

# What a sentence of a tag must have, and what a sentence without it must not have.
CUES = {
    "negation": r"\b(nobody|not|nothing|no|neither|nor|hardly anyone)\b",
    "contrast": r"\b(but|however|yet|still)\b",
    "concession": r"\b(although|even though|despite|in spite of|while|hardly matters)\b",
    "hearsay": r"\b(had told me that|people say|had read that|whoever wrote|had expected)\b",
    "verdict": r"\bon balance\b",
}


@pytest.fixture(scope="module")
def reviews() -> EmbeddedReviews:
    return generate_reviews(4000, 42)


def everything(reviews: EmbeddedReviews) -> tuple[Review, ...]:
    return reviews.train + reviews.test


def words(text: str) -> str:
    return f" {' '.join(re.findall(r'[a-z0-9]+', text.lower()))} "


def test_a_quarter_is_for_the_test_and_all_sentences_are_distinct(reviews: EmbeddedReviews) -> None:
    assert (len(reviews.train), len(reviews.test)) == (3000, 1000)
    assert len({words(review.text) for review in everything(reviews)}) == 4000


def test_labels_are_balanced_in_both_parts(reviews: EmbeddedReviews) -> None:
    assert Counter(review.label for review in reviews.train) == {0: 1500, 1: 1500}
    assert Counter(review.label for review in reviews.test) == {0: 500, 1: 500}


@pytest.mark.parametrize("size", [8, 203, 4001])
def test_any_size_is_met_exactly(size: int) -> None:
    reviews = generate_reviews(size, 7)
    assert len(reviews.test) == size // 4
    assert len(everything(reviews)) == size
    positive = sum(review.label for review in everything(reviews))
    assert abs(positive - size / 2) <= 1


def test_the_same_seed_gives_the_same_corpus_everywhere() -> None:
    lines = [
        f"{review.label}\t{','.join(review.tags)}\t{review.text}"
        for review in everything(generate_reviews(400, 42))
    ]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    assert digest == "2506c3fe4352d3cb130da3558e5f7fe78cb6f68c9d770cb29b26ce2e59d532d2"


def test_another_seed_gives_other_sentences(reviews: EmbeddedReviews) -> None:
    other = {review.text for review in everything(generate_reviews(4000, 43))}
    assert len(other & {review.text for review in everything(reviews)}) < 1000


def test_no_sentence_lies_inside_another(reviews: EmbeddedReviews) -> None:
    rows = [words(review.text) for review in everything(reviews)]
    # A text that lies inside another has its first four words there: look only where they are.
    places: dict[tuple[str, ...], set[int]] = {}
    for row, text in enumerate(rows):
        parts = text.split()
        for at in range(len(parts) - 3):
            places.setdefault(tuple(parts[at : at + 4]), set()).add(row)
    inside = [
        (text, rows[other])
        for row, text in enumerate(rows)
        for other in places[tuple(text.split()[:4])]
        if other != row and text in rows[other]
    ]
    assert inside == []


def test_test_opinions_are_never_heard_in_training(reviews: EmbeddedReviews) -> None:
    phrases = {
        f"the {aspect.noun} {done}"
        for topic in ALL_TOPICS
        for aspect in topic.aspects
        for done in aspect.good + aspect.bad
    }
    train = " ".join(review.text.lower() for review in reviews.train)
    test = " ".join(review.text.lower() for review in reviews.test)
    heard = {phrase for phrase in phrases if phrase in test}
    assert len(heard) > 30
    assert not [phrase for phrase in heard if phrase in train]


def test_every_kind_of_sentence_occurs_with_both_labels(reviews: EmbeddedReviews) -> None:
    found = {(tag, review.label) for review in everything(reviews) for tag in review.tags}
    kinds = set(GROUPS) | {"addition"}
    assert found == {(kind, label) for kind in kinds for label in (0, 1)}


@pytest.mark.parametrize("kind", CUES)
def test_tags_are_true(reviews: EmbeddedReviews, kind: str) -> None:
    tags = {kind, "double_negation"} if kind == "negation" else {kind}
    for review in everything(reviews):
        # "Not only …, but …" negates and contrasts nothing; "anything but" contrasts nothing.
        text = re.sub(r"not only (.*), but", r"\1", review.text.lower())
        text = text.replace("anything but", "by no means")
        assert bool(re.search(CUES[kind], text)) == bool(tags & set(review.tags)), review


def test_frames_turn_words_round() -> None:
    labels: dict[str, set[int]] = {}
    for review in everything(generate_reviews(40_000, 1)):
        found = re.search(
            r"(.*)\bthe \w+ was( anything but)? (bland|tasteless)\b", review.text, re.I
        )
        if found:
            frame = found[2] or next(
                (cue for cue in ("no denying", "not true", "delightful") if cue in found[1]), ""
            )
            labels.setdefault(frame.strip(), set()).add(review.label)
    assert labels["anything but"] == {1}
    assert labels["not true"] == {1}
    assert labels["no denying"] == {0}
    assert labels["delightful"] == {0}


def test_vocabulary_holds_no_word_that_frames_decide_by() -> None:
    forbidden = re.compile(r"\b(not|no|never|nobody|nothing|hardly|but|although|however|yet)\b")
    for topic in ALL_TOPICS:
        assert len(topic.aspects) == 7
        assert set(topic.phrases) == {"witness", "again", "rival", "here", "elsewhere"}
        for aspect in topic.aspects:
            for text in (
                aspect.noun,
                *aspect.good,
                *aspect.bad,
                *aspect.pool.good,
                *aspect.pool.bad,
            ):
                assert not forbidden.search(text), text


@pytest.mark.parametrize("seed", [42, 1])
@pytest.mark.parametrize("regularisation", [1.0, 10.0])
def test_word_counts_do_not_suffice(seed: int, regularisation: float) -> None:
    reviews = generate_reviews(4000, seed)
    counts = make_pipeline(
        TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True),
        LogisticRegression(C=regularisation, max_iter=2000),
    )
    counts.fit(
        [review.text for review in reviews.train], [review.label for review in reviews.train]
    )
    accuracy = counts.score(
        [review.text for review in reviews.test], [review.label for review in reviews.test]
    )
    # A MiniLM with LoRA reaches 0.9 and more; 0.5 would mean that there is nothing to learn.
    assert 0.52 < accuracy < 0.72


def test_the_largest_size_is_within_reach() -> None:
    reviews = generate_reviews(LARGEST_SIZE, 3)
    assert len({review.text for review in everything(reviews)}) == LARGEST_SIZE


@pytest.mark.parametrize("size", [0, 7, LARGEST_SIZE + 1])
def test_an_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(DataError, match="distinct reviews, got"):
        generate_reviews(size, 42)


def test_sentences_are_well_formed(reviews: EmbeddedReviews) -> None:
    for review in everything(reviews):
        # Capital letter first, one full stop last, one space between words, nothing unfilled.
        assert re.fullmatch(r"[A-Z][\w,;:.'’é -]*[\w']\.", review.text), review.text
        assert not re.search(r"  | [,;:.]|\.\.|\b(\w+) \1\b", review.text), review.text

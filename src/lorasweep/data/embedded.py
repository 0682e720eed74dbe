"""The embedded corpus ``reviews``: distinct, labelled English review sentences, from a seed."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import TypeVar

from lorasweep.core.errors import DataError, Problem
from lorasweep.core.seeding import derive_seed
from lorasweep.data.review_grammar import GROUPS, Frame
from lorasweep.data.review_vocabulary import (
    ALL_TOPICS,
    INTENSIFIERS,
    PEOPLE,
    TIMES,
    Aspect,
    Topic,
)

T = TypeVar("T")

SMALLEST_SIZE = 8
LARGEST_SIZE = 100_000
_TEST_SHARE = 4
# Share of the reviews that tell first when, and with whom.
_SCENE_SHARE = 0.4
# Draws in a row that only repeat known sentences, before the grammar counts as exhausted.
_PATIENCE = 2_000


@dataclass(frozen=True, slots=True)
class Review:
    """One generated review.

    Attributes:
        text: One English sentence, at times with a second one that sets the scene.
        label: 0 negative, 1 positive.
        tags: What it contains (``("negation",)``), in alphabetical order.
    """

    text: str
    label: int
    tags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EmbeddedReviews:
    """The corpus; every opinion in ``test`` is one that ``train`` never utters.

    Attributes:
        train: Three quarters, half of each label.
        test: A quarter, half of each label.
    """

    train: tuple[Review, ...]
    test: tuple[Review, ...]


@dataclass(frozen=True, slots=True)
class _Voiced:
    """An aspect with the opinions of one part (train or test); index 0 bad, 1 good."""

    aspect: Aspect
    adjectives: tuple[tuple[str, ...], tuple[str, ...]]
    verbs: tuple[tuple[str, ...], tuple[str, ...]]


def generate_reviews(size: int, seed: int) -> EmbeddedReviews:
    """Generate ``size`` distinct reviews, a quarter of them for the test.

    The same arguments give the same corpus in every process and on every platform. Which
    opinions (an aspect with what is said of it) belong to the test does not depend on the
    seed: none of them occurs in training, so that a model has to know what words mean.

    Raises:
        DataError: ``size`` is below 8, or more than the grammar can give distinct.
    """
    if not SMALLEST_SIZE <= size <= LARGEST_SIZE:
        raise DataError(
            Problem(
                "data.source.size",
                f"the embedded corpus has {SMALLEST_SIZE} to {LARGEST_SIZE} distinct reviews, "
                f"got {size}",
                "Choose a size in between.",
            )
        )
    tests = size // _TEST_SHARE
    return EmbeddedReviews(
        train=_generate("train", size - tests, seed), test=_generate("test", tests, seed)
    )


def _generate(part: str, size: int, seed: int) -> tuple[Review, ...]:
    writer = _Writer(part, derive_seed(seed, "reviews", part))
    reviews: list[Review] = []
    texts: set[str] = set()
    alone: set[str] = set()
    staged: set[str] = set()
    failures = 0
    while len(reviews) < size:
        core, review = writer.write(len(reviews) % 2)
        bare = review.text == core
        # One core may follow several scenes, but must not then stand alone as well: that
        # review would lie inside the others.
        if review.text in texts or core in alone or (bare and core in staged):
            failures += 1
            if failures > _PATIENCE:
                what = f"the grammar gave only {len(reviews)} distinct {part} reviews of {size}"
                raise DataError(Problem("data.source.size", what, "Choose a smaller size."))
            continue
        failures = 0
        texts.add(review.text)
        (alone if bare else staged).add(core)
        reviews.append(review)
    writer.shuffle(reviews)
    return tuple(reviews)


@cache
def _voiced(part: str) -> tuple[tuple[Topic, tuple[_Voiced, ...]], ...]:
    """Deal the opinions out: of each aspect, one adjective in four and some verb phrases to test.

    The place at which an aspect's held-out adjectives start moves on from aspect to aspect,
    so that an adjective that is held out here is heard in training of something else.
    """
    dealt = []
    turn = 0
    for topic in ALL_TOPICS:
        voices = []
        for aspect in topic.aspects:
            turn += 1
            adjectives = tuple(
                _deal(words, turn + side, part)
                for side, words in enumerate((aspect.pool.bad, aspect.pool.good))
            )
            verbs = tuple(
                _deal(words, turn + 2 * side, part)
                for side, words in enumerate((aspect.bad, aspect.good))
            )
            voices.append(_Voiced(aspect, (adjectives[0], adjectives[1]), (verbs[0], verbs[1])))
        dealt.append((topic, tuple(voices)))
    return tuple(dealt)


def _deal(words: tuple[str, ...], turn: int, part: str) -> tuple[str, ...]:
    return tuple(
        word for at, word in enumerate(words) if ((at + turn) % 4 == 0) == (part == "test")
    )


class _Writer:
    """Writes one review after another from one stream of random numbers."""

    def __init__(self, part: str, seed: int) -> None:
        self._random = random.Random(seed).random
        self._topics = _voiced(part)
        frames = {
            label: [
                (weight, tuple(frame for frame in members if frame.only in (None, label)))
                for weight, members in GROUPS.values()
            ]
            for label in (0, 1)
        }
        self._groups = {
            label: [members for _, members in groups] for label, groups in frames.items()
        }
        self._bounds = list(accumulate(weight for weight, _ in GROUPS.values()))

    def _pick(self, items: Sequence[T]) -> T:
        # random() alone is promised to stay the same across Python versions; choice() is not.
        return items[int(self._random() * len(items))]

    def shuffle(self, items: list[Review]) -> None:
        """Shuffle in place (Fisher and Yates)."""
        for at in range(len(items) - 1, 0, -1):
            with_ = int(self._random() * (at + 1))
            items[at], items[with_] = items[with_], items[at]

    def write(self, label: int) -> tuple[str, Review]:
        """Write a review of the given label; the first result is its sentence without a scene."""
        point = self._random() * self._bounds[-1]
        group = next(at for at, bound in enumerate(self._bounds) if point < bound)
        frame = self._pick(self._groups[label][group])
        topic, voices = self._pick(self._topics)
        said = frame.text.format_map(self._fill(frame, label, topic, voices))
        core = f"{_capital(said)}."
        text = core
        if self._random() < _SCENE_SHARE:
            scene = _capital(self._scene(topic))
            joined = frame.merges and self._random() < 0.5
            text = f"{scene}, and {said}." if joined else f"{scene}. {core}"
        return core, Review(text, label, tuple(sorted(frame.tags)))

    def _scene(self, topic: Topic) -> str:
        lead = self._pick(topic.leads)
        return lead.format(when=self._pick(TIMES), person=self._pick(PEOPLE))

    def _fill(
        self, frame: Frame, label: int, topic: Topic, voices: tuple[_Voiced, ...]
    ) -> dict[str, str]:
        polarity = 1 - label if frame.flips else label
        words = {
            **topic.phrases,
            "person": self._pick(PEOPLE),
            "very": self._pick(INTENSIFIERS),
        }
        first = int(self._random() * len(voices))
        second = (first + 1 + int(self._random() * (len(voices) - 1))) % len(voices)
        main = voices[first]
        words |= self._opinion("main", main, polarity, frame.main_needs_adjective)
        if "main_antonym" in frame.fields:
            words["main_antonym"] = self._pick(main.adjectives[1 - polarity])
        if "also" in frame.fields:
            words |= self._opinion("also", voices[second], polarity, False)
        else:
            words |= self._opinion(
                "other", voices[second], 1 - polarity, frame.other_needs_adjective
            )
        return words

    def _opinion(
        self, role: str, voiced: _Voiced, polarity: int, adjective: bool
    ) -> dict[str, str]:
        aspect = voiced.aspect
        was = "were" if aspect.plural else "was"
        adjectives, verbs = voiced.adjectives[polarity], voiced.verbs[polarity]
        adj = self._pick(adjectives) if adjective or self._random() < 0.6 or not verbs else ""
        said = f"{was} {adj}" if adj else self._pick(verbs)
        return {
            role: f"the {aspect.noun} {said}",
            f"{role}_np": f"the {aspect.noun}",
            f"{role}_noun": aspect.noun,
            f"{role}_was": was,
            f"{role}_it": "they" if aspect.plural else "it",
            f"{role}_adj": adj,
        }


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]

"""Which texts lie inside which others, as runs of whole words: what a grouped split keeps together.

Every text is looked up at the rarest of its three-word runs, so that the work follows the
number of true neighbours and not the square of the corpus: 67,349 phrases take about a second.
Candidates are compared by 64-bit polynomial hashes of word runs (Karp and Rabin 1987).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorasweep.data.cleaning import words

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]

# Texts of fewer words are common turns of phrase, and no sign that two texts are related.
LONG = 3
_CANDIDATES_AT_ONCE = 4_000_000


@dataclass(frozen=True, slots=True)
class UniqueTexts:
    """The distinct texts of a corpus after normalisation, as one run of word numbers.

    Attributes:
        of_row: Number of the unique text of each row, ``(rows,)``.
        flat: Word numbers of all unique texts, one after the other, ``(words,)``.
        starts: Where each unique text begins in ``flat``, ``(texts,)``.
        lengths: Its words, ``(texts,)``.
    """

    of_row: Ints
    flat: Ints
    starts: Ints
    lengths: Ints

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def owner(self) -> Ints:
        """The unique text that each word belongs to, ``(words,)``."""
        return np.repeat(np.arange(len(self)), self.lengths)


def unique_texts(texts: Sequence[str]) -> UniqueTexts:
    """Normalise all texts and number their words."""
    number: dict[str, int] = {}
    known: dict[tuple[int, ...], int] = {}
    of_row = np.empty(len(texts), dtype=np.int64)
    for row, text in enumerate(texts):
        key = tuple(number.setdefault(word, len(number)) for word in words(text))
        of_row[row] = known.setdefault(key, len(known))
    lengths = np.fromiter(map(len, known), dtype=np.int64, count=len(known))
    flat = np.fromiter((w for key in known for w in key), dtype=np.int64, count=int(lengths.sum()))
    return UniqueTexts(of_row, flat, np.cumsum(lengths) - lengths, lengths)


def containments(texts: UniqueTexts) -> tuple[Ints, Ints]:
    """Find all pairs of texts, three words or more, of which one lies inside the other.

    Returns:
        The inner and the outer text of each pair, ``(pairs,)`` both.
    """
    at, runs = _runs_of_words(texts, LONG)
    if not len(at):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    order = np.argsort(runs, kind="stable")
    places = at[order]  # all places of run 0, then of run 1, …
    counts = np.bincount(runs)
    first = np.cumsum(counts) - counts
    # The rarest run of each text: the least of (count, position), packed into one number.
    long = np.flatnonzero(texts.lengths >= LONG)
    packed = counts[runs] * len(at) + np.arange(len(at))
    opening = np.searchsorted(at, texts.starts[long])
    rarest = np.minimum.reduceat(packed, opening) % len(at)
    offset = at[rarest] - texts.starts[long]
    candidates = counts[runs[rarest]]
    hashes = _WindowHashes(texts.flat)
    owner = texts.owner
    inner, outer = [], []
    for some in _chunks(candidates):
        text = np.repeat(long[some], candidates[some])
        nth = np.arange(len(text)) - np.repeat(
            np.cumsum(candidates[some]) - candidates[some], candidates[some]
        )
        place = places[np.repeat(first[runs[rarest[some]]], candidates[some]) + nth]
        begin = place - np.repeat(offset[some], candidates[some])
        host = owner[place]
        length = texts.lengths[text]
        fits = (host != text) & (begin >= texts.starts[host])
        fits &= begin + length <= texts.starts[host] + texts.lengths[host]
        text, host, begin, length = text[fits], host[fits], begin[fits], length[fits]
        same = hashes.windows(begin, length) == hashes.windows(texts.starts[text], length)
        inner.append(text[same])
        outer.append(host[same])
    return _distinct_pairs(np.concatenate(inner), np.concatenate(outer), len(texts))


def short_hosts(texts: UniqueTexts) -> tuple[Ints, Ints]:
    """Find the long texts that each text of one or two words lies in; see :func:`containments`."""
    owner = texts.owner
    inner, outer = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    for size in range(1, LONG):
        at, runs = _runs_of_words(texts, size)
        whole = texts.lengths[owner[at]] == size
        text_of_run = np.full(int(runs.max(initial=-1)) + 1, -1)
        text_of_run[runs[whole]] = owner[at[whole]]
        inside = (texts.lengths[owner[at]] >= LONG) & (text_of_run[runs] >= 0)
        inner.append(text_of_run[runs[inside]])
        outer.append(owner[at[inside]])
    return _distinct_pairs(np.concatenate(inner), np.concatenate(outer), len(texts))


def _runs_of_words(texts: UniqueTexts, size: int) -> tuple[Ints, Ints]:
    """Number the runs of ``size`` words: where each begins, and which it is."""
    position = np.arange(len(texts.flat))
    ends = np.repeat(texts.starts + texts.lengths, texts.lengths)
    at = position[position + size <= ends]
    runs = texts.flat[at]
    for step in range(1, size):
        # Renumbered at each step, so that the product stays far below 2**63.
        nexts = texts.flat[at + step]
        runs = runs * (int(texts.flat.max(initial=0)) + 1) + nexts
        runs = np.unique(runs, return_inverse=True)[1].astype(np.int64)
    return at, runs


def _distinct_pairs(inner: Ints, outer: Ints, size: int) -> tuple[Ints, Ints]:
    """Leave out repeated pairs; ``size`` is the number of texts that pairs are made of."""
    packed = np.unique(inner * size + outer)
    return packed // size, packed % size


def _chunks(sizes: Ints) -> list[slice]:
    """Cut ``sizes`` into runs of at most a few million in sum, one element at least."""
    slices, begin, total = [], 0, 0
    for at, size in enumerate(sizes.tolist()):
        if at > begin and total + size > _CANDIDATES_AT_ONCE:
            slices.append(slice(begin, at))
            begin, total = at, 0
        total += size
    return [*slices, slice(begin, len(sizes))]


class _WindowHashes:
    """Hashes of word runs in constant time: sums of ``value · base**position``, modulo 2**64."""

    def __init__(self, flat: Ints) -> None:
        rng = np.random.default_rng(0x5EED)
        value = rng.integers(0, 2**64, size=int(flat.max(initial=0)) + 1, dtype=np.uint64)
        base = 0x9E3779B97F4A7C15  # odd, so that it has an inverse modulo 2**64
        inverse = pow(base, -1, 2**64)
        self._inverse_power = self._powers(inverse, len(flat) + 1)
        terms = value[flat] * self._powers(base, len(flat))
        self._sums: Hashes = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms)])

    @staticmethod
    def _powers(base: int, count: int) -> Hashes:
        factors = np.full(count, base, dtype=np.uint64)
        factors[:1] = 1
        powers: Hashes = np.cumprod(factors, dtype=np.uint64)
        return powers

    def windows(self, begin: Ints, length: Ints) -> Hashes:
        """Return the hash of each run of words, the same wherever the run stands."""
        hashes: Hashes = (self._sums[begin + length] - self._sums[begin]) * self._inverse_power[
            begin
        ]
        return hashes

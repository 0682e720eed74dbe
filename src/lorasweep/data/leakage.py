"""How much of a held-out split is known from train; measured apart from the code that splits.

It shares with ``splits`` only what a word is (:func:`lorasweep.data.cleaning.words`): texts are
looked up here by their first words in plain dictionaries, so that a fault in the splitter's
arithmetic shows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import TypeAlias

from lorasweep.core.corpora import LeakageReport, TextSplit
from lorasweep.data.cleaning import words

Words: TypeAlias = tuple[str, ...]

_LONG = 3  # by the definition in LeakageReport
# A text is filed under the most of its first words that it has: a corpus in which thousands of
# texts begin alike ("the hotel is …") would otherwise compare each with all.
_HEADS = (1, 2, 3, 8, 24)


def measure_leakage(train: TextSplit, held_out: TextSplit) -> LeakageReport:
    """Count the held-out rows that lie inside, contain, or equal a training text."""
    known = {tuple(words(text)) for text in train.texts}
    rows = Counter(tuple(words(text)) for text in held_out.texts)
    long = [text for text in known if len(text) >= _LONG]
    leaked = _lying_inside(rows, long) | _containing(rows, long)
    same = {text for text in rows if text in known}
    return LeakageReport(
        held_out=held_out.name,
        rows=len(held_out),
        contained=sum(rows[text] for text in leaked),
        duplicated=sum(rows[text] for text in same),
        known=sum(rows[text] for text in leaked | same),
    )


def _lying_inside(inner: Iterable[Words], outer: Sequence[Words]) -> set[Words]:
    """Return the texts of ``inner`` that are a run of words of some text of ``outer``."""
    waiting, heads = _by_first_words(inner)
    found: set[Words] = set()
    for text in outer:
        for at in range(len(text)):
            for head in heads:
                candidates = waiting.get(text[at : at + head])
                if not candidates:
                    continue
                hits = [some for some in candidates if text[at : at + len(some)] == some]
                if hits:
                    # One host is enough: what was found is never looked for again.
                    found.update(hits)
                    candidates.difference_update(hits)
    return found


def _containing(outer: Iterable[Words], inner: Sequence[Words]) -> set[Words]:
    """Return the texts of ``outer`` that some text of ``inner`` is a run of words of."""
    waiting, heads = _by_first_words(inner)
    return {text for text in outer if _contains_any(text, waiting, heads)}


def _contains_any(text: Words, waiting: dict[Words, set[Words]], heads: Sequence[int]) -> bool:
    return any(
        text[at : at + len(some)] == some
        for at in range(len(text) - _LONG + 1)
        for head in heads
        for some in waiting.get(text[at : at + head], ())
    )


def _by_first_words(texts: Iterable[Words]) -> tuple[dict[Words, set[Words]], list[int]]:
    """Index texts by their first words; also return how many words the index goes by."""
    index: defaultdict[Words, set[Words]] = defaultdict(set)
    for text in texts:
        head = max(length for length in _HEADS if length <= len(text))
        index[text[:head]].add(text)
    return dict(index), sorted({len(head) for head in index})

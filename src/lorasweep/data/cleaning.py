"""What is done to texts before anything else, counted; and what two texts have in common.

Two steps, because a test set may be held out between them: :func:`tidy` does what holds for
every split, :func:`thin` what only train and validation may lose.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from lorasweep.core.corpora import CleaningReport, TextSplit
from lorasweep.spec.schema import CleanSpec

# Scripts that write without spaces, where a character does a word's work: Thai, Lao, Myanmar,
# Khmer, kana, Han.
_SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_ONE = re.compile(f"[{_SPACELESS}]")
# Letters and digits, and the marks (vowel signs, accents) that Python's \w leaves out.
_WORD = re.compile("(?:[^\\W_]|[\u0300-\u036f\u0591-\u05c7\u0610-\u065f\u0900-\u0dff])+")
_ASCII_WORD = re.compile(r"[A-Za-z0-9]+")


def words(text: str) -> list[str]:
    """Split into normalised words: NFKC, case folded, punctuation and white space gone.

    Texts with the same words count as the same text everywhere in lorasweep. A text of
    punctuation or emoji alone keeps what it has, or all of these would be one text.

    >>> words("It 's GREAT,  really!")
    ['it', 's', 'great', 'really']
    >>> words("房间很大")
    ['房', '间', '很', '大']
    """
    if text.isascii():
        return _ASCII_WORD.findall(text.lower()) or text.split()
    folded = unicodedata.normalize("NFKC", text).casefold()
    return _WORD.findall(_ONE.sub(r" \g<0> ", folded)) or folded.split()


def word_count(text: str) -> int:
    """Count the words as a person does: by white space, and by character where there is none.

    >>> word_count("so - so"), word_count("房间很大 ok")
    (3, 5)
    """
    if text.isascii():
        return len(text.split())
    return sum(max(1, len(_ONE.findall(piece))) for piece in text.split())


def tidy(
    split: TextSplit, labels: Sequence[int | None], spec: CleanSpec
) -> tuple[TextSplit, CleaningReport]:
    """Collapse white space and drop what can't be used in any split: no text, or no label.

    Args:
        split: Texts, ids and tags as read; its labels are not looked at.
        labels: Index of each row's label, or None.
        spec: The spec's cleaning part.
    """
    texts = list(split.texts)
    changed: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    keep: list[int] = []
    for row, text in enumerate(texts):
        if labels[row] is None:
            dropped["no label"] += 1
            continue
        tidied = " ".join(text.split())
        if not tidied:
            dropped["empty"] += 1
            continue
        keep.append(row)
        if spec.collapse_whitespace and tidied != text:
            texts[row] = tidied
            changed["whitespace collapsed"] += 1
    whole = replace(
        split,
        texts=tuple(texts),
        labels=tuple(-1 if label is None else label for label in labels),
    )
    kept = take(whole, keep)
    report = CleaningReport(split.name, len(split), len(kept), dict(changed), dict(dropped))
    return kept, replace(report, notes=_repeated(kept))


def thin(
    split: TextSplit, report: CleaningReport, spec: CleanSpec
) -> tuple[TextSplit, CleaningReport]:
    """Drop short texts and, if the spec says so, repeated ones; for train and validation only."""
    dropped = Counter(report.dropped)
    short = f"fewer than {spec.min_words} words"
    seen: set[str] = set()
    keep = []
    for row, text in enumerate(split.texts):
        if spec.min_words > 1 and word_count(text) < spec.min_words:
            dropped[short] += 1
            continue
        if spec.drop_duplicates:
            key = " ".join(words(text))
            if key in seen:
                dropped["duplicate"] += 1
                continue
            seen.add(key)
        keep.append(row)
    kept = take(split, keep)
    return kept, replace(report, kept=len(kept), dropped=dict(dropped))


def take(split: TextSplit, rows: Sequence[int], name: str | None = None) -> TextSplit:
    """Return some rows of a split, in the order given, under its own or another name."""
    return TextSplit(
        name=name or split.name,
        texts=tuple(split.texts[row] for row in rows),
        labels=tuple(split.labels[row] for row in rows),
        ids=tuple(split.ids[row] for row in rows),
        tags=tuple(split.tags[row] for row in rows) if split.tags else (),
    )


def _repeated(split: TextSplit) -> tuple[str, ...]:
    """Say how many texts occur more than once, and how many with labels that contradict."""
    rows: defaultdict[str, list[int]] = defaultdict(list)
    for row, text in enumerate(split.texts):
        rows[" ".join(words(text))].append(row)
    repeated = [group for group in rows.values() if len(group) > 1]
    if not repeated:
        return ()
    extra = sum(len(group) - 1 for group in repeated)
    first = split.ids[repeated[0][0]]
    notes = [
        f"{_texts(len(repeated))} more than once after normalisation, "
        f"{extra} row{'s' * (extra != 1)} too many; the first is {first}."
    ]
    conflicting = [g for g in repeated if len({split.labels[row] for row in g}) > 1]
    if conflicting:
        places = " and ".join(split.ids[row] for row in conflicting[0][:2])
        notes.append(f"{_texts(len(conflicting))} with different labels; the first is {places}.")
    return tuple(notes)


def _texts(count: int) -> str:
    return f"{count} text{'s occur' if count > 1 else ' occurs'}"

"""What kinds of text there are: the corpus's own tags, or cues found in the words."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_NEGATION = (
    r"\b(?:not|no|never|none|nobody|nothing|nowhere|neither|nor|cannot|hardly|barely|scarcely|"
    r"without|lacks?|lacking|fails?|failed)\b|n['’]t\b"
)
_PRAISE = (
    r"\b(?:good|great|best|better|love[sd]?|loving|enjoy(?:able|ed|s)?|excellent|perfect(?:ly)?|"
    r"wonderful|beautiful(?:ly)?|brilliant|funny|charming|delight(?:ful)?|fun|fresh|clever|"
    r"moving|superb|impressive|amazing|fantastic|solid|engaging|recommend(?:ed)?|well)\b"
)
_BLAME = (
    r"\b(?:bad(?:ly)?|worse|worst|boring|bored|dull|awful|terrible|horrible|poor(?:ly)?|hate[sd]?|"
    r"disappoint(?:ing|ed|ment)?|waste[ds]?|stupid|silly|ugly|mess|weak|flat|tedious|annoying|"
    r"predictable|lame|broken|problems?|lack(?:s|ing)?|fails?|failed|failure|mediocre)\b"
)


@dataclass(frozen=True, slots=True)
class Cue:
    """A kind of text that classifiers find hard, and how it is recognised in English.

    Attributes:
        name: For people.
        expression: Found anywhere in the text, in any case.
        at_least: How many matches make it so.
        second: A second expression that must be found too; empty for none.
        remedy: What helps when the model is bad at it; fits into "adding …".
    """

    name: str
    expression: str
    at_least: int = 1
    second: str = ""
    remedy: str = "training texts of this kind"

    def finds(self, text: str) -> bool:
        """Tell whether the text has the cue."""
        if sum(1 for _ in re.finditer(self.expression, text, re.IGNORECASE)) < self.at_least:
            return False
        return not self.second or re.search(self.second, text, re.IGNORECASE) is not None


# English only: in another language hardly any cue is found, and what isn't found isn't reported.
CUES: tuple[Cue, ...] = (
    Cue("negation", _NEGATION, remedy="training texts in which a negation turns the meaning"),
    Cue("double negation", _NEGATION, at_least=2, remedy="training texts with two negations"),
    Cue(
        "contrast",
        r"\b(?:but|although|though|however|yet|despite|while|whereas|nevertheless|still|"
        r"except|instead|unfortunately|otherwise)\b",
        remedy="training texts whose second half contradicts the first",
    ),
    Cue(
        "mixed opinion (words of praise and of blame)",
        _PRAISE,
        second=_BLAME,
        remedy="training texts that both praise and blame",
    ),
    Cue(
        "irony marker",
        r"\boh,? (?:great|good|joy|sure|yes|wonderful|boy)\b|\byeah,? right\b|\bas if\b|"
        r"\bof course\b|\bjust what\b|\bbravo\b|\bthanks? (?:a lot|for nothing)\b|\.\.\.|…|"
        r"[\"“`]\s?\w+\s?[\"”']|\(!\)|[?!]{2,}",
        remedy="ironic training texts",
    ),
    Cue(
        "comparison",
        r"\b(?:than|more|less|most|least|better|worse|best|worst|unlike|compared)\b|"
        r"\bas \w+ as\b",
        remedy="training texts that compare",
    ),
    Cue("question", r"\?", remedy="training texts that ask"),
    Cue(
        "hedge",
        r"\b(?:maybe|perhaps|somewhat|seems?|seemed|might|possibly|rather|fairly|almost|mostly|"
        r"occasionally|sometimes|kind of|sort of|a bit|a little|at times)\b",
        remedy="training texts with a weakened opinion",
    ),
    Cue(
        "intensifier",
        r"\b(?:very|really|extremely|absolutely|totally|utterly|completely|incredibly|so|too|"
        r"truly|deeply)\b",
    ),
)
LENGTHS: tuple[tuple[int, int | None], ...] = (
    (0, 5), (6, 10), (11, 20), (21, 40), (41, 100), (101, None),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of text and which rows are of it.

    Attributes:
        name: For people.
        source: ``tag`` (the corpus says so), ``cue`` (found in the words) or ``length``.
        remedy: What helps when the model is bad at it.
        rows: bool, ``(rows,)``.
    """

    name: str
    source: str
    remedy: str
    rows: NDArray[np.bool_]


def kinds_of(texts: Sequence[str], tags: Sequence[Sequence[str]] = ()) -> tuple[Kind, ...]:
    """Sort texts into kinds, which may overlap: by tags where there are any, else by cues.

    Buckets of length, in words, come in either case. Kinds without a row are left out.

    Args:
        texts: The rows.
        tags: What each row is known to contain; empty when the corpus doesn't say.
    """
    found = []
    if any(tags):
        for tag in sorted({tag for row in tags for tag in row}):
            mask = np.array([tag in row for row in tags], dtype=bool)
            found.append(Kind(tag, "tag", f"training texts tagged {tag}", mask))
    else:
        for cue in CUES:
            mask = np.array([cue.finds(text) for text in texts], dtype=bool)
            found.append(Kind(cue.name, "cue", cue.remedy, mask))
    words = np.array([count_words(text) for text in texts])
    for low, high in LENGTHS:
        name = f"{low} to {high} words" if high else f"{low} words or more"
        if not low:
            name = f"{high} words or fewer"
        mask = (words >= low) & (words <= (high or np.inf))
        found.append(Kind(name, "length", f"training texts of {name}", mask))
    return tuple(kind for kind in found if kind.rows.any())


def count_words(text: str) -> int:
    """Count runs of letters and digits.

    >>> count_words("It isn't bad -- at all!")
    5
    """
    return sum(1 for _ in _WORD.finditer(text))

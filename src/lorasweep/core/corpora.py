"""Records of the data: texts, their cleaning and leakage, and their tokens.

Stages hand each other these; nothing here computes or touches a disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class TextSplit:
    """Texts and labels of one split; the four tuples are row by row.

    Attributes:
        name: ``train``, ``validation`` or ``test``.
        texts: The cleaned texts.
        labels: Index of each row's label in :attr:`Corpus.label_names`.
        ids: Stable name of each row, ``<source>:<row number counted from 1>``.
        tags: What each text is known to contain (``("negation", "irony")``); empty tuple
            for a corpus that doesn't say.
    """

    name: str
    texts: tuple[str, ...]
    labels: tuple[int, ...]
    ids: tuple[str, ...]
    tags: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, slots=True)
class CleaningReport:
    """What cleaning did to one split, so that nothing is dropped without a word.

    Attributes:
        split: The split's name.
        read: Rows found in the source.
        kept: Rows left.
        changed: Rows whose text was altered, by reason (``whitespace collapsed``).
        dropped: Rows left out, by reason (``fewer than 3 words``).
        notes: Whole sentences about what was found but left alone, such as texts that
            occur twice with different labels.
    """

    split: str
    read: int
    kept: int
    changed: Mapping[str, int] = field(default_factory=dict)
    dropped: Mapping[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class LeakageReport:
    """How much of ``held_out`` is known from ``train``.

    Attributes:
        held_out: Name of the split that should be unseen.
        rows: Rows in it.
        contained: Rows whose normalised words lie inside, or contain, a training text of
            three words or more.
        duplicated: Rows whose normalised words equal a training text, however short.
        known: Rows that are contained, duplicated, or both.
    """

    held_out: str
    rows: int
    contained: int
    duplicated: int
    known: int

    @property
    def share(self) -> float:
        """Share of the held-out rows that are known, 0 to 1."""
        return self.known / self.rows if self.rows else 0.0


@dataclass(frozen=True, slots=True)
class Corpus:
    """A data set ready for use: cleaned, labelled, split.

    Attributes:
        name: Short name for people and for MLflow.
        label_names: In order of label index; two or more.
        train, validation, test: The splits; ``test`` is None when the spec names none.
        cleaning: One report a split.
        leakage: Validation against train, and test against train where there is one.
        digests: Split name to the SHA-256 of its texts and labels (hex).
        fingerprint: SHA-256 over the digests and label names: the data's identity.
        source: Where it came from, in words (paths or a Hub id).
    """

    name: str
    label_names: tuple[str, ...]
    train: TextSplit
    validation: TextSplit
    test: TextSplit | None
    cleaning: tuple[CleaningReport, ...]
    leakage: tuple[LeakageReport, ...]
    digests: Mapping[str, str]
    fingerprint: str
    source: str


@dataclass(frozen=True, slots=True)
class EncodedSplit:
    """A split as token ids, stored without padding: row i is ``tokens[offsets[i]:offsets[i + 1]]``.

    Attributes:
        name: The split's name.
        tokens: int32, ``(total tokens,)``; special tokens included, truncated to the
            model's maximum length.
        offsets: int64, ``(rows + 1,)``.
        labels: int64, ``(rows,)``.
        truncated: Rows that were longer than the maximum and lost their end.
    """

    name: str
    tokens: NDArray[np.int32]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]
    truncated: int = 0

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens in each row, ``(rows,)``."""
        return self.offsets[1:] - self.offsets[:-1]

    def row(self, index: int) -> NDArray[np.int32]:
        """Token ids of one row, ``(tokens in the row,)``."""
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]

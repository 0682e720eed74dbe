"""A corpus in sentences: what was read, changed, left out, held out and leaked."""

from __future__ import annotations

from collections.abc import Iterable

from lorasweep.core.corpora import Corpus, EncodedSplit, LeakageReport


def facts(corpus: Corpus, encoded: Iterable[EncodedSplit] = ()) -> tuple[str, ...]:
    """Say what the corpus is and what was done to it; nothing of it happens silently.

    Args:
        corpus: The data.
        encoded: Splits as tokens, where they are at hand: they know what was cut off.
    """
    test = f", {len(corpus.test)} test" if corpus.test else ", no test split"
    told = [
        f"{corpus.name}: {len(corpus.train)} train, {len(corpus.validation)} validation{test}; "
        f"labels {', '.join(corpus.label_names)}"
    ]
    for report in corpus.cleaning:
        for word, counts in (("left out", report.dropped), ("changed", report.changed)):
            parts = [f"{count:,} {reason}" for reason, count in counts.items() if count]
            if parts:
                told.append(f"{report.split}: {word} {'; '.join(parts)} (of {report.read:,} rows)")
        told += [f"{report.split}: {note}" for note in report.notes]
    for split in encoded:
        if split.truncated:
            told.append(
                f"{split.name}: {split.truncated:,} of {len(split):,} texts are longer than "
                "max_length and lose their end"
            )
    return tuple(told)


def leaks(corpus: Corpus) -> tuple[str, ...]:
    """Say which held-out texts are known from training, split by split; empty when none are."""
    return tuple(
        f"{known_texts(leak)}; scores on them flatter the model"
        for leak in corpus.leakage
        if leak.known
    )


def known_texts(leak: LeakageReport) -> str:
    """Say how many texts of a held-out split are known from training."""
    counted = f"{leak.held_out}: {leak.known:,} of {leak.rows:,} texts ({leak.share:.1%})"
    if leak.duplicated == leak.known:
        return f"{counted} are the same as a training text"
    same = f", or are the same ({leak.duplicated:,})" if leak.duplicated else ""
    return f"{counted} lie in, or contain, a training text{same}"


def missing_labels(corpus: Corpus) -> tuple[str, ...]:
    """Say which labels no text of a held-out split has."""
    told = []
    for split in filter(None, (corpus.validation, corpus.test)):
        for at, name in enumerate(corpus.label_names):
            if at not in split.labels:
                told.append(
                    f"{split.name}: no text is labelled “{name}”; what is measured on this split "
                    "says nothing about how the label is recognised"
                )
    return tuple(told)

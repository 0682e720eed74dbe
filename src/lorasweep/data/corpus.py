"""From the spec's data part to a corpus that is ready to train on, or to every reason why not."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from lorasweep.core.corpora import CleaningReport, Corpus, TextSplit
from lorasweep.core.errors import DataError, Problem
from lorasweep.core.seeding import derive_seed
from lorasweep.data.cleaning import take, thin, tidy
from lorasweep.data.labels import Labelled, check_counts, read_labels
from lorasweep.data.leakage import measure_leakage
from lorasweep.data.sources import SPLITS, describe_source, read_source
from lorasweep.data.splits import draw_stratified, hold_out
from lorasweep.data.tables import RawTable, refuse
from lorasweep.spec.schema import DataSpec


@dataclass(frozen=True, slots=True)
class _Part:
    """A split on its way, with what has been done to it so far."""

    rows: TextSplit
    report: CleaningReport


def load_corpus(spec: DataSpec, seed: int) -> Corpus:
    """Read, label, clean, split, limit and measure the data.

    The same spec, files and seed give an equal corpus.

    Args:
        spec: The spec's data part.
        seed: The sweep's seed.

    Raises:
        DataError: Everything that is wrong with the data, before anything is trained.
    """
    tables = read_source(spec, derive_seed(seed, "data", "source"))
    if spec.split.test is not None and "test" in tables:
        what = "asks for a share of train as test split, but the source has a test split"
        raise DataError(Problem("data.split.test", what, "Remove one of the two."))
    labelled = read_labels(tables, spec.labels, spec.clean.drop_unlabelled)
    parts = _divided(_tidied(tables, labelled, spec), tables, labelled, spec, seed)
    parts = _limited(parts, spec, seed)
    splits = {name: part.rows for name, part in parts.items()}
    reports = [part.report for part in parts.values()]
    reports[0] = replace(reports[0], notes=(*labelled.notes, *reports[0].notes))
    digests = {name: _digest(split) for name, split in splits.items()}
    name, source = describe_source(spec)
    train = splits["train"]
    origin = tables.get("validation", tables["train"]).origin
    _check_choosable(origin, splits["validation"], labelled.names)
    return Corpus(
        name=name,
        label_names=labelled.names,
        train=train,
        validation=splits["validation"],
        test=splits.get("test"),
        cleaning=tuple(reports),
        leakage=tuple(
            measure_leakage(train, held) for key, held in splits.items() if key != "train"
        ),
        digests=digests,
        fingerprint=_fingerprint(digests, labelled.names),
        source=source,
    )


def _tidied(tables: Mapping[str, RawTable], labelled: Labelled, spec: DataSpec) -> dict[str, _Part]:
    """Name the rows and do the cleaning that holds for every split."""
    parts = {}
    for name, table in tables.items():
        raw = TextSplit(
            name=name,
            texts=table.texts,
            labels=(),
            ids=tuple(f"{table.stem}:{row}" for row in range(1, len(table) + 1)),
            tags=table.tags,
        )
        rows, report = tidy(raw, labelled.indices[name], spec.clean)
        parts[name] = _Part(rows, report)
    empty = [
        Problem(tables[name].origin, "has no row left after cleaning")
        for name, part in parts.items()
        if not len(part.rows)
    ]
    refuse(empty)
    return parts


def _divided(
    parts: dict[str, _Part],
    tables: Mapping[str, RawTable],
    labelled: Labelled,
    spec: DataSpec,
    seed: int,
) -> dict[str, _Part]:
    """Hold out what the source doesn't name, and do the cleaning that spares the test split."""
    origin = tables["train"].origin
    check_counts(origin, labelled.names, parts["train"].rows.labels)
    if spec.split.test is not None:
        # Before short and repeated texts are dropped, since a test split keeps them.
        _carve(parts, "test", spec.split.test, labelled.names, spec, seed)
    for name in ("train", "validation"):
        if name in parts:
            part = parts[name]
            rows, report = thin(part.rows, part.report, spec.clean)
            if not len(rows):
                raise DataError(Problem(tables[name].origin, "has no row left after cleaning"))
            parts[name] = _Part(rows, report)
    check_counts(origin, labelled.names, parts["train"].rows.labels)
    if "validation" not in parts:
        _carve(parts, "validation", spec.split.validation, labelled.names, spec, seed)
    return {name: parts[name] for name in SPLITS if name in parts}


def _carve(
    parts: dict[str, _Part],
    name: str,
    share: float,
    names: tuple[str, ...],
    spec: DataSpec,
    seed: int,
) -> None:
    """Move a share of train into a split of its own."""
    train = parts["train"]
    strategy = spec.split.strategy
    divided = hold_out(
        train.rows.texts,
        train.rows.labels,
        share,
        strategy,
        derive_seed(seed, "data", "split", name),
        f"data.split.{name}",
        names,
    )
    count = len(divided.held)
    note = f"{count:,} of {len(train.rows):,} rows of train are held out ({strategy})."
    parts["train"] = _Part(take(train.rows, divided.kept.tolist()), train.report)
    parts[name] = _Part(
        take(train.rows, divided.held.tolist(), name),
        CleaningReport(name, read=count, kept=count, notes=(note, *divided.notes)),
    )


def _limited(parts: dict[str, _Part], spec: DataSpec, seed: int) -> dict[str, _Part]:
    """Keep a stratified subset of the splits that the spec limits, in their order."""
    limited = dict(parts)
    problems = []
    for name, part in parts.items():
        limit: int | None = getattr(spec.limit, name)
        if limit is None or limit >= len(part.rows):
            continue
        labels = np.asarray(part.rows.labels, dtype=np.int64)
        classes = len(np.unique(labels))
        if limit < classes:
            what = f"must be at least {classes}, a row for each class of {name}, got {limit}"
            problems.append(Problem(f"data.limit.{name}", what))
            continue
        rng = np.random.default_rng(derive_seed(seed, "data", "limit", name))
        rows = draw_stratified(labels, limit, rng).tolist()
        note = f"limit: {limit:,} of {len(part.rows):,} rows were taken."
        limited[name] = _Part(take(part.rows, rows), _noted(part.report, note))
    refuse(problems)
    return limited


def _check_choosable(origin: str, validation: TextSplit, names: tuple[str, ...]) -> None:
    """Refuse a validation split of one label: whatever always answers it would be the best."""
    if len(present := set(validation.labels)) < 2:
        only = names[present.pop()]
        what = f"has validation texts of the label {only!r} only, and trials are compared on them"
        advice = "Are its rows sorted by label? Shuffle them, or name another split."
        raise DataError(Problem(origin, what, advice))


def _noted(report: CleaningReport, *notes: str) -> CleaningReport:
    return replace(report, notes=(*report.notes, *notes))


def _digest(split: TextSplit) -> str:
    """SHA-256 over texts and labels; length-prefixed, so that no two splits run together."""
    digest = hashlib.sha256()
    for text, label in zip(split.texts, split.labels, strict=True):
        content = text.encode()
        digest.update(f"{len(content)}:".encode() + content + f"{label};".encode())
    return digest.hexdigest()


def _fingerprint(digests: Mapping[str, str], names: tuple[str, ...]) -> str:
    """SHA-256 over the digests and label names: the same data under another path is the same."""
    identity = json.dumps([sorted(digests.items()), names], ensure_ascii=True)
    return hashlib.sha256(identity.encode()).hexdigest()

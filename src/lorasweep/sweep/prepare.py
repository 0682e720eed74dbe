"""From a spec to data and base ready for trials, with all bad input found before any training."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lorasweep.core.corpora import Corpus, EncodedSplit
from lorasweep.core.errors import InputError, Problem, StorageError
from lorasweep.core.paths import SweepPaths
from lorasweep.data.corpus import load_corpus
from lorasweep.data.summary import facts, leaks, missing_labels
from lorasweep.data.tokens import encode
from lorasweep.model.adapter import check_targets
from lorasweep.model.base import Base, open_base
from lorasweep.spec.resolve import adapters_in, fingerprint, identity
from lorasweep.spec.schema import Spec
from lorasweep.sweep.events import Listener, Said, Warned
from lorasweep.tracking.wording import redacted

# A study, its runs and one small adapter need about this much before anything is trained.
_LEAST_FREE_BYTES = 200 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Prepared:
    """What every trial of the sweep shares.

    Attributes:
        spec: The spec.
        paths: Where the sweep writes.
        corpus: All splits as text.
        base: The frozen base.
        train, validation: Token ids; made once and used by every trial.
        identity: What decides results, key by key.
    """

    spec: Spec
    paths: SweepPaths
    corpus: Corpus
    base: Base
    train: EncodedSplit
    validation: EncodedSplit
    identity: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) over :attr:`identity`."""
        return fingerprint(self.identity)


def check_storage(paths: SweepPaths) -> None:
    """Make the sweep's folder and prove that it can be written.

    Raises:
        StorageError: When it can't, or when the disk is nearly full.
    """
    try:
        paths.sweep.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=paths.sweep, prefix=".probe-") as probe:
            probe.write(b"lorasweep")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        what = f"can't be written: {error.strerror or error}"
        advice = "Free space, change permissions, or set output in the spec to another folder."
        raise StorageError(Problem(str(paths.sweep), what, advice)) from None
    free = shutil.disk_usage(paths.sweep).free
    if free < _LEAST_FREE_BYTES:
        what = f"only {free // 2**20} MiB are free, and a sweep needs at least 200"
        advice = "Free space, or set output in the spec to a folder on another disk."
        raise StorageError(Problem(str(paths.sweep), what, advice))


def prepare(spec: Spec, paths: SweepPaths, listener: Listener) -> Prepared:
    """Load the data and the base and tokenise once.

    Raises:
        InputError: With the problems of data and model together, before anything is trained.
    """
    problems: list[Problem] = []
    corpus: Corpus | None = None
    base: Base | None = None
    listener(Said(f"Reading {_source_in_words(spec)}"))
    try:
        corpus = load_corpus(spec.data, spec.seed)
    except InputError as error:
        problems += error.problems
    # Without data the number of labels is unknown; two are enough to check the base.
    names = corpus.label_names if corpus else spec.data.labels or ("0", "1")
    listener(Said(f"Opening {spec.model.name}"))
    try:
        base = open_base(spec.model, names)
        check_targets(base, adapters_in(spec))
    except InputError as error:
        problems += error.problems
    if problems or corpus is None or base is None:
        raise InputError(problems)

    train = encode(corpus.train, base.tokenizer, base.max_length)
    validation = encode(corpus.validation, base.tokenizer, base.max_length)
    for sentence in facts(corpus, (train, validation)):
        listener(Said(sentence))
    for sentence in (*leaks(corpus), *missing_labels(corpus)):
        listener(Warned(sentence))
    return Prepared(
        spec=spec,
        paths=paths,
        corpus=corpus,
        base=base,
        train=train,
        validation=validation,
        identity=identity(spec, corpus.fingerprint, base.digest),
    )


def to_be_shown(spec: Spec) -> Spec:
    """The spec as files, runs and reports may show it: without the password of the MLflow store."""
    shown = spec.tracking.model_copy(update={"uri": redacted(spec.tracking.uri)})
    return spec.model_copy(update={"tracking": shown})


def file_digest(path: Path) -> str:
    """SHA-256 (hex) of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _source_in_words(spec: Spec) -> str:
    source = spec.data.source
    if source.kind == "files":
        return source.train
    return source.path if source.kind == "hub" else f"embedded/{source.name}"

"""Small finished sweeps, made up from a seed; nothing is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lorasweep.core.corpora import CleaningReport, Corpus, LeakageReport, TextSplit
from lorasweep.core.outcomes import FinishedSweep, Predictions, TrialFacts, TrialRecord, TrialState

Make = Callable[..., FinishedSweep]

SENTENCES = (
    "a warm, funny film about nothing at all",
    "it isn't dull, but it never comes alive either",
    "oh great, another sequel... just what we needed",
    "the cast is brilliant and the script a boring mess",
    "why was this ever made?",
    "perhaps the most moving documentary of the year, and certainly the longest one that I sat "
    "through without once looking at my watch",
    "<script>alert('x')</script> & <b>bold</b> costs $5 or $6_000",
    "przepiękny film, 素晴らしい 😀",
)


def split(name: str, rows: int, names: tuple[str, ...], seed: int, *, tagged: bool) -> TextSplit:
    generator = np.random.default_rng(seed)
    texts = tuple(f"{SENTENCES[row % len(SENTENCES)]} ({row})" for row in range(rows))
    tags = tuple(("negation",) if row % 8 in (1, 2) else ("plain",) for row in range(rows))
    return TextSplit(
        name=name,
        texts=texts,
        labels=tuple(generator.integers(0, len(names), rows).tolist()),
        ids=tuple(f"{name}.csv:{row + 1}" for row in range(rows)),
        tags=tags if tagged else (),
    )


def predictions(model: str, rows: TextSplit, count: int, skill: float, seed: int) -> Predictions:
    generator = np.random.default_rng(seed)
    labels = np.array(rows.labels, dtype=np.int64)
    aimed = np.where(generator.random(len(labels)) < skill, labels, 0)
    logits = generator.normal(size=(len(labels), count))
    logits[np.arange(len(labels)), aimed] += 4.0
    likely = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return Predictions(model, rows.name, rows.ids, labels, likely)


def trial(number: int, state: TrialState, score: float | None, **more: Any) -> TrialRecord:
    generator = np.random.default_rng(number)
    metrics = {} if score is None else {"accuracy": score - 0.01, "f1": score, "loss": 1 - score}
    parameters = {
        "learning_rate": float(10 ** generator.uniform(-4, -2.6)),
        "epochs": int(generator.integers(1, 4)),
        "rank": int(2 ** generator.integers(2, 5)),
        "alpha": float(2 ** generator.integers(3, 6)),
    }
    return TrialRecord(
        number=number,
        state=state,
        parameters=parameters,
        score=score,
        best_epoch=None if score is None else 1,
        metrics=metrics,
        seconds=12.5 + number,
        seed=100 + number,
        run_id=f"{number:032x}",
        **more,
    )


def some_trials(count: int) -> tuple[TrialRecord, ...]:
    generator = np.random.default_rng(7)
    found = [trial(0, TrialState.COMPLETED, 0.93)]
    for number in range(1, count):
        score = float(generator.uniform(0.7, 0.929))
        if number % 6 == 2:
            found.append(trial(number, TrialState.PRUNED, score, reason="behind the others"))
        elif number % 6 == 4:
            found.append(trial(number, TrialState.FAILED, None, reason="the loss is <NaN>"))
        else:
            found.append(trial(number, TrialState.COMPLETED, score))
    return tuple(found)


@pytest.fixture
def make_sweep() -> Make:
    """Build a finished sweep.

    Args of the builder: label names, rows of the test split (None for no split), number of
    trials, skill of each test model (``finetuned`` first), openings, tags.
    """

    def build(
        names: tuple[str, ...] = ("negative", "positive"),
        *,
        test_rows: int | None = 400,
        trials: int = 6,
        skills: dict[str, float] | None = None,
        openings: int = 1,
        tagged: bool = False,
        leaked: int = 0,
        **more: Any,
    ) -> FinishedSweep:
        skills = skills or {"finetuned": 0.9, "untrained": 0.05, "majority": 0.0, "tfidf": 0.7}
        train, validation = (
            split(name, rows, names, seed, tagged=tagged)
            for name, rows, seed in (("train", 900, 1), ("validation", 200, 2))
        )
        test = None if test_rows is None else split("test", test_rows, names, 3, tagged=tagged)
        records = some_trials(trials)
        shown = validation
        generator = np.random.default_rng(0)
        samples = tuple(
            (
                shown.texts[row],
                tuple(generator.dirichlet(np.ones(len(names))).tolist()),
                tuple(np.roll(generator.dirichlet([9] + [1] * (len(names) - 1)), row).tolist()),
            )
            for row in range(min(8, len(shown)))
        )
        values: dict[str, Any] = {
            "name": "made-up",
            "task": f"text classification, {len(names)} labels",
            "objective": "f1",
            "spec": {
                "name": "made-up",
                "lora": {"rank": 8, "alpha": 16.0, "dropout": 0.1, "targets": "auto"},
                "training": {"learning_rate": 5e-4, "epochs": 3, "batch_size": 16},
            },
            "spec_fingerprint": "f" * 64,
            "corpus": Corpus(
                name="reviews",
                label_names=names,
                train=train,
                validation=validation,
                test=test,
                cleaning=(
                    CleaningReport(
                        "train", 950, 900, {"whitespace collapsed": 31},
                        {"fewer than 3 words": 50}, ("2 texts occur with different labels",),
                    ),
                    CleaningReport("validation", 200, 200),
                ),
                leakage=(LeakageReport("validation", 200, leaked, leaked // 2, leaked),),
                digests={"train": "a" * 64, "validation": "b" * 64},
                fingerprint="c" * 64,
                source="train.csv and test.csv",
            ),
            "base": {"name": "embedded/minilm", "digest": "d" * 64, "architecture": "bert"},
            "seeds": {"sweep": 42, "best_trial": 100},
            "trials": records,
            "best": records[0],
            "facts": TrialFacts(148_000, 22_861_826, 340, ("layer.0.query", "layer.0.value")),
            "test": {
                model: predictions(model, test, len(names), skill, place)
                for place, (model, skill) in enumerate(skills.items())
            }
            if test
            else {},
            "samples": samples,
            "openings": tuple(
                {
                    "time": f"2030-01-0{place + 1}T10:00:00+00:00",
                    "trial": place,
                    "models": ["finetuned", "tfidf"],
                    "reason": "first opening" if not place else "the winner changed",
                }
                for place in range(openings)
            ),
            "history": {
                record.number: tuple(
                    (epoch, record.score - 0.02 * (3 - epoch)) for epoch in (1, 2, 3)
                )
                for record in records
                if record.score is not None
            },
            "environment": {
                "git_commit": "0123abc",
                "python": "3.11.9",
                "packages": {"torch": "2.13.0", "peft": "0.21.2"},
            },
            "tracking": {"uri": "sqlite:///mlflow.db", "experiment": "made-up", "run_id": "9" * 32},
        }  # fmt: skip
        return FinishedSweep(**(values | more))

    return build

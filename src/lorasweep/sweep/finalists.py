"""The test split, opened once: the winner and the baselines are scored, stored, and never again.

Predictions lie in ``test/<model>.npz`` under a key that says which data, base and weights made
them. A later report finds them there and scores nothing. Whenever something *is* scored, a
line goes into ``test/ledger.jsonl``; a report shows the ledger, since a test split that was
opened for several winners has begun to choose among them.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from lorasweep.baselines.build import build_baseline
from lorasweep.core.corpora import TextSplit
from lorasweep.core.outcomes import Predictions, TrialRecord
from lorasweep.core.plans import EngineSettings
from lorasweep.core.seeding import derive_seed
from lorasweep.data.tokens import encode
from lorasweep.evaluation.metrics import probabilities
from lorasweep.model.checkpoint import load_finetuned, storing, write_through, write_whole
from lorasweep.model.precision import pick_device
from lorasweep.model.scoring import predict_logits
from lorasweep.sweep.events import Listener, Said, Warned
from lorasweep.sweep.prepare import Prepared, file_digest

FINETUNED = "finetuned"
_SAMPLES = 8


class Finalists:
    """Scores the winner and the baselines on the test split, at most once each.

    Args:
        prepared: Data and base.
        study: Id of the study: one that was deleted had trials of the same numbers.
        winner: The best trial by validation.
        listener: Told when the test split is opened.
    """

    def __init__(
        self, prepared: Prepared, study: str, winner: TrialRecord, listener: Listener
    ) -> None:
        self._prepared = prepared
        self._study = study
        self._winner = winner
        self._listener = listener
        self._folder = prepared.paths.test
        self._adapter = prepared.paths.adapter(winner.number)
        # What is deployed computes in float32, so that is what the test measures.
        self._settings = EngineSettings(
            precision="fp32", eval_batch_size=prepared.spec.training.eval_batch_size
        )

    def test_predictions(self) -> dict[str, Predictions]:
        """Predictions by model, ``finetuned`` first; empty without a test split."""
        test = self._prepared.corpus.test
        if test is None:
            return {}
        makers: dict[str, tuple[str, Callable[[], NDArray[np.float64]]]] = {
            FINETUNED: (self._winner_key(), partial(self._by_winner, test.texts))
        }
        for name in self._prepared.spec.baselines:
            key = self._baseline_key(name)
            makers[name] = (key, partial(self._by_baseline, name, test.texts))
        found: dict[str, NDArray[np.float64]] = {}
        missing: list[str] = []
        for model, (key, _) in makers.items():
            stored = self._stored(model, key)
            if stored is None:
                missing.append(model)
            else:
                found[model] = stored
        if missing:
            self._listener(Said(f"Opening the test split for {', '.join(missing)}"))
            fresh = {model: makers[model][1]() for model in missing}
            self._store({model: (makers[model][0], fresh[model]) for model in missing})
            found |= fresh
        labels = np.asarray(test.labels, dtype=np.int64)
        return {
            model: Predictions(model, "test", test.ids, labels, found[model]) for model in makers
        }

    def samples(self) -> tuple[tuple[str, tuple[float, ...], tuple[float, ...]], ...]:
        """A few validation texts with each label's probability before and after training.

        Not of the test split, which nothing looks at besides :meth:`test_predictions`.
        """
        split = self._prepared.corpus.validation
        rng = np.random.default_rng(derive_seed(self._prepared.spec.seed, "samples"))
        chosen = sorted(rng.choice(len(split), size=min(_SAMPLES, len(split)), replace=False))
        texts = [split.texts[row] for row in chosen]
        before, after = self._by_baseline("untrained", texts), self._by_winner(texts)
        return tuple(
            (text, tuple(map(float, b)), tuple(map(float, a)))
            for text, b, a in zip(texts, before, after, strict=True)
        )

    @property
    def openings(self) -> tuple[dict[str, Any], ...]:
        """The ledger: every time that something was scored on the test split.

        Where studies were deleted, ``study`` counts them from 1 instead of naming them by ids,
        which would differ between two runs of one spec; else there is no such key.
        """
        entries = self._entries()
        studies = list(dict.fromkeys(entry["study"] for entry in entries))
        if len(studies) > 1:
            return tuple(e | {"study": studies.index(e["study"]) + 1} for e in entries)
        return tuple({k: v for k, v in entry.items() if k != "study"} for entry in entries)

    def _entries(self) -> list[dict[str, Any]]:
        """The ledger's lines; those of a version that named no study are of the first one named."""
        lines = self._lines()
        first = next((line["study"] for line in lines if "study" in line), self._study)
        return [line | {"study": line.get("study", first)} for line in lines]

    def _lines(self) -> tuple[dict[str, Any], ...]:
        ledger = self._folder / "ledger.jsonl"
        if not ledger.exists():
            return ()
        lines = ledger.read_text(encoding="utf-8").splitlines()
        return tuple(json.loads(line) for line in lines if line.strip())

    def _by_winner(self, texts: Sequence[str]) -> NDArray[np.float64]:
        base = self._prepared.base
        rows = TextSplit(
            "texts", tuple(texts), (0,) * len(texts), tuple(map(str, range(len(texts))))
        )
        logits = predict_logits(
            load_finetuned(base, self._adapter),
            encode(rows, base.tokenizer, base.max_length),
            pad_id=base.pad_id,
            batch_size=self._settings.eval_batch_size,
            device=pick_device(self._settings.device),
            precision="fp32",
        )
        return probabilities(logits)

    def _by_baseline(self, name: str, texts: Sequence[str]) -> NDArray[np.float64]:
        corpus = self._prepared.corpus
        baseline = build_baseline(
            name,
            base=self._prepared.base,
            seed=self._baseline_seed(name),
            settings=self._settings,
        )
        return baseline.predict(corpus.train, texts, len(corpus.label_names))

    def _baseline_seed(self, name: str) -> int:
        # "Untrained" is the winner before its training: the same head, not just any head.
        if name == "untrained":
            return head_seed(self._winner.seed)
        return derive_seed(self._prepared.spec.seed, "baseline", name)

    def _winner_key(self) -> str:
        weights = {
            path.name: file_digest(path) for path in sorted(self._adapter.glob("*.safetensors"))
        }
        return self._key("finetuned", weights)

    def _baseline_key(self, name: str) -> str:
        return self._key(name, self._baseline_seed(name))

    def _key(self, model: str, made_by: Any) -> str:
        prepared = self._prepared
        parts = [model, made_by, dict(prepared.corpus.digests), prepared.base.digest]
        parts += [prepared.base.max_length, list(prepared.corpus.label_names)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _stored(self, model: str, key: str) -> NDArray[np.float64] | None:
        path = self._folder / f"{model}.npz"
        if not path.exists():
            return None
        try:
            with np.load(path) as archive:
                if str(archive["key"]) != key:
                    return None
                return np.asarray(archive["probabilities"], dtype=np.float64)
        except (BadZipFile, ValueError, KeyError, EOFError):  # damaged: as good as none
            return None

    def _store(self, fresh: Mapping[str, tuple[str, NDArray[np.float64]]]) -> None:
        """Store what was scored, and enter it in the ledger.

        The entry comes when only renames are left: a disk that is full before enters nothing,
        since nobody has seen a number. A kill after it has the next command enter another one.

        Raises:
            StorageError: The disk is full or can't be written.
        """
        beside = {model: self._folder / f".{model}.partial.npz" for model in fresh}
        try:
            with storing(self._folder, "the predictions on the test split"):
                self._folder.mkdir(parents=True, exist_ok=True)
                for model, (key, values) in fresh.items():
                    content = io.BytesIO()
                    np.savez(content, key=np.array(key), probabilities=values)
                    write_through(beside[model], content.getvalue())
                self._enter(list(fresh))
                for model, path in beside.items():
                    path.replace(self._folder / f"{model}.npz")
        finally:
            for path in beside.values():
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def _enter(self, models: Sequence[str]) -> None:
        lines, mine = self._lines(), (self._study, self._winner.number)
        earlier = [entry for entry in self._entries() if FINETUNED in entry["models"]]
        study, trial = (earlier[-1]["study"], earlier[-1]["trial"]) if earlier else mine
        reason = "first opening"
        if FINETUNED in models and earlier and (study, trial) == mine:
            # Its weights or the data were changed by hand, or a kill came before they were stored.
            reason = "the same winner again: no stored predictions belong to its weights and data"
            self._listener(Warned("The test split is opened again for the same winner."))
        elif FINETUNED in models and earlier:
            reason = f"the winner changed from trial {trial}"
            if study != self._study:
                reason += " of a study that was deleted"
            self._listener(
                Warned(
                    "The test split is opened again for another winner; "
                    "the report says so, since its p-values now flatter the winner."
                )
            )
        elif lines:
            reason = "a baseline was added"
        entry = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "study": self._study,
            "trial": self._winner.number,
            "models": list(models),
            "reason": reason,
        }
        # Written anew and put in place, so that a full disk leaves no half a line behind.
        text = "".join(json.dumps(line) + "\n" for line in (*lines, entry))
        ledger = self._folder / "ledger.jsonl"
        write_whole(ledger, text.encode(), "the ledger of the test split")


def head_seed(trial_seed: int) -> int:
    """The seed from which engines draw a trial's classifier head."""
    return derive_seed(trial_seed, "head")


def adapter_exists(folder: Path) -> bool:
    """Whether a trial's adapter was kept."""
    return (folder / "adapter_config.json").is_file()

"""The seams: what an engine, a tracker and a baseline must do, whoever implements them.

``tests/contracts/`` holds one suite per seam, fed with each implementation.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from lorasweep.core.corpora import Corpus, TextSplit
from lorasweep.core.outcomes import (
    EpochEvaluation,
    Outcome,
    StepReport,
    TrialFacts,
    TrialState,
    Verdict,
)
from lorasweep.core.plans import NOTHING_BEFORE, ParameterValue, Resumption, TrialPlan

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Reporter(Protocol):
    """What an engine tells of its trials while they run.

    A reporter answers; it never raises to stop a trial, since an engine that trains many
    trials at once cannot let an exception of one unwind the others.
    """

    def started(self, trial: int, facts: TrialFacts) -> None:
        """The trial's model is built and its first step is next."""

    def stepped(self, report: StepReport) -> None:
        """A training loss is known."""

    def shrank(self, lanes: int, why: str) -> None:
        """Memory ran out, or is about to: no more than so many trials are trained at once now."""

    def evaluated(self, evaluation: EpochEvaluation) -> Verdict:
        """An epoch is over. The answer says whether to keep its adapter and whether to go on."""
        ...


class Engine(Protocol):
    """Trains trials on a base and a corpus that it was built with."""

    @property
    def capacity(self) -> int:
        """How many trials it trains at the same time, ≥ 1."""
        ...

    def run(
        self,
        plans: Iterable[TrialPlan],
        reporter: Reporter,
        resumption: Resumption = NOTHING_BEFORE,
    ) -> Generator[Outcome, None, None]:
        """Train every plan and yield each outcome as soon as it is known.

        ``plans`` is lazy on purpose: the engine takes the next plan only when it has a
        place free, *after* the outcome that freed the place was yielded and taken, so
        that whoever suggests the next point already knows how the last one ended. This
        is all that a pack needs to be refilled without a pause.

        A plan that fails becomes an outcome with state FAILED; only errors that concern
        all trials, and KeyboardInterrupt, leave the generator. The adapter of the epoch
        last answered with ``keep`` lies in ``plan.adapter_folder`` when the outcome is
        yielded.

        An engine may leave ``plan.checkpoint`` while a trial runs, and removes it once the
        trial's outcome was taken. Where one lies there that belongs to exactly this plan, the
        trial goes on from it; the reporter is then told all that it would have been told
        from the first step on, in the same order. Closing the generator is a stop: what is
        under way is checkpointed first.

        An engine that trains several trials at once keeps a clock, which stands in its outcomes
        and comes back in ``plan.begins`` and ``resumption``. By it, trials that were cut off
        end in the order in which they would have ended.
        """
        ...


class Tracker(Protocol):
    """Where runs, parameters and metrics are written. Run ids are always explicit."""

    def open_sweep(self, name: str, tags: Mapping[str, str]) -> str:
        """Return the id of the sweep's parent run: the one it already has, else a new one."""
        ...

    def start_trial(
        self,
        parent: str,
        number: int,
        params: Mapping[str, ParameterValue],
        tags: Mapping[str, str],
    ) -> str:
        """Open a nested run named by the trial's number and return its id."""
        ...

    def log_params(self, run_id: str, params: Mapping[str, ParameterValue]) -> None:
        """Write parameters; long values are shortened with a digest, never refused."""

    def log_metrics(
        self, run_id: str, metrics: Mapping[str, float], *, step: int, epoch: int | None = None
    ) -> None:
        """Write metrics at an optimizer step; values that are not finite are kept as they are."""

    def log_text(self, run_id: str, text: str, path: str) -> None:
        """Keep a text as an artifact, such as the traceback of a failed trial."""

    def log_artifacts(self, run_id: str, folder: Path, path: str) -> None:
        """Keep a folder's files as artifacts below ``path``."""

    def log_corpus(self, run_id: str, corpus: Corpus) -> None:
        """Record the splits as dataset inputs, each with its digest."""

    def finish(self, run_id: str, state: TrialState) -> None:
        """Write the run's true final status, once; a status that is final is never overwritten."""


class Baseline(Protocol):
    """A reference to beat: it learns from train at most, and never sees the test labels."""

    @property
    def name(self) -> str: ...

    def predict(self, train: TextSplit, texts: Sequence[str], labels: int) -> NDArray[np.float64]:
        """Return probabilities, ``(texts, labels)``, for texts it has not seen."""
        ...

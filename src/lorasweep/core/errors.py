"""The tree of exceptions, and the one shape in which a problem is told to a person.

::

    LoraSweepError                    exit code 1: the sweep failed
    ├── InputError (ValueError)       exit code 2: what the user gave can't be used
    │   ├── SpecError                 the YAML file or a --set
    │   ├── DataError                 files, columns, labels, splits
    │   ├── ModelError                the base model or the LoRA targets
    │   ├── TrackingError             the MLflow store
    │   ├── StorageError              disk, folders, the study's database
    │   └── ConflictError             a sweep of this name exists and differs, or is running
    ├── TrialError                    one trial failed; the sweep goes on
    │   └── DivergedError             its loss stopped being a number
    └── NothingToReportError          no trial finished

To add one: give it the parent whose exit code it shares, raise it with
:class:`Problem` values (never a bare string for bad input), and keep it picklable:
workers send exceptions across processes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong: where, what was expected and what came, what to do.

    Attributes:
        where: A place a person can go to, such as ``sweeps/x.yaml:12 search.space.rank``.
        what: What was expected and what came, without a full stop at the end.
        advice: What to do about it, as a whole sentence; empty when ``what`` says it all.
    """

    where: str
    what: str
    advice: str = ""

    def __str__(self) -> str:
        sentence = f"{self.where}: {self.what}" if self.where else self.what
        if not sentence.endswith((".", "?", "!")):
            sentence += "."
        return f"{sentence} {self.advice}".rstrip()


class LoraSweepError(Exception):
    """Root of everything that lorasweep raises on purpose."""

    exit_code = 1


class InputError(LoraSweepError, ValueError):
    """What the user gave can't be used; carries every problem found, not just the first.

    Args:
        problems: One problem, or as many as were found.
    """

    exit_code = 2

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        found = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(found)
        self.problems: tuple[Problem, ...] = found

    def __str__(self) -> str:
        return "\n".join(str(problem) for problem in self.problems)


class SpecError(InputError):
    """The spec file, or a ``--set``, is not a spec."""


class DataError(InputError):
    """A file, column, label or split can't be used."""


class ModelError(InputError):
    """The base model, or where LoRA should attach to it, can't be used."""


class TrackingError(InputError):
    """The MLflow store doesn't answer or refuses."""


class StorageError(InputError):
    """A folder or database can't be written or read."""


class ConflictError(InputError):
    """A sweep of this name exists with another spec or other data, or is being run elsewhere."""


class TrialError(LoraSweepError):
    """One trial failed for the reason given; the others are not concerned."""


class DivergedError(TrialError):
    """The loss or the logits of a trial stopped being finite numbers."""


class NothingToReportError(LoraSweepError):
    """No trial of the sweep has finished, so there is nothing to report or export."""

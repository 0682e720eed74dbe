"""When a trial is given up, judged on the share of its budget.

Trials differ in epochs, so neither steps nor epochs compare. An evaluation counts at a
*rung*: the largest of a few shares of the budget that it has reached, and only the first
evaluation that reaches a rung counts there. The value is the trial's best score so far.
The end of the budget is no rung: a finished trial, whose learning rate has been annealed
to zero, would beat every trial that is half-way, and nothing is left to save. So a trial
of one epoch is never compared with anything.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import optuna
from optuna.trial import FrozenTrial

from lorasweep.core.seeding import derive_seed
from lorasweep.spec.schema import PrunerSpec

# A share such as 1/3 of the steps may fall a step short of its rung by rounding.
_ROUNDING = 0.005
_LOWEST_RUNG = 10


def rungs(spec: PrunerSpec) -> tuple[int, ...]:
    """The shares of the budget at which trials are compared, in percent, ascending.

    Quarters for median and percentile. For the halving kinds ``100 / factor ** k``, the
    rungs of successive halving with a maximum resource of 100 (Li et al. 2020,
    arXiv:1810.05934), down to a tenth: less says little about a fine-tuning run.
    """
    if spec.kind == "none":
        return ()
    if spec.kind in ("median", "percentile"):
        return (25, 50, 75)
    factor = spec.reduction_factor
    found = [100 // factor]
    while found[-1] // factor >= _LOWEST_RUNG:
        found.append(found[-1] // factor)
    return tuple(sorted(max(rung, 1) for rung in found))


def rung_reached(spec: PrunerSpec, share: float, reported: Collection[int]) -> int | None:
    """The rung at which an evaluation counts; None when it counts at none.

    Args:
        spec: The pruner.
        share: Of the budget spent, in ``(0, 1]``.
        reported: Rungs at which the trial has been counted already.

    >>> rung_reached(PrunerSpec(kind="median"), 2 / 3, {25})
    50
    >>> rung_reached(PrunerSpec(kind="median"), 1.0, set()) is None
    True
    """
    if share >= 1.0:
        return None
    reached = [rung for rung in rungs(spec) if rung <= 100 * (share + _ROUNDING)]
    highest = max(reached, default=None)
    return None if highest is None or highest in reported else highest


def build_pruner(spec: PrunerSpec, seed: int) -> optuna.pruners.BasePruner:
    """Return the pruner that the spec names, for values reported at :func:`rungs`.

    Args:
        spec: The pruner.
        seed: The sweep's; it deals trials to Hyperband's brackets.
    """
    if spec.kind == "median":
        return optuna.pruners.MedianPruner(n_startup_trials=spec.startup_trials)
    if spec.kind == "percentile":
        return optuna.pruners.PercentilePruner(
            spec.percentile, n_startup_trials=spec.startup_trials
        )
    if spec.kind == "successive_halving":
        return RungHalving(rungs(spec), spec.reduction_factor)
    if spec.kind == "hyperband":
        return BracketHalving(rungs(spec), spec.reduction_factor, seed)
    return optuna.pruners.NopPruner()


class RungHalving(optuna.pruners.BasePruner):
    """Asynchronous successive halving: of the trials that reached a rung, the best 1/factor go on.

    Li et al. 2020, arXiv:1810.05934, without pausing trials: until ``factor`` trials have
    reached the rung, only the best of them goes on. Running trials are compared too, so it
    works when many train in lock-step.

    Optuna's own ``SuccessiveHalvingPruner`` assumes that all trials report at the same
    steps: a trial whose first report comes at 50 % it also enters, with that same value,
    into the contest at 25 %, where shorter-trained trials would lose to it.

    Args:
        rungs: Shares of the budget in percent at which values are reported.
        factor: One in so many goes on.
    """

    def __init__(self, rungs: tuple[int, ...], factor: int) -> None:
        self._rungs = rungs
        self._factor = factor

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial is not among the best at the rung that it reported last."""
        return self._loses(trial, study.get_trials(deepcopy=False))

    def _loses(self, trial: FrozenTrial, rivals: Collection[FrozenTrial]) -> bool:
        rung = trial.last_step
        if rung is None or rung not in self._rungs:
            return False
        value = trial.intermediate_values[rung]
        if math.isnan(value):
            return True
        others = [
            rival.intermediate_values[rung]
            for rival in rivals
            if rung in rival.intermediate_values and rival.number != trial.number
        ]
        ahead = sum(other > value for other in others)
        return ahead >= max(1, (len(others) + 1) // self._factor)


class BracketHalving(RungHalving):
    """Hyperband: successive halving in brackets that begin to prune at different rungs.

    Li et al. 2018, arXiv:1603.06560. A bracket that starts later gives slow starters
    their chance; the last one prunes nothing. Each trial belongs to one bracket and is
    compared within it. Earlier brackets get more trials, in the paper's proportions.

    Optuna's own deals brackets by trial number, which shifts when a sweep is killed and
    resumed; here they go by the place that the trial fills in the sweep.

    Args:
        rungs: Shares of the budget in percent at which values are reported.
        factor: One in so many goes on.
        seed: Of the deal.
    """

    def __init__(self, rungs: tuple[int, ...], factor: int, seed: int) -> None:
        super().__init__(rungs, factor)
        self._seed = seed
        brackets = len(rungs) + 1
        self._weights = [
            math.ceil(brackets * factor**late / (late + 1)) for late in reversed(range(brackets))
        ]

    def bracket(self, slot: int) -> int:
        """The bracket of the trial that fills a place; bracket b prunes from rung b on."""
        draw = derive_seed(self._seed, "bracket", slot) % sum(self._weights)
        for bracket, weight in enumerate(self._weights):
            draw -= weight
            if draw < 0:
                return bracket
        raise AssertionError("the weights don't add up")  # pragma: no cover

    def prune(self, study: optuna.Study, trial: FrozenTrial) -> bool:
        """Whether the trial is not among the best of its bracket at its last rung."""
        bracket = self.bracket(trial.user_attrs["slot"])
        if trial.last_step not in self._rungs[bracket:]:
            return False
        rivals = [
            rival
            for rival in study.get_trials(deepcopy=False)
            if self.bracket(rival.user_attrs["slot"]) == bracket
        ]
        return self._loses(trial, rivals)

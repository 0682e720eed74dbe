"""The samplers by the spec's names, each made anew for every point.

A sampler's random stream is not stored anywhere. Made anew with a seed that depends on
the sweep's seed and on how many trials count, it gives the same point to a sweep that was
just started again as to one that never stopped.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from typing import Any

import optuna

from lorasweep.core.errors import Problem
from lorasweep.core.seeding import derive_seed
from lorasweep.search import points
from lorasweep.spec.schema import SearchSpec
from lorasweep.spec.space import FloatRange, TimesRank

# Without the greenlet package the Gaussian process optimises its candidates one after another,
# and Optuna warns of that in every process. A point takes well under a second all the same.
logging.getLogger("optuna._gp.batched_lbfgsb").addFilter(
    lambda record: "greenlet" not in record.getMessage()
)

# Optuna's grid keeps every point in memory, shuffled.
_LARGEST_GRID = 100_000


def needs_numbers(spec: SearchSpec) -> bool:
    """Whether the sampler can only model numbers and leaves categoricals to chance."""
    return spec.sampler.kind == "cmaes"


def build_sampler(
    spec: SearchSpec, seed: int, counted: int, grid: Mapping[str, list[Any]]
) -> optuna.samplers.BaseSampler:
    """Return a fresh sampler for the next point.

    Args:
        spec: The search.
        seed: The sweep's seed.
        counted: Trials that count so far.
        grid: Every value of each dimension that can be counted; read by ``grid`` alone.
    """
    kind, startup = spec.sampler.kind, spec.sampler.startup_trials
    # A grid's order and a low-discrepancy sequence are one thing for the whole sweep: their
    # seed must not change from point to point. Their place in it is the trial's number.
    root = derive_seed(seed, "sampler", kind)
    each = derive_seed(seed, "sampler", kind, counted)
    if kind == "grid":
        return optuna.samplers.GridSampler(grid, seed=root)
    if kind == "qmc":
        with warnings.catch_warnings():
            # Its interface may change, and this is the one place that would notice.
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return optuna.samplers.QMCSampler(
                qmc_type="sobol", scramble=True, seed=root, warn_independent_sampling=False
            )
    if kind == "tpe":
        # Both are defaults of Optuna 5 and would change the search if they ceased to be.
        return optuna.samplers.TPESampler(
            seed=each, n_startup_trials=startup, multivariate=True, constant_liar=True
        )
    if kind == "gp":
        return optuna.samplers.GPSampler(
            seed=each, n_startup_trials=startup, warn_independent_sampling=False
        )
    if kind == "cmaes":
        # Categoricals are drawn at random and that is known: no warning at every trial.
        return optuna.samplers.CmaEsSampler(
            seed=each, n_startup_trials=startup, warn_independent_sampling=False
        )
    return optuna.samplers.RandomSampler(seed=each)


def check(spec: SearchSpec, rank: int | None = None) -> list[Problem]:
    """What in the search can't be carried out, found before anything is trained.

    Args:
        spec: The search.
        rank: The rank of trials whose space has none.
    """
    problems = []
    dimensions, sampler = spec.space.dimensions, spec.sampler
    if isinstance(spec.space.alpha, TimesRank) and spec.space.rank is None and rank is None:
        what = "times_rank needs a rank to multiply, and neither the space nor lora gives one"
        problems.append(Problem("search.space.alpha", what))
    if sampler.kind == "grid":
        endless = [
            key
            for key, value in dimensions.items()
            if isinstance(value, FloatRange) and value.step is None
        ]
        if endless:
            what = f"a grid has no end in {', '.join(endless)}"
            advice = "Give choices, or a range with a step."
            problems.append(Problem("search.space", what, advice))
        elif (total := points.size(dimensions) or 0) > _LARGEST_GRID:
            what = f"a grid of {total:,} points is more than the {_LARGEST_GRID:,} that fit"
            problems.append(Problem("search.space", what, "Widen the steps, or use qmc."))
    seen: dict[str, int] = {}
    for place, point in enumerate(sampler.points or (), start=1):
        first = seen.setdefault(points.canonical(point), place)
        if first != place:
            what = f"point {place} is the same as point {first}"
            advice = "Remove one: a point is trained once. Noise between seeds needs other seeds."
            problems.append(Problem("search.sampler.points", what, advice))
    return problems

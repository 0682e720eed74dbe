"""From what is known to the next point: Optuna's samplers, asked about a study in memory.

The stored study also holds interrupted trials, and its numbers depend on when a sweep was
killed. Samplers look at both. They are therefore asked about a *view*: the trials that
count, numbered by the place in the sweep that they fill. A sweep that was killed ten times
shows them the same view as one that ran through, so it is told the same points.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, create_trial

from lorasweep.core.seeding import derive_seed
from lorasweep.search import points
from lorasweep.search.samplers import build_sampler, needs_numbers
from lorasweep.spec.schema import SearchSpec
from lorasweep.spec.space import Choices, Dimension, FloatRange, IntRange, TimesRank

# What a sampler notes on a trial and needs again: CMA-ES keeps its whole state there.
_SAMPLER_NOTES = ("cma:",)


@dataclass(frozen=True, slots=True)
class Suggestion:
    """A point that no trial has tried.

    Attributes:
        raw: Values by key, with alpha's factor where alpha is a multiple of the rank.
        notes: What the sampler wants to find on the trial later.
    """

    raw: Mapping[str, Any]
    notes: Mapping[str, Any] = field(default_factory=dict)


def resolve(spec: SearchSpec, raw: Mapping[str, Any], rank: int | None) -> dict[str, Any]:
    """Turn alpha's factor into alpha.

    Args:
        spec: The search.
        raw: Values by key.
        rank: The rank of every trial, where the space has none.
    """
    resolved = dict(raw)
    if isinstance(spec.space.alpha, TimesRank):
        resolved["alpha"] = raw["alpha"] * raw.get("rank", rank)
    return resolved


def plain_distributions(spec: SearchSpec) -> dict[str, BaseDistribution]:
    """The space in Optuna's words, as other tools that open the database see it."""
    return {key: _distribution(value) for key, value in spec.space.dimensions.items()}


def plain_values(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A point's values in the words of :func:`plain_distributions`: lists become their JSON."""
    return {
        key: json.dumps(value) if isinstance(value, tuple) else value for key, value in raw.items()
    }


def as_view(
    trials: Iterable[tuple[FrozenTrial, Mapping[str, Any]]], spec: SearchSpec, name: str
) -> optuna.Study:
    """Copy trials into a study in memory.

    Args:
        trials: The trials in the order of the places that they fill, each with its raw point.
        spec: The search.
        name: The study's name.
    """
    view = optuna.create_study(
        study_name=name,
        direction="maximize",
        storage=optuna.storages.InMemoryStorage(),
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=optuna.pruners.NopPruner(),
    )
    codec = _Codec(spec)
    for trial, raw in trials:
        view.add_trial(
            create_trial(
                state=trial.state,
                value=trial.value,
                params=codec.encode(raw),
                distributions=codec.distributions,
                user_attrs={"slot": trial.user_attrs.get("slot", trial.number)},
                system_attrs={
                    key: value
                    for key, value in trial.system_attrs.items()
                    if key.startswith(_SAMPLER_NOTES)
                },
                intermediate_values=trial.intermediate_values,
            )
        )
    return view


def suggest(
    spec: SearchSpec,
    seed: int,
    trials: Iterable[tuple[FrozenTrial, Mapping[str, Any]]],
) -> Suggestion | None:
    """Return the next point, or None when the space is used up.

    Args:
        spec: The search.
        seed: The sweep's seed.
        trials: The trials that count, in order of their places, each with its raw point.
    """
    known = list(trials)
    if spec.sampler.kind == "points":
        listed = spec.sampler.points or ()
        return Suggestion(dict(listed[len(known)])) if len(known) < len(listed) else None
    tried = {points.canonical(raw) for _, raw in known}
    proposed = _ask(spec, seed, known)
    if points.canonical(proposed.raw) not in tried:
        return proposed
    # The sampler repeats itself; a point of the same space that is new tells more.
    draw = derive_seed(seed, "untried", spec.sampler.kind, len(known))
    fresh = points.untried(spec.space.dimensions, tried, draw)
    return None if fresh is None else Suggestion(fresh)


def _ask(
    spec: SearchSpec, seed: int, known: list[tuple[FrozenTrial, Mapping[str, Any]]]
) -> Suggestion:
    codec = _Codec(spec)
    if spec.sampler.kind == "qmc":
        # The sequence is one for the whole sweep, and its next place is the number of trials
        # that count. Optuna keeps that place in the study, where it would also count asks
        # that came to nothing; so the sequence is walked from its start, behind one finished
        # trial that tells the sampler the space.
        view = as_view((), spec, "qmc")
        first = {key: _first(value) for key, value in spec.space.dimensions.items()}
        view.add_trial(
            create_trial(params=codec.encode(first), distributions=codec.distributions, value=0.0)
        )
        asks = len(known) + 1
    else:
        view, asks = as_view(known, spec, spec.sampler.kind), 1
    view.sampler = build_sampler(spec, seed, len(known), codec.grid)
    for _ in range(asks):
        view.ask(fixed_distributions=codec.distributions)
    trial = view.get_trials(deepcopy=False)[-1]
    notes = {
        key: value for key, value in trial.system_attrs.items() if key.startswith(_SAMPLER_NOTES)
    }
    return Suggestion(codec.decode(trial.params), notes)


class _Codec:
    """The space as a sampler sees it, and the way back.

    CMA-ES knows numbers only. For it, choices that are numbers become their place in
    ascending order, which keeps the order that a categorical would lose.
    """

    def __init__(self, spec: SearchSpec) -> None:
        self._dimensions = spec.space.dimensions
        self._ranked: dict[str, list[Any]] = {}
        self.distributions: dict[str, BaseDistribution] = {}
        for key, dimension in self._dimensions.items():
            values = _numbers(dimension) if needs_numbers(spec) else []
            if len(values) > 1:
                self._ranked[key] = values
                self.distributions[key] = IntDistribution(0, len(values) - 1)
            else:
                self.distributions[key] = _distribution(dimension)

    @property
    def grid(self) -> dict[str, list[Any]]:
        """Every value of every dimension that can be counted, as the sampler sees them."""
        grid = {}
        for key, dimension in self._dimensions.items():
            values = [points.value_at(dimension, at) for at in range(points.count(dimension) or 0)]
            grid[key] = [plain_values({key: value})[key] for value in values]
        return grid

    def encode(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        return {
            key: self._ranked[key].index(value)
            if key in self._ranked
            else plain_values({key: value})[key]
            for key, value in raw.items()
            if key in self.distributions
        }

    def decode(self, params: Mapping[str, Any]) -> dict[str, Any]:
        return {key: self._value(key, params[key]) for key in self._dimensions}

    def _value(self, key: str, param: Any) -> Any:
        dimension = self._dimensions[key]
        if key in self._ranked:
            return self._ranked[key][param]
        if isinstance(dimension, FloatRange):
            return points.snap(dimension, param)
        if isinstance(dimension, Choices):
            return next(
                value for value in dimension.choices if plain_values({key: value})[key] == param
            )
        return param


def _numbers(dimension: Dimension) -> list[Any]:
    """The values in ascending order, when all of them are numbers to choose from."""
    values: tuple[Any, ...] = ()
    if isinstance(dimension, Choices):
        values = dimension.choices
    elif isinstance(dimension, TimesRank):
        values = dimension.times_rank
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in values)
    return sorted(values) if numbers else []


def _distribution(dimension: Dimension) -> BaseDistribution:
    if isinstance(dimension, FloatRange):
        high = points.top(dimension)
        return FloatDistribution(dimension.low, high, log=dimension.log, step=dimension.step)
    if isinstance(dimension, IntRange):
        high = int(points.top(dimension))
        return IntDistribution(dimension.low, high, log=dimension.log, step=dimension.step)
    if isinstance(dimension, Choices):
        choices = [json.dumps(v) if isinstance(v, tuple) else v for v in dimension.choices]
        return CategoricalDistribution(choices)
    return CategoricalDistribution(dimension.times_rank)


def _first(dimension: Dimension) -> Any:
    if isinstance(dimension, FloatRange):
        return dimension.low
    return points.value_at(dimension, 0)

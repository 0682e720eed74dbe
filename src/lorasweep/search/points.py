"""Points of the space as plain values: their canonical text, how many there are, untried ones."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Collection, Mapping
from decimal import Decimal
from typing import Any

from lorasweep.spec.space import Choices, Dimension, FloatRange, IntRange, TimesRank

Point = Mapping[str, Any]

# Up to this size the untried points are listed and one is drawn; above it, points are drawn
# until one is untried, which takes few draws since a sweep tries far fewer.
_LISTED = 20_000
_DRAWS = 10_000


def canonical(point: Point) -> str:
    """The point as JSON, the same for equal points whatever the order of their keys.

    >>> canonical({"rank": 8, "epochs": 2})
    '{"epochs": 2, "rank": 8}'
    """
    return json.dumps(dict(point), sort_keys=True)


def revive(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Undo what JSON did to a point: its lists were tuples."""
    return {
        key: tuple(value) if isinstance(value, list) else value for key, value in stored.items()
    }


def snap(dimension: FloatRange, value: float) -> float:
    """The value on the dimension's grid, without the noise of adding floats; as it is without one.

    >>> snap(FloatRange(low=0.1, high=0.4, step=0.1), 0.1 + 0.1 + 0.1)
    0.3
    """
    if dimension.step is None:
        return value
    at = round((value - dimension.low) / dimension.step)
    return float(Decimal(repr(dimension.low)) + at * Decimal(repr(dimension.step)))


def top(dimension: FloatRange | IntRange) -> float:
    """The highest value that is reached: a step may not end at ``high``.

    >>> top(IntRange(low=1, high=8, step=3))
    7.0
    """
    if dimension.step is None:
        return dimension.high
    low, high, step = (Decimal(repr(n)) for n in (dimension.low, dimension.high, dimension.step))
    return float(low + (high - low) // step * step)


def count(dimension: Dimension) -> int | None:
    """How many values the dimension has; None when there is no end of them."""
    if isinstance(dimension, Choices):
        return len(dimension.choices)
    if isinstance(dimension, TimesRank):
        return len(dimension.times_rank)
    if dimension.step is None:
        return None
    low, step = Decimal(repr(dimension.low)), Decimal(repr(dimension.step))
    return int((Decimal(repr(top(dimension))) - low) / step) + 1


def value_at(dimension: Dimension, place: int) -> Any:
    """The value at ``place`` of a countable dimension; the factor for alpha's multiple."""
    if isinstance(dimension, Choices):
        return dimension.choices[place]
    if isinstance(dimension, TimesRank):
        return dimension.times_rank[place]
    if isinstance(dimension, IntRange):
        return dimension.low + place * dimension.step
    return snap(dimension, dimension.low + place * (dimension.step or 0.0))


def size(dimensions: Mapping[str, Dimension]) -> int | None:
    """How many points there are; None when there is no end of them."""
    counts = [count(dimension) for dimension in dimensions.values()]
    known = [number for number in counts if number is not None]
    return math.prod(known) if len(known) == len(counts) else None


def untried(
    dimensions: Mapping[str, Dimension], tried: Collection[str], seed: int
) -> dict[str, Any] | None:
    """Draw a point that was not tried yet; None when there is none left.

    Args:
        dimensions: The space.
        tried: :func:`canonical` of the points that were tried, unresolved (with alpha's
            factor in alpha's place).
        seed: Of the draw.
    """
    dice = random.Random(seed)
    total = size(dimensions)
    if total is not None and total <= _LISTED:
        left = [at for at in range(total) if canonical(_point_at(dimensions, at)) not in tried]
        return _point_at(dimensions, dice.choice(left)) if left else None
    for _ in range(_DRAWS):
        point = {key: _draw(dimension, dice) for key, dimension in dimensions.items()}
        if canonical(point) not in tried:
            return point
    return None


def _point_at(dimensions: Mapping[str, Dimension], place: int) -> dict[str, Any]:
    """The point at ``place`` of a countable space, the last dimension changing fastest."""
    point: dict[str, Any] = {}
    for key, dimension in reversed(list(dimensions.items())):
        place, digit = divmod(place, count(dimension) or 1)
        point[key] = value_at(dimension, digit)
    return point


def _draw(dimension: Dimension, dice: random.Random) -> Any:
    values = count(dimension)
    if values is not None and not (isinstance(dimension, IntRange) and dimension.log):
        return value_at(dimension, dice.randrange(values))
    if isinstance(dimension, FloatRange):
        if dimension.log:
            return math.exp(dice.uniform(math.log(dimension.low), math.log(dimension.high)))
        return dice.uniform(dimension.low, dimension.high)
    if isinstance(dimension, IntRange):
        # Each whole number stands for the half below and the half above it.
        edge = dice.uniform(math.log(dimension.low - 0.5), math.log(dimension.high + 0.5))
        return min(max(round(math.exp(edge)), dimension.low), dimension.high)
    raise TypeError(f"no values to draw from in {dimension!r}")  # pragma: no cover

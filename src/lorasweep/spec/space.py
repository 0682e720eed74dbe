"""The search space: one small model per kind of range, and the table of what may be searched."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorasweep.core.plans import Scheduler

Scalar = bool | int | float | str | None


def _tuples(value: Any) -> Any:
    """Turn YAML's lists into tuples, at any depth: a frozen spec holds nothing that can change."""
    if isinstance(value, list | tuple):
        return tuple(_tuples(item) for item in value)
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return value


class Frozen(BaseModel):
    """Base of all spec models: frozen, unknown keys refused, "3" is not 3."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _freeze_lists(cls, value: Any) -> Any:
        return _tuples(value)


class FloatRange(Frozen):
    """A real number between ``low`` and ``high``, both included.

    Attributes:
        low, high: The bounds, ``low < high``.
        log: Sample the logarithm evenly; needs ``low > 0``.
        step: Distance between values; None for any value. Excludes ``log``.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> FloatRange:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got low {self.low:g} and high {self.high:g}")
        if self.log and self.low <= 0:
            raise ValueError(f"a logarithmic range must start above 0, got low {self.low:g}")
        if self.log and self.step is not None:
            raise ValueError("log and step exclude each other")
        return self


class IntRange(Frozen):
    """A whole number between ``low`` and ``high``, both included.

    Attributes:
        low, high: The bounds, ``low < high``.
        log: Sample the logarithm evenly; needs ``low ≥ 1``.
        step: Distance between values. Other than 1, it excludes ``log``.
    """

    low: int
    high: int
    log: bool = False
    step: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _ordered(self) -> IntRange:
        if not self.low < self.high:
            raise ValueError(f"low must be below high, got low {self.low} and high {self.high}")
        if self.log and self.low < 1:
            raise ValueError(f"a logarithmic range must start at 1 or above, got low {self.low}")
        if self.log and self.step != 1:
            raise ValueError("log and step exclude each other")
        return self


class Choices(Frozen):
    """One of the values listed.

    Attributes:
        choices: One or more distinct values; a list (of target names) counts as one value.
    """

    choices: tuple[Scalar | tuple[str, ...], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> Choices:
        if len(set(map(repr, self.choices))) != len(self.choices):
            raise ValueError("the same value is listed twice")
        return self


class TimesRank(Frozen):
    """Alpha as a multiple of the sampled rank, so that the scaling ``alpha / rank`` is searched.

    Attributes:
        times_rank: One or more distinct factors above 0.
    """

    times_rank: tuple[Annotated[float, Field(gt=0)], ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _distinct(self) -> TimesRank:
        if len(set(self.times_rank)) != len(self.times_rank):
            raise ValueError("the same factor is listed twice")
        return self


def _shape(value: Any) -> str:
    """Tell which kind of range a YAML value means, by its keys."""
    if isinstance(value, BaseModel):
        keys = set(type(value).model_fields)
    else:  # neither: a bare value, which any branch refuses in the same words
        keys = set(value) if isinstance(value, Mapping) else set()
    if "choices" in keys:
        return "choices"
    return "times_rank" if "times_rank" in keys else "range"


FloatDimension = Annotated[
    Annotated[FloatRange, Tag("range")] | Annotated[Choices, Tag("choices")], Discriminator(_shape)
]
IntDimension = Annotated[
    Annotated[IntRange, Tag("range")] | Annotated[Choices, Tag("choices")], Discriminator(_shape)
]
AlphaDimension = Annotated[
    Annotated[FloatRange, Tag("range")]
    | Annotated[Choices, Tag("choices")]
    | Annotated[TimesRank, Tag("times_rank")],
    Discriminator(_shape),
]
Dimension = FloatRange | IntRange | Choices | TimesRank

# What may be searched: key -> (kind, lowest value, is the lowest allowed, highest, is it allowed).
# Points, choices and ranges are all held to the same limits.
Kind = Literal["float", "int", "targets", "layers", "scheduler"]
LIMITS: Mapping[str, tuple[Kind, float, bool, float, bool]] = {
    "learning_rate": ("float", 0.0, False, 1.0, True),
    "epochs": ("int", 1, True, 10_000, True),
    "rank": ("int", 1, True, 4096, True),
    "alpha": ("float", 0.0, False, 1e6, True),
    "batch_size": ("int", 1, True, 65_536, True),
    "dropout": ("float", 0.0, True, 1.0, False),
    "weight_decay": ("float", 0.0, True, 1e3, True),
    "warmup": ("float", 0.0, True, 1.0, False),
    "scheduler": ("scheduler", 0, True, 0, True),
    "targets": ("targets", 0, True, 0, True),
    "top_layers": ("layers", 1, True, 10_000, True),
    "seed": ("int", 0, True, 2**31 - 1, True),
}


def check_value(key: str, value: Any) -> str:
    """Say what is wrong with one value of one searchable key, or return an empty string."""
    if key not in LIMITS:
        return f"unknown parameter; known are {', '.join(LIMITS)}"
    kind, low, low_allowed, high, high_allowed = LIMITS[key]
    if kind == "targets":
        listed = isinstance(value, tuple) and all(isinstance(name, str) for name in value)
        good = value in ("auto", "all-linear") or (listed and value)
        return "" if good else f"must be auto, all-linear or a list of module names, got {value!r}"
    if kind == "scheduler":
        known = get_args(Scheduler)
        return "" if value in known else f"must be one of {', '.join(known)}, got {value!r}"
    if kind == "layers" and value is None:
        return ""
    whole = kind in ("int", "layers")
    number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    inside = number and (
        (value > low or (low_allowed and value == low))
        and (value < high or (high_allowed and value == high))
    )
    if inside:
        return ""
    word = "a whole number" if whole else "a number"
    lower = f"{'≥' if low_allowed else '>'} {low:g}"
    # A high limit is said to whom it concerns; below 1 it belongs to what the value means.
    too_high = number and value >= high
    upper = f" and {'≤' if high_allowed else '<'} {high:.10g}" if high <= 1 or too_high else ""
    return f"must be {word} {lower}{upper}, got {value!r}"


class BeyondLimitsError(ValueError):
    """A dimension holds values that its key doesn't take; pydantic hands it on.

    Attributes:
        advice: What to do about it; empty when the message says it all.
    """

    def __init__(self, what: str, advice: str = "") -> None:
        super().__init__(what)
        self.advice = advice


def _advice(key: str, values: tuple[Any, ...]) -> str:
    """Say what to do about an alpha above its limit: its quotient by the rank may be meant."""
    highest = LIMITS[key][3]
    numbers = [value for value in values if isinstance(value, int | float)]
    if key != "alpha" or not any(number > highest for number in numbers):
        return ""
    return "Lower it, or search the scaling alpha / rank with {times_rank: [1, 2]} instead."


class Space(Frozen):
    """What is searched; a key left out keeps its fixed value from ``training`` or ``lora``.

    ``seed`` has none: it only goes into the trial's seed, so that a point can be repeated.
    """

    learning_rate: FloatDimension | None = None
    epochs: IntDimension | None = None
    rank: IntDimension | None = None
    alpha: AlphaDimension | None = None
    batch_size: IntDimension | None = None
    dropout: FloatDimension | None = None
    weight_decay: FloatDimension | None = None
    warmup: FloatDimension | None = None
    scheduler: Choices | None = None
    targets: Choices | None = None
    top_layers: IntDimension | None = None
    seed: IntDimension | None = None

    @field_validator("*")
    @classmethod
    def _within_limits(cls, dimension: Dimension | None, info: ValidationInfo) -> Any:
        values: tuple[Any, ...] = ()
        if isinstance(dimension, Choices):
            values = dimension.choices
        elif isinstance(dimension, FloatRange | IntRange):
            values = (dimension.low, dimension.high)
        problems = [check_value(str(info.field_name), value) for value in values]
        if any(problems):
            key = str(info.field_name)
            raise BeyondLimitsError("; ".join(filter(None, problems)), _advice(key, values))
        return dimension

    @property
    def dimensions(self) -> dict[str, Dimension]:
        """The searched keys, in the schema's order."""
        found = {key: getattr(self, key) for key in type(self).model_fields}
        return {key: dimension for key, dimension in found.items() if dimension is not None}

"""The spec as typed, frozen models. Every default of lorasweep is stated here and nowhere else."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from lorasweep.core.plans import Precision, Scheduler
from lorasweep.spec.space import FloatRange, Frozen, Scalar, Space, check_value

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")


class ModelSpec(Frozen):
    """The frozen base.

    Attributes:
        name: A Hub id, a local folder, or ``embedded/minilm``.
        revision: Hub commit, tag or branch; None for the default branch.
        max_length: Tokens a text may have; the rest of a longer one is cut off.
        base_dropout: Dropout inside the base while training; None keeps what the model's
            own configuration says, 0 switches it off. The same for every engine, but that a pack
            rounds it to a whole 1/256, and up to 1/256 where it is less but not 0.
    """

    name: str = "embedded/minilm"
    revision: str | None = None
    max_length: int = Field(default=128, ge=8, le=8192)
    base_dropout: float | None = Field(default=None, ge=0, lt=1)


class FilesSource(Frozen):
    """CSV, TSV, JSONL or Parquet files, told apart by their ending."""

    kind: Literal["files"]
    train: str
    validation: str | None = None
    test: str | None = None


class HubSource(Frozen):
    """A data set on the Hub, or a local folder of the same layout."""

    kind: Literal["hub"]
    path: str
    config: str | None = None
    revision: str | None = None
    train: str = "train"
    validation: str | None = None
    test: str | None = None


class EmbeddedSource(Frozen):
    """The generated review corpus that needs no download.

    Attributes:
        name: ``reviews``.
        size: Sentences in all; a quarter of them is the test split.
    """

    kind: Literal["embedded"]
    name: Literal["reviews"] = "reviews"
    size: int = Field(default=4000, ge=200, le=100_000)


Source = Annotated[FilesSource | HubSource | EmbeddedSource, Field(discriminator="kind")]


class CleanSpec(Frozen):
    """What happens to texts before anything else; all of it is counted and reported.

    Attributes:
        collapse_whitespace: Runs of white space become one space, the ends are stripped.
        min_words: Texts with fewer words are dropped from train and validation, never
            from test; empty texts can't be classified and are dropped everywhere.
        drop_unlabelled: Rows without a label are dropped; otherwise they are an error.
        drop_duplicates: Keep the first of texts that are the same after normalisation,
            in train and validation.
    """

    collapse_whitespace: bool = True
    min_words: int = Field(default=1, ge=1)
    drop_unlabelled: bool = False
    drop_duplicates: bool = False


class SplitSpec(Frozen):
    """How rows are held out where the source names no split of its own.

    Attributes:
        validation: Share of the training rows.
        test: Share of the training rows held out for the report; None when the source
            has a test split (or there shall be none).
        strategy: ``grouped`` keeps texts that contain one another on one side.
    """

    validation: float = Field(default=0.15, gt=0, lt=0.9)
    test: float | None = Field(default=None, gt=0, lt=0.9)
    strategy: Literal["random", "stratified", "grouped"] = "grouped"


class LimitSpec(Frozen):
    """A seeded, stratified subset of each split; None for all rows."""

    train: int | None = Field(default=None, ge=2)
    validation: int | None = Field(default=None, ge=2)
    test: int | None = Field(default=None, ge=2)


class DataSpec(Frozen):
    """Where texts and labels come from and how they are prepared.

    Attributes:
        source: The files, data set or generated corpus.
        text, label: Column names.
        labels: Display names in order of the label's value; None takes the values
            themselves (or the names that the source carries), sorted.
    """

    source: Source
    text: str = "text"
    label: str = "label"
    labels: tuple[str, ...] | None = Field(default=None, min_length=2)
    clean: CleanSpec = CleanSpec()
    split: SplitSpec = SplitSpec()
    limit: LimitSpec = LimitSpec()

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is not None and len(set(labels)) != len(labels):
            raise ValueError("each label needs a name of its own")
        return labels


def _target_shape(value: Any) -> str:
    return "word" if isinstance(value, str) else "names"


Targets = Annotated[
    Annotated[Literal["auto", "all-linear"], Tag("word")]
    | Annotated[tuple[str, ...], Field(min_length=1), Tag("names")],
    Discriminator(_target_shape),
]


class LoraSpec(Frozen):
    """The adapter's fixed values; the space overrides what it searches.

    Attributes:
        rank, alpha: Size and numerator of the scaling.
        dropout: On the adapter's input.
        targets: ``auto``, ``all-linear`` or module names such as ``[query, value]``.
        top_layers: Adapt only the last n layers; None for all.
    """

    rank: int = Field(default=8, ge=1, le=4096)
    alpha: float = Field(default=16.0, gt=0)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    targets: Targets = "auto"
    top_layers: int | None = Field(default=None, ge=1)


class TrainingSpec(Frozen):
    """The training run's fixed values; the space overrides what it searches.

    Attributes:
        learning_rate: Peak rate of AdamW.
        epochs: Passes over the training split.
        batch_size, eval_batch_size: Rows per step, rows per evaluation pass.
        weight_decay: AdamW's decoupled decay.
        warmup: Share of the steps over which the rate rises.
        scheduler: Shape of the rate after that.
        max_grad_norm: Clipping threshold; 0 for none.
        precision: ``auto`` takes bf16 where the hardware multiplies it natively.
        log_every: Steps between two logged training losses.
    """

    learning_rate: float = Field(default=5e-4, gt=0, le=1)
    epochs: int = Field(default=3, ge=1)
    batch_size: int = Field(default=16, ge=1)
    eval_batch_size: int = Field(default=64, ge=1)
    weight_decay: float = Field(default=0.01, ge=0)
    warmup: float = Field(default=0.06, ge=0, lt=1)
    scheduler: Scheduler = "linear"
    max_grad_norm: float = Field(default=1.0, ge=0)
    precision: Precision = "auto"
    log_every: int = Field(default=10, ge=1)


class SamplerSpec(Frozen):
    """How the next point is chosen.

    Attributes:
        kind: An Optuna sampler, or ``points``.
        points: With ``points``: the points themselves, tried in order.
        startup_trials: Random trials before tpe, gp and cmaes start to model.
    """

    kind: Literal["tpe", "random", "grid", "qmc", "gp", "cmaes", "points"] = "tpe"
    points: tuple[dict[str, Scalar | tuple[str, ...]], ...] | None = None
    startup_trials: int = Field(default=10, ge=1)

    @model_validator(mode="after")
    def _points_where_they_belong(self) -> SamplerSpec:
        if (self.kind == "points") != bool(self.points):
            raise ValueError("points are given with kind: points, and only there")
        for place, point in enumerate(self.points or ()):
            for key, value in point.items():
                problem = check_value(key, value)
                if problem:
                    raise ValueError(f"point {place + 1}, {key}: {problem}")
        return self


class PrunerSpec(Frozen):
    """When a trial is given up early. Trials are compared on the share of their budget.

    Attributes:
        kind: An Optuna pruner, or ``none``.
        startup_trials: median and percentile: trials that must have finished first.
        percentile: percentile: keep trials in this upper percentage.
        reduction_factor: successive_halving and hyperband: one in so many goes on.
    """

    kind: Literal["none", "median", "percentile", "successive_halving", "hyperband"] = (
        "successive_halving"
    )
    startup_trials: int = Field(default=5, ge=0)
    percentile: float = Field(default=50.0, gt=0, lt=100)
    reduction_factor: int = Field(default=2, ge=2)


Objective = Literal["f1", "f1_macro", "f1_weighted", "accuracy", "auc"]


class SearchSpec(Frozen):
    """The study.

    Attributes:
        trials: Trials in all, also after a restart.
        timeout_minutes: No new trial starts after this much time in one command.
        objective: Validation metric to maximise. ``f1`` is that of the last label for two
            labels and the macro average for more.
        sampler, pruner: How points are chosen, and given up.
        space: What is searched.
    """

    trials: int = Field(default=12, ge=1)
    timeout_minutes: float | None = Field(default=None, gt=0)
    objective: Objective = "f1"
    sampler: SamplerSpec = SamplerSpec()
    pruner: PrunerSpec = PrunerSpec()
    space: Space = Space()

    @model_validator(mode="after")
    def _space_or_points(self) -> SearchSpec:
        if self.sampler.kind == "points":
            if self.space.dimensions:
                raise ValueError("sampler points needs no space; remove one of the two")
        elif not self.space.dimensions:
            raise ValueError(
                f"the sampler {self.sampler.kind} needs a space with at least one parameter"
            )
        if self.sampler.kind == "grid":
            endless = [
                key
                for key, dimension in self.space.dimensions.items()
                if isinstance(dimension, FloatRange) and dimension.step is None
            ]
            if endless:
                raise ValueError(
                    f"a grid needs choices, or a range with a step, for {', '.join(endless)}"
                )
        return self


class TrackingSpec(Frozen):
    """Where runs are recorded.

    Attributes:
        uri: ``sqlite`` for ``mlruns/mlflow.db``, or any MLflow tracking URI.
        experiment: Name of the MLflow experiment; None takes the sweep's name.
    """

    uri: str = "sqlite"
    experiment: str | None = None


BaselineName = Literal["untrained", "majority", "tfidf", "linear_probe"]
EngineName = Literal["trainer", "packed", "auto"]


class Spec(Frozen):
    """A whole sweep.

    Attributes:
        name: Letters, digits, ``.``, ``_`` and ``-``; names the study, the experiment and
            the folder.
        seed: Root of every seed in the sweep.
        engine: ``trainer`` trains one trial after another, ``packed`` many at once on one
            base; ``auto`` takes the packed one on a CPU, where it can carry the base.
        lanes: Trials that the packed engine trains at once; ``auto`` measures a step and
            takes as many as memory allows, and as leave the sampler something to learn.
        baselines: References that the report compares the winner with.
        tracking: Where runs are recorded.
        output: The folder that all is written to.
    """

    name: str
    seed: int = Field(default=42, ge=0, lt=2**31)
    model: ModelSpec = ModelSpec()
    data: DataSpec
    lora: LoraSpec = LoraSpec()
    training: TrainingSpec = TrainingSpec()
    search: SearchSpec
    engine: EngineName = "auto"
    lanes: int | Literal["auto"] = "auto"
    baselines: tuple[BaselineName, ...] = Field(
        default=("untrained", "majority", "tfidf"),
    )
    tracking: TrackingSpec = TrackingSpec()
    output: str = Field(default="mlruns", min_length=1)

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str) -> str:
        if not _NAME.fullmatch(name):
            raise ValueError(
                f"must be a plain folder name of letters, digits, '.', '_' and '-', got {name!r}"
            )
        return name

    @field_validator("lanes", mode="before")
    @classmethod
    def _auto_or_some(cls, lanes: Any) -> Any:
        whole = isinstance(lanes, int) and not isinstance(lanes, bool)
        if lanes != "auto" and not (whole and 1 <= lanes <= 256):
            raise ValueError(f"must be auto or a whole number from 1 to 256, got {lanes!r}")
        return lanes

    @field_validator("baselines")
    @classmethod
    def _distinct(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(names)) != len(names):
            raise ValueError("a baseline is listed twice")
        return names

"""Every sampler: its points lie in the space, never repeat, and don't depend on being killed."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest

from lorasweep.core.errors import SpecError
from lorasweep.core.outcomes import Outcome, TrialState
from lorasweep.search import samplers
from lorasweep.search.study import Study
from lorasweep.spec.schema import SamplerSpec, SearchSpec
from lorasweep.spec.space import Space

KINDS = ["tpe", "random", "grid", "qmc", "gp", "cmaes", "points"]
TRIALS = 8


def _run(study: Study, train: Callable[..., Any]) -> list[dict[str, Any]]:
    found = []
    while (asked := study.ask()) is not None:
        found.append({**asked.parameters, "seed": asked.seed})
        train(study, asked)
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_points_lie_in_the_space_and_are_all_different(kind, search, open_study, train, caplog):
    with caplog.at_level(logging.WARNING, logger="optuna"):
        found = _run(open_study(search(kind, trials=TRIALS)), train)
    assert len(found) == TRIALS
    assert len({str(sorted(point.items(), key=str)) for point in found}) == TRIALS
    for point in found:
        assert point["rank"] in (4, 8, 16)
        if kind == "grid":
            assert point["dropout"] in (0.0, 0.1, 0.2)
            assert point["epochs"] in (1, 2, 3)
        elif kind != "points":
            assert 1e-4 <= point["learning_rate"] <= 2e-3
            assert point["alpha"] / point["rank"] in (1, 2)
            assert point["targets"] in ("auto", ("query", "value"))
            assert isinstance(point["epochs"], int)
    assert not caplog.records


@pytest.mark.parametrize("kind", KINDS)
def test_a_sweep_killed_after_every_trial_asks_for_the_same_points(
    kind, search, open_study, train, gone
):
    spec = search(kind, trials=TRIALS)
    straight = _run(open_study(spec, "straight"), train)

    killed, started = [], 0
    while True:
        # Each turn is a process of its own: it asks, and some are killed in the midst of a trial.
        study = open_study(spec, "killed", owner=gone)
        study.reconcile()
        asked = study.ask()
        if asked is None:
            break
        started += 1
        if started in (2, 6, 7):
            train(study, asked, killed=True)
            study.close()
            continue
        killed.append({**asked.parameters, "seed": asked.seed})
        train(study, asked)
        study.close()

    assert killed == straight
    records = open_study(spec, "killed").records()
    assert sum(record.state == "interrupted" for record in records) == 3
    assert len(records) == TRIALS + 3


@pytest.mark.parametrize("kind", ["tpe", "gp", "cmaes"])
def test_a_model_based_sampler_learns_where_the_good_points_are(kind, search, open_study, epoch):
    space = {"learning_rate": {"low": 0.001, "high": 1.0}, "dropout": {"low": 0.0, "high": 0.9}}
    study = open_study(search(kind, trials=30, space=space, pruner={"kind": "none"}))
    distances = []
    while (asked := study.ask()) is not None:
        distance = abs(asked.parameters["learning_rate"] - 0.2) + abs(
            asked.parameters["dropout"] - 0.7
        )
        distances.append(distance)
        epoch(study, asked.number, 1, of=1, score=1 - distance)
        study.tell(Outcome(asked.number, TrialState.COMPLETED, 10, 1.0))
    # Random points are 0.58 away on average.
    assert sum(distances[-10:]) / 10 < 0.42


def test_quasi_random_points_fill_the_range_more_evenly_than_chance(search, open_study, train):
    space = {"learning_rate": {"low": 0.0001, "high": 1.0}, "rank": {"choices": [4, 8]}}
    found = _run(open_study(search("qmc", trials=16, space=space)), train)
    sixteenths = {int(point["learning_rate"] * 16) for point in found}
    assert len(sixteenths) == 16


def test_other_seeds_ask_for_other_points(search, open_study):
    asked = [open_study(search("random"), f"s{seed}", seed=seed).ask() for seed in (1, 2)]
    assert asked[0].parameters != asked[1].parameters


@pytest.mark.parametrize("kind", ["tpe", "random", "grid", "qmc", "gp", "cmaes"])
def test_a_finite_space_is_tried_to_its_last_point_and_no_further(kind, search, open_study, train):
    space = {"rank": {"choices": [4, 8]}, "epochs": {"low": 1, "high": 5, "step": 3}}
    study = open_study(search(kind, trials=50, space=space))
    assert study.remaining == 4
    assert not study.exhausted
    found = _run(study, train)
    assert {(point["rank"], point["epochs"]) for point in found} == {(4, 1), (4, 4), (8, 1), (8, 4)}
    assert len(study.records()) == 4
    assert study.exhausted
    assert study.remaining == 0


def test_points_are_tried_in_order_and_keep_what_they_leave_out(search, open_study, train):
    listed = [{"rank": 8}, {"rank": 4, "targets": ["query"]}, {"rank": 4, "epochs": 2}]
    study = open_study(search("points", trials=12, points=listed))
    first, second = study.ask(), None
    train(study, first)
    second = study.ask()
    train(study, second)
    train(study, study.ask())
    assert first.parameters == {"rank": 8}
    assert second.parameters == {"rank": 4, "targets": ("query",)}
    assert study.ask() is None
    assert study.exhausted
    assert study.records()[1].parameters == {"rank": 4, "targets": ("query",)}


def test_the_same_point_twice_is_refused(search, open_study):
    listed = [{"rank": 8, "epochs": 2}, {"rank": 4}, {"epochs": 2, "rank": 8}]
    with pytest.raises(SpecError, match="point 3 is the same as point 1"):
        open_study(search("points", points=listed))


def test_a_grid_without_end_is_refused(search):
    # The schema refuses it too; whoever builds a spec in code meets this check.
    space = Space.model_validate({"learning_rate": {"low": 0.1, "high": 0.2}})
    spec = SearchSpec.model_construct(sampler=SamplerSpec(kind="grid"), space=space, trials=2)
    (problem,) = samplers.check(spec)
    assert "learning_rate" in str(problem)
    assert "step" in problem.advice


def test_a_grid_too_large_for_memory_is_refused(search):
    space = {"rank": {"low": 1, "high": 4096}, "batch_size": {"low": 1, "high": 4096}}
    (problem,) = samplers.check(search("grid", space=space))
    assert "16,777,216" in str(problem)


def test_alpha_as_a_multiple_takes_the_fixed_rank(search, open_study):
    space = {"alpha": {"times_rank": [2]}, "epochs": {"low": 1, "high": 3}}
    with pytest.raises(SpecError, match="times_rank needs a rank"):
        open_study(search(space=space))
    asked = open_study(search(space=space), rank=32).ask()
    assert asked.parameters["alpha"] == 64

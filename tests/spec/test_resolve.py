from pathlib import Path

import pytest

from lorasweep.core.plans import AdapterPlan, LargestTrial
from lorasweep.spec.resolve import adapters_in, fingerprint, identity, largest_trial, plan_trial
from lorasweep.spec.schema import Spec


def spec(**changes) -> Spec:
    tree = {
        "name": "s",
        "data": {"source": {"kind": "embedded"}},
        "lora": {"rank": 4, "alpha": 8.0, "dropout": 0.2, "targets": ["query"]},
        "training": {"learning_rate": 0.01, "epochs": 2},
        "search": {"space": {"learning_rate": {"low": 1e-4, "high": 1e-3}}},
    }
    return Spec.model_validate(tree | changes)


def test_a_plan_takes_sampled_values_first_and_fixed_ones_after():
    plan = plan_trial(spec(), 3, 7, {"learning_rate": 0.002, "rank": 16}, Path("/f"))
    assert plan.learning_rate == 0.002
    assert plan.epochs == 2
    assert plan.adapter == AdapterPlan(16, 8.0, 0.2, ("query",))
    assert plan.adapter.scaling == 0.5
    assert (plan.number, plan.seed, plan.adapter_folder) == (3, 7, Path("/f/adapter"))


def test_a_schedule_may_be_sampled_and_a_seed_is_a_parameter_like_others():
    assert plan_trial(spec(), 0, 0, {}, Path()).scheduler == "linear"
    plan = plan_trial(spec(), 0, 7, {"scheduler": "cosine", "seed": 3}, Path())
    assert plan.scheduler == "cosine"
    assert plan.seed == 7  # which was made from the point, 3 among it
    assert plan.parameters == {"scheduler": "cosine", "seed": 3}


def test_sampled_targets_may_be_a_word_or_a_list():
    auto = plan_trial(spec(), 0, 0, {"targets": "auto"}, Path())
    names = plan_trial(spec(), 0, 0, {"targets": ("key", "value")}, Path())
    assert auto.adapter.targets == ("auto",)
    assert names.adapter.targets == ("key", "value")


def test_every_combination_of_targets_is_known_before_training():
    space = {
        "targets": {"choices": ["auto", ["query", "key"]]},
        "top_layers": {"low": 1, "high": 6},
    }
    found = adapters_in(spec(search={"space": space}))
    assert {(plan.targets, plan.top_layers) for plan in found} == {
        (("auto",), 1),
        (("auto",), 6),
        (("query", "key"), 1),
        (("query", "key"), 6),
    }
    points = {"sampler": {"kind": "points", "points": [{"targets": "all-linear"}, {"rank": 2}]}}
    found = adapters_in(spec(search=points))
    assert {plan.targets for plan in found} == {("all-linear",), ("query",)}


@pytest.mark.parametrize(
    ("search", "largest"),
    [
        (  # lora and training say the rest
            {"space": {"epochs": {"low": 1, "high": 2}}},
            LargestTrial(16, (AdapterPlan(4, 4.0, 0.2, ("query",)),)),
        ),
        (
            {
                "space": {
                    "batch_size": {"low": 8, "high": 64, "step": 8},
                    "rank": {"low": 2, "high": 32, "log": True},
                    "dropout": {"low": 0.0, "high": 0.5},
                    "top_layers": {"low": 1, "high": 2},
                }
            },
            LargestTrial(
                64,
                (
                    AdapterPlan(32, 32.0, 0.5, ("query",), 1),
                    AdapterPlan(32, 32.0, 0.5, ("query",), 2),
                ),
            ),
        ),
        (
            {
                "space": {
                    "batch_size": {"choices": [16, 32, 8]},
                    "rank": {"choices": [64, 2]},
                    "dropout": {"choices": [0.0, 0.1]},
                    "targets": {"choices": ["auto", "all-linear"]},
                }
            },
            LargestTrial(
                32,
                (
                    AdapterPlan(64, 64.0, 0.1, ("all-linear",)),
                    AdapterPlan(64, 64.0, 0.1, ("auto",)),
                ),
            ),
        ),
        (  # of points each key by itself, also where most keep the fixed value
            {
                "sampler": {
                    "kind": "points",
                    "points": [{"batch_size": 48, "rank": 2}, {"batch_size": 8, "dropout": 0.0}],
                }
            },
            LargestTrial(48, (AdapterPlan(4, 4.0, 0.2, ("query",)),)),
        ),
    ],
    ids=["fixed", "ranges", "lists", "points"],
)
def test_the_most_that_a_trial_may_ask_for(search, largest):
    assert largest_trial(spec(search=search)) == largest


def test_identity_ignores_what_changes_no_result():
    one = identity(spec(), "data", "base")
    other = spec(
        name="other",
        baselines=["majority"],
        tracking={"uri": "http://x"},
        output="elsewhere",
        search={
            "trials": 99,
            "timeout_minutes": 1,
            "space": {"learning_rate": {"low": 1e-4, "high": 1e-3}},
        },
    )
    assert identity(other, "data", "base") == one
    assert fingerprint(identity(other, "data", "base")) == fingerprint(one)


def test_a_study_of_before_a_key_was_searchable_goes_on():
    parts = identity(spec(), "d", "b")
    assert "search.space.scheduler" not in parts
    assert "search.space.seed" not in parts
    assert "search.space.rank" in parts  # null all the same: it always was there
    searched = {"learning_rate": {"low": 1e-4, "high": 1e-3}, "seed": {"choices": [1, 2]}}
    found = identity(spec(search={"space": searched}), "d", "b")
    assert found["search.space.seed.choices"] == "[1, 2]"


def test_identity_names_what_differs():
    one = identity(spec(), "data", "base")
    other = identity(spec(training={"learning_rate": 0.01, "epochs": 3}), "more data", "base")
    assert {key for key in one if one[key] != other[key]} == {"data", "training.epochs"}
    assert identity(spec(seed=1), "data", "base") != one

"""The benchmarks start, and their smallest runs write what documents are made from."""

import csv
import importlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

_FOLDER = Path(__file__).parents[1] / "benchmarks"
_SCRIPTS = (
    "makespan",
    "distilbert",
    "architectures",
    "refill",
    "peak",
    "step_profile",
    "ablation",
    "halving",
)


def run(
    script: str, *words: str, data: Path | None = None, exit_code: int = 0, threads: int = 1
) -> str:
    done = subprocess.run(
        [sys.executable, str(_FOLDER / f"{script}.py"), *words],
        env={**os.environ, "LORASWEEP_DATA": str(data), "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == exit_code, done.stderr
    return done.stderr if exit_code else done.stdout


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    """A data folder of the real one's layout: 64 rows to train, 16 to validate."""
    (tmp_path / "sst2").mkdir()
    for name, rows in {"train": 64, "validation": 16}.items():
        with (tmp_path / f"sst2/sentences_{name}.csv").open("w", newline="") as stream:
            writer = csv.writer(stream)
            writer.writerow(("text", "label"))
            for at in range(rows):
                word, label = ("great", 1) if at % 2 else ("awful", 0)
                writer.writerow(
                    (f"number {at} of these films is {word} " + "indeed " * (at % 5), label)
                )
    return tmp_path


@pytest.mark.parametrize("script", _SCRIPTS)
def test_every_benchmark_says_how_it_is_used(script: str) -> None:
    said = run(script, "--help")
    assert "--repeats" in said
    assert "contenders:" in said


def test_makespan_writes_times_scores_and_machine(sentences: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    cut = ("--trials", "2", "--train-rows", "32", "--epochs", "1", "--repeats", "1")
    table = run("makespan", "packed", *cut, "--out", str(out), data=sentences)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert "packed" in table
    assert found["command"] == shlex.join(["python", "benchmarks/makespan.py", "packed", *cut])
    assert "platform" not in found["machine"]
    assert len(found["machine"]["load_average"]) == 3
    assert found["times_as_long_as"]["packed"] == {"packed": 1.0}
    (one,) = found["runs"]["packed"]
    assert found["median_seconds"]["packed"] == one["seconds"]
    assert found["mean_best_f1"]["packed"]["mean"] == pytest.approx(sum(one["f1"]) / 2)
    assert found["work"]["points"][1] == {"learning_rate": 2e-4, "rank": 8, "epochs": 1}


def test_only_missing_turns_are_measured(sentences: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    work = ("packed", "--trials", "1", "--train-rows", "16", "--epochs", "1")
    cut = (*work, "--out", str(out), "--repeats")
    run("makespan", *cut, "1", data=sentences)
    first = json.loads(out.read_text(encoding="utf-8"))
    run("makespan", *cut, "2", "--resume", data=sentences)
    found = json.loads(out.read_text(encoding="utf-8"))
    kept, new = found["runs"]["packed"]
    assert kept == first["runs"]["packed"][0]
    assert new["turn"] == 1
    assert new["git_commit"] == found["machine"]["git_commit"]
    words = ["python", "benchmarks/makespan.py", *work, "--repeats", "2"]
    assert found["command"] == shlex.join(words)
    # Nothing is missing: it is told again, and stays as it is. Other work is refused.
    assert "packed" in run("makespan", *cut, "2", "--resume", data=sentences)
    refused = ("2", "--resume", "--lanes", "1")
    said = run("makespan", *cut, *refused, data=sentences, exit_code=2)
    assert f"--resume: {out} was measured with another lanes." in said
    assert json.loads(out.read_text(encoding="utf-8")) == found


def results_of(turns: dict[str, list[int]], **more: object) -> dict[str, object]:
    """A file of results: of each contender, the turns that it has taken part in."""
    return {
        "benchmark": "makespan",
        "work": {"trials": 2},
        "contenders": dict.fromkeys(turns, "words"),
        "machine": {"cores": 2, "git_commit": "abc", "load_average": [1.0]},
        "repeats": {"ours": 3, "theirs": 3, "slow": 1},
        "runs": {name: [{"turn": turn} for turn in each] for name, each in turns.items()},
        "failed": {},
        **more,
    }


@pytest.mark.parametrize(
    ("there", "more", "kept", "cut"),
    [
        ({"ours": [0, 1], "theirs": [0, 1], "slow": [0]}, {}, [2, 2, 1], None),
        ({"ours": [0, 1], "theirs": [0], "slow": [0]}, {}, [1, 1, 1], 1),
        ({"ours": [0], "theirs": [0], "slow": []}, {}, [0, 0, 0], 0),
        ({"ours": [0, 1], "theirs": [], "slow": [0]}, {"failed": {"theirs": "?"}}, [2, 0, 1], None),
        ({"ours": [], "theirs": [], "slow": []}, {}, [0, 0, 0], None),
    ],
)
def test_whole_turns_are_kept_and_a_cut_one_is_not(there, more, kept, cut, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(_FOLDER))
    resumption = importlib.import_module("resumption")
    before = results_of(there, **more)
    found = resumption.earlier(before, before)
    assert [len(runs) for runs in found.runs.values()] == kept
    assert found.cut == cut
    assert found.failed == more.get("failed", {})
    assert all(one["git_commit"] == "abc" for runs in found.runs.values() for one in runs)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"benchmark": "peak"}, "benchmark"),
        ({"work": {"trials": 3}}, "trials"),
        ({"contenders": {"ours": "words"}}, "slow, theirs"),
        ({"machine": {"cores": 4}}, "cores"),
        # Its second turn would be of another hour than theirs.
        ({"repeats": {"ours": 3, "theirs": 3, "slow": 2}}, "--repeats of slow"),
        # A turn that both have had part in would stand there without one of them.
        ({"repeats": {"ours": 3, "theirs": 1, "slow": 1}}, "--repeats of theirs"),
    ],
)
def test_turns_of_something_else_are_not_mixed(more, said, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(_FOLDER))
    resumption = importlib.import_module("resumption")
    before = results_of({"ours": [0, 1], "theirs": [0, 1], "slow": [0]})
    assert (
        resumption.earlier(
            before,
            results_of(
                {},
                **{**before, "machine": {"cores": 2, "git_commit": "def", "load_average": [0.0]}},
            ),
        ).cut
        is None
    )
    assert resumption.earlier(before, {**before, "repeats": {"ours": 9, "theirs": 9, "slow": 1}})
    with pytest.raises(resumption.OtherWorkError, match=f"^{said}$"):
        resumption.earlier(before, {**before, **more})


def test_peak_relates_the_packs_arithmetic_to_torchs_products(
    sentences: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results.json"
    cut = ("--steps", "4", "--lanes", "2", "--repeats", "1")
    run("peak", *cut, "--out", str(out), data=sentences)
    found = json.loads(out.read_text(encoding="utf-8"))
    (one,) = found["runs"]["packed"]
    assert one["lanes"] == 2
    assert one["torch_counts_of_formula"] == 1.0
    assert sum(one["useful_shares"].values()) == pytest.approx(1.0)
    assert set(one["product_gflops_a_second"]) == {"square", "up", "down"}
    fastest = max(one["product_gflops_a_second"].values())
    assert one["share_of_peak"] == pytest.approx(one["useful_gflops_a_second"] / fastest)
    assert found["medians"]["packed"]["share_of_peak"] == one["share_of_peak"]


def test_a_profile_says_what_a_step_is_made_of(sentences: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    # Four steps an epoch; twenty of them warm up.
    cut = ("--lanes", "2", "--repeats", "1", "--epochs", "7")
    table = run("step_profile", "minilm", *cut, "--out", str(out), data=sentences)
    found = json.loads(out.read_text(encoding="utf-8"))
    (one,) = found["runs"]["minilm"]
    shares = found["share_of_a_step"]["minilm"]
    assert sum(shares.values()) == pytest.approx(1)
    for kind in ("the base's products", "LoRA and heads", "attention", "GELU", "norms"):
        assert shares[kind] > 0
    assert one["profiled_steps"] == 8
    assert f"{shares['attention']:.1%}" in table


def test_operations_are_counted_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(_FOLDER))
    kind_of = importlib.import_module("step_profile").kind_of
    assert kind_of("AdaptedLinearBackward") == "LoRA and heads"
    assert kind_of("aten::addmm") == "the base's products"
    assert kind_of("aten::add_") == "additions"
    assert kind_of("aten::addcmul_") == "AdamW and clipping"
    assert kind_of("aten::gelu_backward") == "GELU"
    assert kind_of("CompiledAttentionBackward") == "attention"
    assert kind_of("aten::index_select") == "the rest"


def test_refill_counts_steps_and_places_of_each_way_to_pack(
    sentences: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results.json"
    cut = ("--trials", "4", "--lanes", "2", "--train-rows", "32", "--repeats", "1")
    table = run("refill", *cut, "--out", str(out), data=sentences)
    runs = {name: one for name, (one,) in json.loads(out.read_text("utf-8"))["runs"].items()}
    # Trials of 2, 8, 4 and 6 steps: two behind one another beside the second; or in pairs.
    assert {name: one["pack_steps"] for name, one in runs.items()} == {
        "refilled": 2 + 4 + 6,
        "fixed packs": 8 + 6,
        "equal epochs": 4 + 8,
    }
    assert {one["lane_steps"] for one in runs.values()} == {20}
    assert runs["refilled"]["lanes_busy_while_plans_remained"] == 1.0
    assert runs["fixed packs"]["lanes_busy"] == pytest.approx(20 / 28)
    shares = [one["step_time_share"] for one in runs.values()]
    assert all(0 < share < 1 for share in shares)
    assert all(f"{share:.1%}" in table for share in shares)


def test_ablation_really_switches_parts_off(sentences: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    chosen = ("everything on", "padded to the lane", "padded to the pack", "one lane")
    cut = ("--trials", "2", "--epochs", "1", "--lanes", "2", "--train-rows", "32", "--repeats", "1")
    run("ablation", *chosen, *cut, "--out", str(out), data=sentences)
    runs = {name: one for name, (one,) in json.loads(out.read_text("utf-8"))["runs"].items()}
    assert {name: (one["lanes"], one["pack_steps"]) for name, one in runs.items()} == {
        "everything on": (2, 2),
        "padded to the lane": (2, 2),
        "padded to the pack": (2, 2),
        "one lane": (1, 4),
    }
    assert "real_share" not in runs["everything on"]
    assert runs["padded to the pack"]["real_share"] <= runs["padded to the lane"]["real_share"] < 1


def test_each_switch_of_the_ablation_changes_what_the_engine_runs(
    sentences: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results.json"
    off = {
        "fp32": ("precision", "fp32"),
        "whole passes": ("parts_of_a_pass", 1),
        "weights not laid out": ("weights_laid_out", False),
        "no dropout": ("base_dropout", False),
        "kernels off": ("compiled_kernels", False),
    }
    chosen = ("everything on", *off, "fixed packs", "top layers", "top layers, not kept")
    # Three trials in two lanes, of two and four steps: one is refilled.
    cut = ("--trials", "3", "--epochs", "1", "2", "--lanes", "2", "--train-rows", "32")
    words = (*chosen, *cut, "--repeats", "1", "--out", str(out))
    run("ablation", *words, data=sentences, threads=2)
    runs = {name: one for name, (one,) in json.loads(out.read_text("utf-8"))["runs"].items()}
    ran = {name: {"precision": one["precision"], **one["as_it_ran"]} for name, one in runs.items()}
    with_all = ran["everything on"]
    assert with_all["weights_laid_out"]
    assert with_all["compiled_kernels"]
    assert with_all["base_dropout"]
    if len(os.sched_getaffinity(0)) > 1:
        assert with_all["parts_of_a_pass"] == 2
    for name, (what, value) in off.items():
        assert ran[name] == {**with_all, what: value}
    assert (runs["everything on"]["pack_steps"], runs["fixed packs"]["pack_steps"]) == (4, 6)
    assert ran["top layers"]["lower_layers_kept"]
    assert not ran["top layers, not kept"]["lower_layers_kept"]


def test_every_rival_does_the_same_trials(sentences: Path, tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    rivals = {"tuned": "bf16", "as shipped": "fp32", "notebook": "fp32", "trainer engine": None}
    cut = ("--trials", "2", "--train-rows", "32", "--epochs", "1", "--repeats", "1")
    run("makespan", "packed", *rivals, *cut, "--out", str(out), data=sentences)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["failed"] == {}
    for name, precision in rivals.items():
        (one,) = found["runs"][name]
        assert precision in (None, one["precision"])
        assert len(one["f1"]) == 2
        assert all(0 <= score <= 1 for score in one["f1"])
        assert found["times_as_long_as"][name]["packed"] > 0


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("distilbert", ("packed", "tuned", "--trials", "1")),
        ("architectures", ("modernbert, packed, fp32", "modernbert, trainer, fp32", "--trials=2")),
        ("halving", ("lorasweep", "--trials", "2")),
    ],
)
def test_the_other_comparisons_run_through(
    script: str, words: tuple[str, ...], sentences: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results.json"
    # The last batch isn't full.
    cut = ("--train-rows", "63", "--epochs", "1", "--repeats", "1", "--out", str(out))
    run(script, *words, *cut, data=sentences)
    found = json.loads(out.read_text(encoding="utf-8"))
    assert found["failed"] == {}
    assert all(len(runs) == 1 for runs in found["runs"].values())


def test_a_contender_that_fails_is_named_in_the_results(tmp_path: Path) -> None:
    out = tmp_path / "results.json"
    run("makespan", "packed", "--repeats", "1", "--out", str(out), data=tmp_path, exit_code=1)
    assert "sentences_train.csv" in json.loads(out.read_text(encoding="utf-8"))["failed"]["packed"]


def test_scores_are_told_with_the_noise_of_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(_FOLDER))
    scores, turns = importlib.import_module("scores"), importlib.import_module("turns")
    contenders = {
        "ours": turns.Contender(dict, ""),
        "theirs": turns.Contender(dict, ""),
        "padded": turns.Contender(dict, "", comparable=False),
    }
    taken = {
        "ours": [
            {"turn": 0, "seconds": 1.0, "f1": [0.80, 0.60]},
            {"turn": 1, "seconds": 2.0, "f1": [0.82, 0.60]},
        ],
        "theirs": [{"turn": 1, "seconds": 6.0, "f1": [0.83, 0.59]}],
        "padded": [{"turn": 0, "seconds": 5.0, "f1": [0.1, 0.9]}],
    }
    report, table = scores.summary(taken, contenders)
    # The ratio is that of the turn which both had part in.
    assert report["times_as_long_as"]["theirs"] == {"ours": 3.0}
    noise = report["seed_noise"]
    assert noise["degrees_of_freedom"] == 2
    # Variances over turns are 0.0002 and 0, of one degree of freedom each.
    assert noise["standard_deviation_of_a_trial"] == pytest.approx(0.01)
    theirs = report["mean_best_f1"]["theirs"]
    # Of the same trials in the turn that both had part in: +0.01 and -0.01.
    assert theirs["difference"] == pytest.approx(0.0)
    assert theirs["standard_error_of_difference"] == pytest.approx(0.01)
    assert theirs["pairs"] == 2
    assert "difference" not in report["mean_best_f1"]["padded"]
    assert "time only" in table


def test_the_time_to_the_target_is_that_of_the_first_score_as_good(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(_FOLDER))
    halving = importlib.import_module("halving")
    ours = [(9.0, 0, 2, 0.897), (4.0, 0, 1, 0.85), (12.0, 1, 1, 0.901)]
    theirs = [(20.0, 0, 1, 0.88), (30.0, 0, 2, 0.89)]
    taken = {
        "lorasweep": [{"turn": 0, "seconds": 13.0, "evaluations": ours}],
        "ray tune": [{"turn": 0, "seconds": 36.0, "evaluations": theirs}],
    }
    report, table = halving.summary(taken)
    ours_mean, theirs_mean = report["mean_best_f1"].values()
    assert ours_mean == {
        "mean": pytest.approx((0.897 + 0.901) / 2),
        "standard_error": pytest.approx(0.002),
        "trials": 2,
    }
    assert theirs_mean == {"mean": 0.89, "standard_error": None, "trials": 1}
    assert "0.8990 ± 0.0020 (2)" in table
    assert "0.8900 (1)" in table
    assert report["target_f1_by_turn"] == {0: pytest.approx(0.896)}
    assert report["seconds_to_target_by_turn"]["lorasweep"] == {0: 9.0}
    # It never got there: all its time is a lower bound.
    never = report["times_as_long_to_target_as"]["lorasweep"]["ray tune"]
    assert never == {"ratio": 4.0, "never": 1, "at_least": 1, "at_most": 0}
    assert "> 4.00" in table


def test_a_turn_in_which_only_the_other_reached_the_target_counts_against_us(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(str(_FOLDER))
    halving = importlib.import_module("halving")
    good, bad = [(10.0, 0, 1, 0.9)], [(5.0, 0, 1, 0.8)]
    taken = {
        "lorasweep": [{"turn": turn, "seconds": 20.0, "evaluations": bad} for turn in range(3)],
        "ray tune": [{"turn": turn, "seconds": 40.0, "evaluations": good} for turn in range(3)],
    }
    report, table = halving.summary(taken)
    # All of our time was too short for it, so it took at most half as long.
    found = report["times_as_long_to_target_as"]["lorasweep"]
    assert found["ray tune"] == {"ratio": 0.5, "never": 0, "at_least": 0, "at_most": 3}
    assert found["lorasweep"] == {"ratio": 1.0, "never": 3, "at_least": 0, "at_most": 0}
    assert " < 0.50 " in table
    # Whoever had part in turns that it won alone is not told to be at most so fast.
    taken["lorasweep"][0]["evaluations"] = [(10.0, 0, 1, 0.9)]
    taken["ray tune"] = taken["ray tune"][:1]
    report, table = halving.summary(taken)
    found = report["times_as_long_to_target_as"]["lorasweep"]
    assert found["ray tune"] == {"ratio": 1.0, "never": 0, "at_least": 0, "at_most": 0}
    assert "~" not in table.splitlines()[2]


def test_each_of_rays_trials_has_a_seed_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(_FOLDER))
    seed_of = importlib.import_module("ray_contender").seed_of
    points = [{"learning_rate": rate, "rank": 8} for rate in (1e-4, 1.1e-4)]
    seeds = {seed_of(point, seed) for point in points for seed in (1, 1001)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**32 for seed in seeds)  # what numpy takes
    assert seed_of({"rank": 8, "learning_rate": 1e-4}, 1) == seed_of(points[0], 1)

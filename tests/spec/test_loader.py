from pathlib import Path

import pytest

from lorasweep.core.errors import SpecError
from lorasweep.spec.loader import dump_spec, load_spec

GOOD = """\
name: good
data:
  source: {kind: embedded}
search:
  trials: 4
  space:
    learning_rate: {low: 1.0e-4, high: 2e-3, log: true}
    rank: {choices: [4, 8]}
    alpha: {times_rank: [1, 2]}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "x.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def problems(path, *overrides, environment=None) -> list[str]:
    with pytest.raises(SpecError) as caught:
        load_spec(path, overrides, environment or {})
    return [str(problem).replace(str(path.parent) + "/", "") for problem in caught.value.problems]


def test_defaults_are_filled_in(write):
    spec = load_spec(write(GOOD))
    assert spec.search.space.learning_rate.high == 0.002  # 2e-3 is a number in YAML 1.2
    assert (spec.seed, spec.model.name, spec.training.batch_size) == (42, "embedded/minilm", 16)
    assert spec.baselines == ("untrained", "majority", "tfidf")


def test_the_resolved_spec_reads_back_as_itself(write, tmp_path):
    spec = load_spec(write(GOOD))
    again = tmp_path / "again.yaml"
    again.write_text(dump_spec(spec), encoding="utf-8")
    assert load_spec(again) == spec


def test_every_error_comes_at_once_in_the_order_of_the_file(write):
    path = write(
        """\
name: ../out
sed: 1
model: {max_lenght: 64}
data:
  source: {kind: file, train: x.csv}
training:
  batch_size: "16"
  warmup: 2
search:
  trials: 0
  sampler: {kind: tpee}
  space:
    rank: {choices: [0, 4]}
    learning_rate: {low: 1e-3, high: 1e-4}
    epochs: 3
    alpha: {times_rank: [0]}
"""
    )
    assert problems(path) == [
        "x.yaml:1 name: must be a plain folder name of letters, digits, '.', '_' and '-', "
        "got '../out'.",
        "x.yaml:2 sed: unknown key. Did you mean seed?",
        "x.yaml:3 model.max_lenght: unknown key. Did you mean max_length?",
        "x.yaml:5 data.source: must be one of files, hub, embedded, got 'file'. "
        "Did you mean files?",
        "x.yaml:7 training.batch_size: must be a whole number, got '16'. "
        "Remove the quotes if there are any.",
        "x.yaml:8 training.warmup: must be a number < 1, got 2.",
        "x.yaml:10 search.trials: must be a whole number ≥ 1, got 0.",
        "x.yaml:11 search.sampler.kind: must be one of tpe, random, grid, qmc, gp, cmaes, "
        "points, got 'tpee'. Did you mean tpe?",
        "x.yaml:13 search.space.rank: must be a whole number ≥ 1, got 0.",
        "x.yaml:14 search.space.learning_rate: low must be below high, "
        "got low 0.001 and high 0.0001.",
        "x.yaml:15 search.space.epochs: must be a range such as {low: 1, high: 8}, or "
        "{choices: [4, 8]}, got 3. To keep epochs fixed, write it under training or lora instead.",
        "x.yaml:16 search.space.alpha.times_rank.0: must be a number > 0, got 0.",
    ]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("trials: 4", "trials: 4.5"), "x.yaml:5 search.trials: must be a whole number, got 4.5."),
        (
            ("trials: 4", "trials: true"),
            "x.yaml:5 search.trials: must be a whole number, got true.",
        ),
        (("trials: 4", "trials:"), "x.yaml:5 search.trials: must be a whole number, got nothing."),
        (("high: 2e-3", "high: .inf"), "must be a finite number"),
        (("high: 2e-3", "high: 3"), "must be a number > 0 and ≤ 1, got 3"),
        (("low: 1.0e-4", "low: 0"), "a logarithmic range must start above 0"),
        (("[4, 8]", "[4, 4]"), "the same value is listed twice"),
        (("[4, 8]", "[]"), "must list at least 1, got 0"),
        (("[4, 8]", "[4, eight]"), "must be a whole number ≥ 1, got 'eight'"),
        (("rank: {choices", "rank: {choises"), "x.yaml:8 search.space.rank.choises: unknown key"),
        (("kind: embedded", "kind: hub"), "x.yaml:3 data.source.path: is required and missing."),
        (
            ("name: good", "name: good\nlanes: many"),
            "x.yaml:2 lanes: must be auto or a whole number from 1 to 256, got 'many'.",
        ),
        (("name: good", "name: good\nengine: packd"), "x.yaml:2 engine: must be one of trainer"),
        (("name: good\n", ""), "x.yaml name: is required and missing."),
        (("  trials: 4", "  trials: 4\n  trials: 5"), "is not valid YAML"),
        (("trials: 4", "trials: [4"), "is not valid YAML"),
    ],
)
def test_what_is_wrong_is_said_with_its_place(write, change, sentence):
    assert any(sentence in problem for problem in problems(write(GOOD.replace(*change))))


@pytest.mark.parametrize(
    ("alpha", "sentence"),
    [
        ("{choices: [8, 2000000]}", "must be a number > 0 and ≤ 1000000, got 2000000."),
        ("{low: 1, high: 1e7}", "must be a number > 0 and ≤ 1000000, got 10000000.0."),
    ],
)
def test_an_alpha_beyond_its_limit_is_told_the_limit_and_what_to_do(write, alpha, sentence):
    path = write(GOOD.replace("{times_rank: [1, 2]}", alpha))
    assert problems(path) == [
        f"x.yaml:9 search.space.alpha: {sentence} "
        "Lower it, or search the scaling alpha / rank with {times_rank: [1, 2]} instead."
    ]


def test_an_alpha_below_its_limit_is_told_that_one(write):
    path = write(GOOD.replace("{times_rank: [1, 2]}", "{choices: [0, 8]}"))
    assert problems(path) == ["x.yaml:9 search.space.alpha: must be a number > 0, got 0."]


@pytest.mark.parametrize(
    ("key", "value", "limits"),
    [("rank", 5000, "≥ 1 and ≤ 4096"), ("batch_size", 100_000, "≥ 1 and ≤ 65536")],
)
def test_every_limit_is_named_to_who_goes_beyond_it(write, key, value, limits):
    in_space = write(
        GOOD.replace("    rank: {choices: [4, 8]}", f"    {key}: {{choices: [{value}]}}")
    )
    assert problems(in_space)[0].endswith(f"must be a whole number {limits}, got {value}.")
    as_point = write(
        "name: p\ndata: {source: {kind: embedded}}\n"
        f"search: {{sampler: {{kind: points, points: [{{{key}: {value}}}]}}}}\n"
    )
    assert problems(as_point)[0].endswith(f"must be a whole number {limits}, got {value}.")


def test_a_schedule_that_nobody_knows_is_told_those_that_are(write):
    path = write(GOOD.replace("    rank: {choices: [4, 8]}", "    scheduler: {choices: [step]}"))
    assert problems(path)[0] == (
        "x.yaml:8 search.space.scheduler: must be one of linear, cosine, constant, "
        "constant_with_warmup, got 'step'."
    )


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (
            "scheduler: cosine",
            "search.space.scheduler: must be {choices: [...]}, got 'cosine'. "
            "To keep scheduler fixed, write it under training or lora instead.",
        ),
        (
            "seed: 3",
            "search.space.seed: must be a range such as {low: 1, high: 8}, or {choices: [4, 8]}, "
            "got 3. The sweep's own seed is the key seed at the top.",
        ),
    ],
)
def test_a_single_value_in_a_space_is_told_where_it_belongs(write, line, sentence):
    path = write(GOOD.replace("    rank: {choices: [4, 8]}", f"    {line}"))
    assert problems(path)[0] == f"x.yaml:8 {sentence}"


def test_a_grid_needs_values_to_enumerate(write):
    path = write(GOOD.replace("  trials: 4", "  trials: 4\n  sampler: {kind: grid}"))
    assert "a grid needs choices, or a range with a step, for learning_rate" in problems(path)[0]


def test_points_and_a_space_exclude_each_other(write):
    points = "  trials: 4\n  sampler: {kind: points, points: [{rank: 4}]}"
    assert "needs no space" in problems(write(GOOD.replace("  trials: 4", points)))[0]


def test_points_are_held_to_the_same_limits(write):
    path = write(
        "name: p\ndata: {source: {kind: embedded}}\n"
        "search: {sampler: {kind: points, points: [{rank: 4}, {rank: 0, foo: 1}]}}\n"
    )
    assert "point 2, rank: must be a whole number ≥ 1, got 0" in problems(path)[0]


def test_a_sampler_without_a_space_is_refused(write):
    path = write("name: p\ndata: {source: {kind: embedded}}\nsearch: {trials: 3}\n")
    assert "needs a space with at least one parameter" in problems(path)[0]


@pytest.mark.parametrize(
    ("name", "accepted"),
    [("a", True), ("a.b-c_9", True), ("..", False), ("a/b", False), (".a", False), ("", False)],
)
def test_a_name_stays_in_its_folder(write, name, accepted):
    path = write(GOOD.replace("name: good", f'name: "{name}"'))
    if accepted:
        assert load_spec(path).name == name
    else:
        assert "plain folder name" in problems(path)[0]


def test_overrides_win_and_are_named_in_errors(write):
    path = write(GOOD)
    spec = load_spec(path, ["search.trials=9", "data.limit.train=2000", "training.warmup=0"])
    assert (spec.search.trials, spec.data.limit.train, spec.training.warmup) == (9, 2000, 0)
    assert problems(path, "search.trials=0", "search.trails=3", "seed", "name.x=1") == [
        "--set seed: must be KEY=VALUE with a dotted key. For example --set search.trials=3.",
        "--set name.x: name is 'good' and has nothing called 'x' inside.",
        "--set search.trials: must be a whole number ≥ 1, got 0.",
        "--set search.trails: unknown key. Did you mean trials?",
    ]


def test_an_override_may_be_a_list_or_a_mapping(write):
    spec = load_spec(write(GOOD), ["lora.targets=[query, value]", "search.pruner={kind: none}"])
    assert spec.lora.targets == ("query", "value")
    assert spec.search.pruner.kind == "none"


def test_variables_are_read_from_the_environment(write):
    text = GOOD.replace("{kind: embedded}", '{kind: files, train: "${D}/t.csv", test: "${E:-e}/x"}')
    spec = load_spec(write(text), environment={"D": "/data"})
    assert (spec.data.source.train, spec.data.source.test) == ("/data/t.csv", "e/x")
    assert problems(write(text)) == [
        "x.yaml:3 data.source.train: the environment variable D is not set, or empty. "
        "Run `export D=…`, or write ${D:-some/default}."
    ]


def test_a_missing_file_names_its_neighbour(write):
    path = write(GOOD)
    assert problems(path.with_name("y.yaml"))[0].startswith("y.yaml: there is no such file.")
    (path.parent / "quick.yaml").write_text(GOOD, encoding="utf-8")
    assert problems(path.with_name("quik.yaml"))[0].endswith("quick.yaml?")


def test_a_missing_file_here_names_what_is_here(write, monkeypatch):
    path = write(GOOD)
    monkeypatch.chdir(path.parent)
    assert problems(Path("nothing")) == [
        f"nothing: there is no such file. This folder holds {path.name}."
    ]


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n"])
def test_a_file_that_is_no_mapping_is_told_so(write, text):
    assert "must be a mapping of keys" in problems(write(text))[0]


def test_a_folder_and_bytes_that_are_no_text_are_told_apart(tmp_path):
    assert "is a folder" in problems(tmp_path)[0]
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"name: \xff\xfe")
    assert "is not UTF-8 text" in problems(binary)[0]


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "bom.yaml"
    path.write_text(GOOD, encoding="utf-8-sig")
    assert load_spec(path).name == "good"

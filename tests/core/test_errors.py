import pickle

import pytest

from lorasweep.core import errors
from lorasweep.core.errors import InputError, LoraSweepError, Problem, SpecError

EVERY = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, LoraSweepError)
]


def test_a_problem_reads_as_a_sentence():
    problem = Problem("sweeps/x.yaml:12 search.space.rank", "must be ≥ 1, got 0", "Raise it.")
    assert str(problem) == "sweeps/x.yaml:12 search.space.rank: must be ≥ 1, got 0. Raise it."


def test_a_question_gets_no_full_stop():
    assert str(Problem("", "is this a folder?")) == "is this a folder?"


def test_every_problem_is_told_on_a_line_of_its_own():
    error = SpecError([Problem("a", "one"), Problem("b", "two")])
    assert str(error) == "a: one.\nb: two."
    assert [problem.where for problem in error.problems] == ["a", "b"]


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_every_error_survives_a_process_boundary(kind):
    argument = Problem("here", "broke") if issubclass(kind, InputError) else "broke"
    error = kind(argument)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error)


@pytest.mark.parametrize("kind", EVERY, ids=lambda kind: kind.__name__)
def test_bad_input_exits_with_2_and_all_else_with_1(kind):
    assert kind.exit_code == (2 if issubclass(kind, InputError) else 1)
    assert issubclass(kind, ValueError) == issubclass(kind, InputError)

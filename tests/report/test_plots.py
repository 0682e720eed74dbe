from __future__ import annotations

from dataclasses import replace

import matplotlib as mpl
import pytest
from matplotlib.text import Text

from lorasweep.report import plots
from lorasweep.report.collect import collect
from lorasweep.report.drawing import png, shorten
from lorasweep.report.write import FIGURES

CASES = {
    "one trial": {"trials": 1},
    "sixty trials, twenty labels": {
        "trials": 60, "names": tuple(f"label {place}" for place in range(20)), "test_rows": 800,
    },
    "scripts and dollars": {"names": ("悪い", "$x_1$ and $y", "جيد"), "trials": 2, "test_rows": 40},
}  # fmt: skip


def words(figure) -> list[str]:  # type: ignore[no-untyped-def]
    png(figure)  # tick labels are there once it is drawn
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_every_figure_is_drawn_without_a_warning(make_sweep, case) -> None:  # type: ignore[no-untyped-def]
    findings = collect(make_sweep(**case))
    before = dict(mpl.rcParams)
    for draw in FIGURES.values():
        figure = draw(findings)
        assert figure is not None
        assert png(figure).startswith(b"\x89PNG")
        assert max(figure.get_size_inches()) < 25
    assert dict(mpl.rcParams) == before


def test_the_same_findings_give_the_same_bytes(make_sweep) -> None:  # type: ignore[no-untyped-def]
    drawn = [plots.hyperparameter_comparison(collect(make_sweep())) for _ in range(2)]
    assert png(drawn[0]) == png(drawn[1])  # type: ignore[arg-type]


def test_the_comparison_shows_every_scored_trial_and_what_varied(make_sweep) -> None:  # type: ignore[no-untyped-def]
    sweep = make_sweep(trials=6)
    figure = plots.hyperparameter_comparison(collect(sweep))
    assert figure is not None
    shown = words(figure)
    for trial in sweep.trials:
        row = {text for text in shown if text.endswith(f"#{trial.number}")}
        assert len(row) == (0 if trial.score is None else 1)
    assert {"learning rate", "epochs", "rank", "alpha"} <= set(shown)
    assert "validation f1 (1 without a score)" in shown
    # A value that all trials share has no panel.
    same = tuple(
        replace(one, parameters=dict(one.parameters) | {"rank": 8}) for one in sweep.trials
    )
    figure = plots.hyperparameter_comparison(collect(replace(sweep, trials=same)))
    assert "rank" not in words(figure)


def test_words_and_lists_can_be_sampled_too(make_sweep) -> None:  # type: ignore[no-untyped-def]
    sweep = make_sweep(trials=4)
    values = ("auto", ("query", "value"), "all-linear", None)
    mixed = tuple(
        replace(one, parameters={"targets": value})
        for one, value in zip(sweep.trials, values, strict=True)
    )
    shown = words(plots.hyperparameter_comparison(collect(replace(sweep, trials=mixed))))
    assert {"auto", "query+value", "None"} <= set(shown)


def test_the_confusion_matrix_holds_the_counts_of_both_models(make_sweep) -> None:  # type: ignore[no-untyped-def]
    findings = collect(make_sweep())
    assert findings.test is not None
    shown = words(plots.confusion_matrix(findings))
    assert {"fine-tuned", "baseline: tfidf", "negative", "positive"} <= set(shown)
    for row in findings.test.detail.confusion:
        for count in row:
            assert any(text.startswith(f"{count}\n") for text in shown)


def test_users_words_are_shown_as_they_are(make_sweep) -> None:  # type: ignore[no-untyped-def]
    sweep = make_sweep(names=("$a_1$", "b"))
    figure = plots.before_after(collect(sweep))
    assert figure is not None
    png(figure)
    texts = [text for text in figure.findobj(Text) if "$" in text.get_text()]
    assert texts
    assert not any(text.get_parse_math() for text in texts)


def test_nothing_to_draw_is_no_figure(make_sweep) -> None:  # type: ignore[no-untyped-def]
    findings = collect(make_sweep(test_rows=None, samples=(), history={}))
    assert plots.confusion_matrix(findings) is None
    assert plots.before_after(findings) is None
    assert plots.learning_curves(findings) is None


def test_shorten_makes_one_line() -> None:
    assert shorten("a\nb\t c\x00", 10) == "a b c "
    assert shorten("word " * 30, 12) == "word word w…"

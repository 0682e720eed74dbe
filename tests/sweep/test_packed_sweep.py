"""A whole sweep on the packed engine: the same trials, the same scores, safe to cut off."""

import numpy as np
import pytest

from lorasweep import run_sweep
from lorasweep.core.records import TrialState
from lorasweep.sweep.events import TrialEnded, TrialEvaluated, TrialReady, TrialStarted

POINTS = """\
  sampler:
    kind: points
    points:
      - {learning_rate: 0.01, epochs: 1, rank: 2}
      - {learning_rate: 0.02, epochs: 3, rank: 4}
      - {learning_rate: 0.005, epochs: 2, rank: 2, batch_size: 16}
      - {learning_rate: 0.03, epochs: 1, rank: 8, weight_decay: 0.1}
      - {learning_rate: 0.015, epochs: 2, rank: 4, warmup: 0.3}
"""


@pytest.fixture
def five_points(small_sweep):
    text = small_sweep.read_text(encoding="utf-8")
    head = text[: text.index("search:")].replace("model: {", "model: {base_dropout: 0, ")
    text = f"{head}lora: {{dropout: 0}}\nsearch:\n  trials: 5\n  pruner: {{kind: none}}\n{POINTS}"
    small_sweep.write_text(text, encoding="utf-8")
    return small_sweep


def histories(events):
    found = {}
    for event in events:
        if isinstance(event, TrialEvaluated):
            found.setdefault(event.number, []).append(event.metrics["loss"])
    return found


def test_both_engines_tell_the_same_story(five_points, monkeypatch):
    told = {}
    for engine in ("trainer", "packed"):
        place = five_points.parent / engine
        place.mkdir()
        monkeypatch.chdir(place)
        events = []
        overrides = [f"engine={engine}", "lanes=3"]
        result, report = run_sweep(five_points, overrides, listener=events.append)
        assert [r.state for r in result.records] == [TrialState.COMPLETED] * 5
        told[engine] = (result, histories(events), report.finished, events)
    one, two = told["trainer"], told["packed"]
    assert set(one[1]) == set(two[1]) == set(range(5))
    for number, losses in one[1].items():
        np.testing.assert_allclose(two[1][number], losses, atol=1e-3)
    assert one[0].best.number == two[0].best.number
    np.testing.assert_allclose(
        one[2].test["finetuned"].probabilities, two[2].test["finetuned"].probabilities, atol=1e-3
    )
    # Three at once, and a free place is filled while the longest of them still trains.
    lanes = [event.facts.lane for event in two[3] if isinstance(event, TrialReady)]
    assert set(lanes) == {0, 1, 2}
    started = [at for at, e in enumerate(two[3]) if isinstance(e, TrialStarted)]
    ended = {e.record.number: at for at, e in enumerate(two[3]) if isinstance(e, TrialEnded)}
    assert started[2] < min(ended.values()) < started[3] < ended[1]


def test_a_pack_cut_off_is_taken_up_and_ends_as_if_it_was_not(five_points, monkeypatch):
    straight, _ = run_sweep(five_points, ["engine=packed", "lanes=3"], report=False)
    place = five_points.parent / "cut"
    place.mkdir()
    monkeypatch.chdir(place)

    def cut(event):
        if isinstance(event, TrialEvaluated) and event.number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_sweep(five_points, ["engine=packed", "lanes=3"], listener=cut, report=False)
    resumed, _ = run_sweep(five_points, ["engine=packed", "lanes=2"], report=False)
    assert not [r for r in resumed.records if r.state is TrialState.RUNNING]
    counted = [r for r in resumed.records if r.state is not TrialState.INTERRUPTED]
    assert len(counted) < len(resumed.records)

    def by_point(records):
        return {str(sorted(r.parameters.items())): r.metrics["loss"] for r in records}

    one, two = by_point(straight.records), by_point(counted)
    assert set(one) == set(two)
    for point, loss in one.items():
        assert two[point] == pytest.approx(loss, abs=1e-3)

from dataclasses import replace

from lorasweep.cli.console import open_console, print_trials
from lorasweep.cli.views import LiveView, PlainView, QuietView, format_parameters
from lorasweep.core.outcomes import TrialFacts, TrialRecord, TrialState
from lorasweep.sweep.events import (
    LanesShrank,
    Said,
    SweepStarted,
    TrainingEnded,
    TrialEnded,
    TrialEvaluated,
    TrialReady,
    TrialStarted,
    TrialStepped,
    Warned,
)

POINT = {"learning_rate": 0.00031, "rank": 8, "targets": ("query", "key")}
RECORD = TrialRecord(
    number=3,
    state=TrialState.COMPLETED,
    parameters=POINT,
    score=0.8123,
    best_epoch=2,
    seconds=75.0,
)
FAILED = TrialRecord(
    number=4, state=TrialState.FAILED, parameters=POINT, reason="[red]the loss is NaN at step 7"
)
EVENTS = [
    Said("Opening the base"),
    Warned("validation: 5 of 100 texts leak"),
    SweepStarted("s", "f1", 5, (), "trainer"),
    TrialStarted(3, POINT, 2),
    TrialReady(3, TrialFacts(10, 100, 40, lane=1)),
    TrialStepped(3, 10, 40, 0.5),
    LanesShrank(1, "out of memory"),
    TrialEvaluated(3, 1, 2, 0.7, True),
    TrialEvaluated(3, 2, 2, 0.8123, True),
    TrialEnded(RECORD, RECORD),
    TrialStarted(4, POINT, 2),
    TrialEnded(FAILED, RECORD),
    TrainingEnded(),
]


def shown_by(view, capsys) -> tuple[str, str]:
    for event in EVENTS:
        view.show(event)
    view.close()
    view.close()
    captured = capsys.readouterr()
    return captured.out, captured.err


def test_plain_lines_tell_the_story_in_order(capsys):
    out, err = shown_by(PlainView(), capsys)
    assert out == ""
    assert err.splitlines() == [
        "Opening the base",
        "warning: validation: 5 of 100 texts leak",
        "s: 5 trials; engine trainer",
        "trial 0003: learning_rate 0.00031, rank 8, targets query+key",
        "warning: out of memory: going on with 1 lane",
        "trial 0003 epoch 1/2: 0.7000 *",
        "trial 0003 epoch 2/2: 0.8123 *",
        "trial 0003 completed 0.8123 in 1 min 15 s; best so far 0003",
        "trial 0004: learning_rate 0.00031, rank 8, targets query+key",
        "trial 0004 failed in 0 s: [red]the loss is NaN at step 7; best so far 0003",
    ]


def test_quiet_keeps_warnings(capsys):
    out, err = shown_by(QuietView(), capsys)
    assert out == ""
    assert err.splitlines() == [
        "warning: validation: 5 of 100 texts leak",
        "warning: out of memory: going on with 1 lane",
    ]


def test_the_live_view_ends_with_a_row_a_trial_and_the_best(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("LINES", "40")
    out, err = shown_by(LiveView(), capsys)
    assert out == ""
    assert "0003" in err
    assert "0004" in err
    assert "0.8123" in err
    assert "[red]the loss" in err  # a text in brackets is a text, not markup
    assert "best 0003: 0.8123" in err
    assert "2 of 5 trials" in err


def test_the_live_view_names_the_lane_of_a_trial_while_it_trains(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("LINES", "40")
    view = LiveView()
    view.show(SweepStarted("s", "f1", 5, (), "packed, 2 lanes, about 143 MiB each"))
    for number, lane in ((3, 0), (4, 1)):
        view.show(TrialStarted(number, POINT, 2))
        view.show(TrialReady(number, TrialFacts(10, 100, 40, lane=lane)))
    view.show(TrialEnded(RECORD, RECORD))
    view.close()
    last = capsys.readouterr().err.splitlines()
    (ended,) = (line for line in last if "✓ 0003" in line)
    (running,) = (line for line in last if "▸ 0004" in line)
    assert "lane" not in ended
    assert "lane 1" in running
    assert "packed, 2 lanes, about 143 MiB each" in "".join(last)
    assert "· now" not in "".join(last)


def test_the_live_view_says_that_there_are_fewer_lanes_now(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("LINES", "40")
    view = LiveView()
    view.show(SweepStarted("s", "f1", 5, (), "packed, 4 lanes"))
    view.show(TrialStarted(3, POINT, 2))
    for lanes in (2, 1):
        view.show(LanesShrank(lanes, "memory is running out"))
    view.close()
    told = capsys.readouterr().err
    assert "memory is running out: going on with 2 lanes" in told
    assert "packed, 4 lanes · now 1 lane" in told.splitlines()[-1]


def test_status_names_the_lanes_of_a_pack(capsys):
    running = TrialRecord(7, TrialState.RUNNING, POINT, seconds=75.0)
    print_trials((RECORD, running), RECORD, "f1", {7: 3, 3: None})
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "▸ 0007" in line)
    assert row.rstrip().endswith("lane 3")


def test_on_a_small_terminal_running_trials_come_before_ended_ones(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("LINES", "12")  # room for six rows
    view = LiveView()
    view.show(SweepStarted("s", "f1", 12, (), "packed, 2 lanes"))
    view.show(TrialStarted(0, POINT, 4))
    for number in range(1, 9):
        view.show(TrialStarted(number, POINT, 1))
        view.show(TrialEnded(replace(RECORD, number=number), RECORD))
    view.show(TrialStarted(9, POINT, 1))
    view.close()
    last = capsys.readouterr().err.splitlines()[-8:]
    shown = [line.split()[1] for line in last if line[:1] in "▸✓" and line.strip()]
    assert shown == ["0000", "0005", "0006", "0007", "0008", "0009"]
    assert "4 more trials not shown" in last[-1]


def test_a_trial_that_another_process_trains_is_told_as_far_as_it_is_known(capsys):
    running = TrialRecord(7, TrialState.RUNNING, POINT, score=0.61, best_epoch=1, seconds=75.0)
    print_trials((RECORD, running), RECORD, "f1")
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "▸ 0007" in line)
    assert "1 min 15 s" in row
    assert "running" in row
    assert "0.6100" in row


def test_json_events_are_strict(capsys):
    import json

    with open_console(quiet=False, as_json=True) as console:
        for event in EVENTS:
            console.listen(event)
        console.listen(TrialEvaluated(5, 1, 1, float("nan"), False, {"loss": float("inf")}))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["event"] for line in lines[:4]] == [
        "said",
        "warned",
        "sweep_started",
        "trial_started",
    ]
    assert lines[3]["parameters"] == {**POINT, "targets": ["query", "key"]}
    assert lines[-1]["score"] is None
    assert lines[-1]["metrics"] == {"loss": None}


def test_parameters_fit_a_line():
    assert format_parameters({"a": 1.23456e-05, "b": True, "c": None}) == "a 1.23e-05, b true, c "

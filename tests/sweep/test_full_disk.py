"""A disk that takes no more ends a command with a sentence, and costs no trial and no opening."""

import shutil
from contextlib import ExitStack, contextmanager, nullcontext

import pytest
from peft import PeftModel
from small_disk import room_for

from lorasweep import api, load_spec, report_sweep, run_sweep
from lorasweep.core.errors import Problem, StorageError
from lorasweep.core.outcomes import TrialState
from lorasweep.core.paths import sweep_paths
from lorasweep.engines import trainer
from lorasweep.executors import in_process
from lorasweep.search.study import Study
from lorasweep.sweep import finalists, worker
from lorasweep.sweep.events import TrialEnded, TrialEvaluated, Warned

ONE = ["search.trials=1"]


@pytest.fixture
def fill(monkeypatch):
    """``with fill(module, "write_whole", "spec.yaml")``: no room for what that writes there."""

    @contextmanager
    def make(module, writer, ending):
        write = getattr(module, writer)

        def tight(path, *content):
            with room_for(50) if path.name.endswith(ending) else nullcontext():
                write(path, *content)

        with monkeypatch.context() as patch:
            patch.setattr(module, writer, tight)
            yield

    return make


@pytest.mark.parametrize("overrides", [["engine=trainer"], ["engine=packed", "lanes=2"]], ids=str)
def test_no_trial_is_lost_to_a_full_disk(overrides, small_sweep, monkeypatch, runs_by_name):
    save, saved = PeftModel.save_pretrained, []

    def tight(self, folder, **kwargs):
        saved.append(folder)
        with room_for(2000) if len(saved) == 2 else nullcontext():
            save(self, folder, **kwargs)

    # Else this would be what finds no room, before the weights.
    monkeypatch.setattr(PeftModel, "create_or_update_model_card", lambda self, folder: None)
    monkeypatch.setattr(PeftModel, "save_pretrained", tight)
    with pytest.raises(StorageError, match="the adapter can't be written: File too large"):
        run_sweep(small_sweep, overrides, report=False)
    paths = sweep_paths("mlruns", "small")
    assert not list(paths.sweep.rglob("*.writing"))
    assert runs_by_name(load_spec(small_sweep))["small"].info.status == "KILLED"
    result, _ = run_sweep(small_sweep, overrides, report=False)
    states = [record.state for record in result.records]
    assert states.count(TrialState.COMPLETED) == 3
    assert set(states) == {TrialState.COMPLETED, TrialState.INTERRUPTED}


def test_a_spec_that_cannot_be_written_leaves_the_older_one_and_no_run_open(
    small_sweep, fill, runs_by_name
):
    run_sweep(small_sweep, ONE, report=False)
    written = sweep_paths("mlruns", "small").spec
    before = written.read_bytes()
    said = "the spec can't be written: File too large"
    with fill(worker, "write_whole", "spec.yaml"), pytest.raises(StorageError, match=said):
        run_sweep(small_sweep, report=False)
    assert written.read_bytes() == before
    assert runs_by_name(load_spec(small_sweep))["small"].info.status == "KILLED"


def test_a_trial_without_a_folder_is_tried_again(small_sweep, runs_by_name):
    paths = sweep_paths("mlruns", "small")
    trials = paths.trial(0).parent
    paths.sweep.mkdir(parents=True)
    trials.write_text("a file where the folder should be")
    with pytest.raises(StorageError, match="the folder of the trial can't be written"):
        run_sweep(small_sweep, ONE, report=False)
    assert runs_by_name(load_spec(small_sweep))["small"].info.status == "KILLED"
    trials.unlink()
    result, _ = run_sweep(small_sweep, ONE, report=False)
    states = [record.state for record in result.records]
    assert states == [TrialState.INTERRUPTED, TrialState.COMPLETED]


def test_a_traceback_that_cannot_be_written_is_said(small_sweep, fill, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("as it may be")

    monkeypatch.setattr(trainer, "attach", broken)
    said = "the traceback can't be written: File too large"
    with fill(worker, "write_whole", "traceback.txt"), pytest.raises(StorageError, match=said):
        run_sweep(small_sweep, ONE, report=False)


def test_a_disk_that_takes_nothing_at_all_hides_no_reason(
    small_sweep, monkeypatch, hear, runs_by_name
):
    """Neither the study nor the engine's ledger can be written where Ctrl-C comes."""

    def refuse(*arguments):
        raise StorageError(Problem("optuna.db", "can't be written: the disk is full"))

    heard = hear(stop_at=lambda event: isinstance(event, TrialEvaluated))
    with monkeypatch.context() as patch:
        patch.setattr(Study, "interrupt", refuse)
        patch.setattr(in_process.engine_ledger, "keep", refuse)
        with pytest.raises(KeyboardInterrupt):
            run_sweep(small_sweep, listener=heard, report=False)
    assert "The study can't be written" in heard.of(Warned)[-1].message
    spec = load_spec(small_sweep)
    assert {run.info.status for run in runs_by_name(spec).values()} == {"KILLED"}
    result, _ = run_sweep(small_sweep, report=False)
    states = [record.state for record in result.records]
    assert states == [TrialState.INTERRUPTED, *[TrialState.COMPLETED] * 3]


@pytest.mark.parametrize("overrides", [["engine=trainer"], ["engine=packed", "lanes=1"]], ids=str)
def test_a_base_that_is_gone_meanwhile_costs_no_trial(
    overrides, small_sweep, tmp_path, tiny_base_folder, hear
):
    base = shutil.copytree(tiny_base_folder(), tmp_path / "base")
    overrides = [*overrides, f"model.name={base}"]
    away = base.with_name("away")
    heard = hear()

    def unmount(event):
        heard(event)
        if isinstance(event, TrialEnded) and not away.exists():
            base.rename(away)

    if "engine=trainer" in overrides:
        with pytest.raises(StorageError, match="can't be read: "):
            run_sweep(small_sweep, overrides, listener=unmount, report=False)
        away.rename(base)
        result, _ = run_sweep(small_sweep, overrides, report=False)
        states = [record.state for record in result.records]
        assert states.count(TrialState.COMPLETED) == 3
        assert TrialState.FAILED not in states
    else:  # a pack has read it once, for all trials
        result, _ = run_sweep(small_sweep, overrides, listener=unmount, report=False)
        assert [record.state for record in result.records] == [TrialState.COMPLETED] * 3
    assert {event.record.state for event in heard.of(TrialEnded)} <= {
        TrialState.COMPLETED,
        TrialState.INTERRUPTED,
    }


def test_predictions_that_were_damaged_are_made_again(small_sweep):
    run_sweep(small_sweep, ONE)
    paths = sweep_paths("mlruns", "small")
    (paths.test / "finetuned.npz").write_bytes(b"\0" * 40)
    (paths.test / "majority.npz").write_bytes(b"")
    openings = report_sweep(small_sweep, ONE).finished.openings
    assert len(openings) == 2
    assert "no stored predictions belong to" in openings[-1]["reason"]
    assert len(report_sweep(small_sweep, ONE).finished.openings) == 2


@pytest.mark.parametrize(
    ("writer", "ending", "what"),
    [
        ("write_through", "majority.partial.npz", "the predictions on the test split"),
        ("write_whole", "ledger.jsonl", "the ledger of the test split"),
    ],
)
def test_numbers_that_nobody_saw_are_no_opening(writer, ending, what, small_sweep, fill, hear):
    run_sweep(small_sweep, ONE, report=False)
    said = f"{what} can't be written: File too large"
    with fill(finalists, writer, ending), pytest.raises(StorageError, match=said):
        report_sweep(small_sweep, ONE)
    assert list(sweep_paths("mlruns", "small").test.iterdir()) == []
    heard = hear()
    finished = report_sweep(small_sweep, ONE, listener=heard).finished
    assert [entry["reason"] for entry in finished.openings] == ["first opening"]
    assert not any("opened again" in warning.message for warning in heard.of(Warned))


def test_a_kill_between_the_ledger_and_the_predictions_is_an_opening_more(
    small_sweep, monkeypatch, hear
):
    run_sweep(small_sweep, ONE, report=False)
    enter = finalists.Finalists._enter

    def killed(self, models):
        enter(self, models)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(finalists.Finalists, "_enter", killed)
        with pytest.raises(KeyboardInterrupt):
            report_sweep(small_sweep, ONE)
    heard = hear()
    finished = report_sweep(small_sweep, ONE, listener=heard).finished
    assert len(finished.openings) == 2
    assert finished.openings[1]["reason"].startswith("the same winner again")
    assert any("opened again" in warning.message for warning in heard.of(Warned))


def test_no_room_for_a_copy_of_the_report_is_said(small_sweep, monkeypatch):
    run_sweep(small_sweep, ONE, report=False)
    out, documents = sweep_paths("mlruns", "small").report, api.documents
    with ExitStack() as disk, monkeypatch.context() as patch:

        def full(folder):
            disk.enter_context(room_for(50))
            return documents(folder)

        patch.setattr(api, "documents", full)
        with pytest.raises(StorageError, match="a copy of the report can't be written: File too"):
            report_sweep(small_sweep, ONE)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert len(report_sweep(small_sweep, ONE).finished.openings) == 1

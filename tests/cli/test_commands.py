"""The command line as a person or a script meets it: exit codes, streams, sentences."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lorasweep import run_sweep
from lorasweep.cli import failures
from lorasweep.cli.app import main


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_base_folder, small_reviews):
    """A folder with small.yaml, run to its report once for all tests that only look."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.yaml").write_text(
        f"""\
name: small
model: {{name: "{tiny_base_folder("bert")}", max_length: 32}}
data:
  source: {{kind: files, train: "{small_reviews}/train.csv", test: "{small_reviews}/test.csv"}}
  split: {{validation: 0.25, strategy: stratified}}
training: {{precision: fp32, epochs: 1}}
search: {{trials: 2, sampler: {{kind: points, points: [{{rank: 2}}, {{rank: 4}}]}}}}
baselines: [majority]
""",
        encoding="utf-8",
    )
    done = command(folder, "run", "small.yaml")
    assert done.returncode == 0, done.stderr
    return folder, done


def command(folder: Path, *words: str, **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "lorasweep", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        **more,
    )


def started(folder: Path, *words: str) -> subprocess.Popen:
    """A command in the background that can be interrupted, even where pytest itself can't."""
    return subprocess.Popen(
        [sys.executable, "-m", "lorasweep", *words],
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def test_run_prints_progress_on_stderr_and_the_result_on_stdout(finished):
    _, done = finished
    assert "trial 0000 epoch 1/1" in done.stderr
    assert "trial 0001 completed" in done.stderr
    assert "Winner:  trial" in done.stdout
    assert "majority" in done.stdout
    assert "p " in done.stdout
    assert "Report:  mlruns/sweeps/small/report/index.html" in done.stdout
    assert "Compare: lorasweep ui small.yaml" in done.stdout
    assert "\x1b" not in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_nothing_but_our_own_lines_reaches_the_terminal(finished):
    _, done = finished
    strange = [
        line
        for line in done.stderr.splitlines()
        if any(word in line.lower() for word in ("futurewarning", "it/s", "info ", "warning:"))
    ]
    assert strange == []


def test_run_again_reports_from_what_is_stored(finished):
    folder, first = finished
    again = command(folder, "run", "small.yaml", "--quiet")
    assert again.returncode == 0
    assert again.stderr == ""
    assert again.stdout == first.stdout


def test_json_lines_are_all_that_stdout_gets(finished):
    folder, _ = finished
    done = command(folder, "run", "small.yaml", "--json")
    events = [json.loads(line) for line in done.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[-1] == "finished"
    assert "sweep_started" in kinds
    assert events[-1]["best"]["number"] in (0, 1)
    assert Path(folder / events[-1]["results"]).exists()
    assert done.stderr == ""


def test_status_tells_states_best_and_places(finished):
    folder, _ = finished
    done = command(folder, "status", "small.yaml")
    assert done.returncode == 0
    assert "2 of 2 trials done (2 completed)" in done.stdout
    assert "report: " in done.stdout
    told = json.loads(command(folder, "status", "small.yaml", "--json").stdout)
    assert told["states"]["completed"] == 2
    assert told["best"]["score"] is not None


def test_export_and_predict_put_the_winner_to_work(finished, tmp_path):
    folder, _ = finished
    to = tmp_path / "model"
    done = command(folder, "export", "small.yaml", "--to", str(to))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(to)
    said = command(folder, "predict", str(to), "it was great", "it was dull")
    lines = [json.loads(line) for line in said.stdout.splitlines()]
    assert [line["text"] for line in lines] == ["it was great", "it was dull"]
    assert all(set(line["probabilities"]) == {"0", "1"} for line in lines)

    (tmp_path / "in.txt").write_text("it was great\n\nit was dull\n", encoding="utf-8")
    (tmp_path / "in.csv").write_text('id,text\n1,"it was great"\n2,it was dull\n', encoding="utf-8")
    for source in ("in.txt", "in.csv"):
        out = tmp_path / f"{source}.jsonl"
        done = command(tmp_path, "predict", str(to), "--file", source, "--output", str(out))
        assert done.returncode == 0, done.stderr
        assert not [path for path in tmp_path.iterdir() if path.name.endswith(".writing")]
        written = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
        assert [w["label"] for w in written] == [line["label"] for line in lines]
        assert ("1 blank line" in done.stderr) == (source == "in.txt")
    (tmp_path / "link").symlink_to("in.txt.jsonl")
    assert command(tmp_path, "predict", str(to), "fine", "--output", "link").returncode == 0
    assert (tmp_path / "link").is_symlink()
    assert "fine" in (tmp_path / "in.txt.jsonl").read_text(encoding="utf-8")
    piped = command(tmp_path, "predict", str(to), "--file", "-", input="it was great\n")
    assert json.loads(piped.stdout)["label"] == lines[0]["label"]


def test_predictions_overwrite_no_input_and_half_written_ones_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.txt").write_text("it was great\n", encoding="utf-8")
    (tmp_path / "old.jsonl").write_text("old", encoding="utf-8")
    for words, sentence in (
        (["--output", "in.txt"], "is the file that the texts are read from"),
        (["--output", "in.txt/out.jsonl"], "can't be written"),
        (["--output", "old.jsonl"], "there is no such folder"),  # of the model
    ):
        assert main(["predict", "nowhere", "--file", "in.txt", *words]) == 2
        told = capfd.readouterr().err
        assert sentence in told
        assert "Traceback" not in told
    assert (tmp_path / "in.txt").read_text(encoding="utf-8") == "it was great\n"
    assert (tmp_path / "old.jsonl").read_text(encoding="utf-8") == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "old.jsonl"]


def test_report_can_be_written_elsewhere(finished, tmp_path):
    folder, _ = finished
    done = command(folder, "report", "small.yaml", "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/index.html").exists()
    assert (tmp_path / "out/fine_tuning_results.json").exists()


def test_doctor_describes_the_machine_and_checks_what_the_spec_names(finished):
    folder, _ = finished
    done = command(folder, "doctor", "small.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    for word in ("torch", "memory", "bf16", "kernels", "disk", "data", "model", "tracking"):
        assert any(line.startswith(word) for line in done.stdout.splitlines()), word
    broken = command(folder, "doctor", "small.yaml", "--set", "data.source.train=nowhere.csv")
    assert broken.returncode == 1
    assert "data           FAILED" in broken.stdout
    assert "model          ok" in broken.stdout


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["rnu"], "Did you mean run?"),
        (["run"], "Missing argument 'SPEC'"),
        (["run", "nowhere.yaml"], "there is no such file"),
        (["run", "small.yaml", "--trials", "0"], "0 is not in the range"),
        (["run", "small.yaml", "--set", "search.trails=3"], "Did you mean trials?"),
        (["validate", "small.yaml", "--set", "data.text=txt"], "txt"),
        (["run", "small.yaml", "--set", "model.name=./nowhere"], "nowhere"),
        (["run", "small.yaml", "--set", "lora.targets=[qery]"], "query"),
        (["run", "small.yaml", "--set", "tracking.uri=http://127.0.0.1:9"], "127.0.0.1:9"),
        (["run", "small.yaml", "--set", "training.batch_size=4"], "training.batch_size"),
        (["run", "small.yaml", "--set", "output=/proc/nowhere"], "can't be written"),
        (["predict", "nowhere", "text"], "nowhere"),
        (["predict", "nowhere"], "give texts, or --file"),
        (
            ["ui", "small.yaml", "--set", "name=other", "--set", "output=elsewhere"],
            "does not exist",
        ),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(finished, monkeypatch, capfd, words, sentence):
    monkeypatch.chdir(finished[0])
    assert main(words) == 2
    told = capfd.readouterr().err
    assert sentence in told
    assert "Traceback" not in told
    assert told.splitlines()[-1].startswith("error: ")


def test_the_address_of_a_server_is_shown_without_its_password(finished, monkeypatch, capfd):
    monkeypatch.chdir(finished[0])
    assert main(["ui", "small.yaml", "--set", "tracking.uri=http://me:secret@hub:5000"]) == 0
    assert "its UI is at http://me:***@hub:5000" in capfd.readouterr().out


@pytest.mark.parametrize(
    "override",
    ["tracking.uri=http://me:secret@hub:5000", 'tracking={uri: "http://me:secret@hub:5000"}'],
)
def test_a_password_on_the_command_line_is_not_said_again(override, finished, monkeypatch, capfd):
    monkeypatch.chdir(finished[0])
    words = ["--set", "name=other", "--set", override]
    assert main(["status", "small.yaml", *words]) == 0
    told = capfd.readouterr().out
    assert override.replace("secret", "***") in told
    failures.report_failure(KeyboardInterrupt(), ["run", "small.yaml", *words])
    later = capfd.readouterr().err
    assert "go on where it stopped: lorasweep run" in later
    assert "secret" not in told + later


def test_a_space_that_is_used_up_is_done(small_sweep, monkeypatch, capfd):
    monkeypatch.chdir(small_sweep.parent)
    words = [
        "--set",
        "search.space={rank: {choices: [2, 4]}}",
        "--set",
        "search.sampler={kind: grid}",
        "--set",
        "search.trials=12",
    ]
    run_sweep(small_sweep, words[1::2], report=False)
    assert main(["status", str(small_sweep), *words]) == 0
    told = capfd.readouterr().out
    assert "2 of 12 trials done" in told
    assert "next: lorasweep report" in told
    assert "go on:" not in told


def test_validate_tells_every_error_of_the_data_and_writes_nothing(finished, tmp_path):
    bad = tmp_path / "bad.csv"
    bad.write_text("text,label\ngood film,1\nbad film\nfine,2,3\n", encoding="utf-8")
    folder, _ = finished
    before = sorted(folder.rglob("*"))
    done = command(folder, "validate", "small.yaml", "--set", f"data.source.train={bad}")
    assert done.returncode == 2
    assert "3" in done.stderr
    assert "4" in done.stderr
    assert sorted(folder.rglob("*")) == before


def test_a_sweep_that_was_not_run_is_no_traceback(finished, monkeypatch, capfd):
    monkeypatch.chdir(finished[0])
    assert main(["report", "small.yaml", "--set", "name=other"]) == 1
    assert "has not been run" in capfd.readouterr().err
    assert main(["status", "small.yaml", "--set", "name=other"]) == 0
    assert "not started" in capfd.readouterr().out


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "kill"])
def test_a_stopped_run_says_how_to_go_on_and_does(small_sweep, stop):
    spec = small_sweep
    process = started(spec.parent, "run", spec.name, "--set", "training.epochs=2")
    for line in process.stderr:
        if line.startswith("trial 0000 epoch 1"):
            process.send_signal(stop)
            break
    told = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 130
    assert "to go on where it stopped: lorasweep run small.yaml --set training.epochs=2" in (
        " ".join(told.replace("To go", "to go").split())
    )
    assert "trial 0000 interrupted" in told
    assert "Traceback" not in told
    done = command(spec.parent, "run", spec.name, "--set", "training.epochs=2", "--quiet")
    assert done.returncode == 0, done.stderr
    status = json.loads(command(spec.parent, "status", spec.name, "--json").stdout)
    assert status["states"]["completed"] == 3
    assert status["states"]["running"] == 0


def test_a_killed_run_goes_on_to_the_same_results(small_sweep, monkeypatch):
    """SIGKILL leaves no chance to tidy up: the next command does it."""
    spec = small_sweep
    straight = spec.parent / "straight"
    straight.mkdir()
    assert command(straight, "run", str(spec), "--quiet").returncode == 0
    process = started(spec.parent, "run", spec.name)
    for line in process.stderr:
        if line.startswith("trial 0001 epoch 1"):
            os.kill(process.pid, signal.SIGKILL)
            break
    process.stderr.close()
    process.wait(timeout=60)
    status = command(spec.parent, "status", spec.name)  # tells what nobody was left to write
    assert f"its process ({process.pid} on" in status.stdout
    states = json.loads(command(spec.parent, "status", spec.name, "--json").stdout)["states"]
    assert states["running"] == 0
    assert states["interrupted"] >= 1
    done = command(spec.parent, "run", spec.name)
    assert done.returncode == 0, done.stderr
    assert "was cut off earlier; it is tried again" in done.stderr
    scores = []
    for folder in (straight, spec.parent):
        file = folder / "mlruns/sweeps/small/report/fine_tuning_results.json"
        results = json.loads(file.read_text(encoding="utf-8"))
        trials = [
            (trial["config"], trial["score"])
            for trial in results["hyperparameter_experiments"]
            if trial["state"] != "interrupted"
        ]
        scores.append((trials, results["final_performance"]))
    assert scores[0] == scores[1]


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    told = capsys.readouterr().out
    for word in ("run", "status", "report", "export", "predict", "ui", "doctor", "validate"):
        assert f"  {word} " in told

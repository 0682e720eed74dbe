"""Opening a study: what is made, what is only looked at, and whose study is refused."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from lorasweep.core.errors import ConflictError, StorageError
from lorasweep.search.study import Study


def test_a_study_is_made_where_there_was_none_and_says_nothing(tmp_path, search, capfd):
    database = tmp_path / "a folder" / "with 100% #odd ?signs" / "optuna.db"
    study = Study.open(database, "sweep", search(), 1, {"data": "d"})
    assert study.ask().number == 0
    assert database.is_file()
    study.close()
    assert Study.peek(database, "sweep").records()[0].state == "running"
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_looking_at_a_study_that_isnt_there_makes_nothing(tmp_path, database):
    assert Study.peek(tmp_path / "none" / "optuna.db", "sweep") is None
    assert Study.peek(database, "sweep") is None
    assert not (tmp_path / "none").exists()
    assert optuna.get_all_study_names(f"sqlite:///{database}") == []


def test_another_spec_or_other_data_are_refused_by_name(search, open_study):
    before = {"data": "d" * 64, "base": "b", "search.space.rank": "[4]", "seed": "1"}
    after = {**before, "data": "e" * 64, "search.space.rank": "[8]"}
    open_study(search(), fingerprint=before)
    open_study(search(), fingerprint=before)
    with pytest.raises(ConflictError) as raised:
        open_study(search(), fingerprint=after)
    data, rank = raised.value.problems
    assert (data.where, rank.where) == ("data", "search.space.rank")
    assert "[4]" in rank.what
    assert "[8]" in rank.what
    assert "another name" in rank.advice
    assert raised.value.exit_code == 2
    open_study(search(), "another", fingerprint=after)


def test_a_study_that_was_deleted_and_begun_again_is_another_one(search, open_study, database):
    first = open_study(search()).id
    assert open_study(search()).id == first
    assert open_study(search(), "other").id != first
    optuna.delete_study(study_name="sweep", storage=f"sqlite:///{database}")
    assert open_study(search()).id != first


def test_a_study_of_another_program_is_refused(search, open_study, database):
    study = optuna.create_study(study_name="sweep", storage=f"sqlite:///{database}")
    study.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(ConflictError, match="another program"):
        open_study(search())


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to look at" * 40])
def test_a_file_that_is_no_database_is_named_in_a_sentence(tmp_path: Path, search, content):
    database = tmp_path / "optuna.db"
    database.write_bytes(content)
    with pytest.raises(StorageError, match="not a database") as raised:
        Study.open(database, "sweep", search(), 1, {})
    assert str(database) in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(StorageError):
        Study.peek(database, "sweep")


def test_a_folder_that_cant_be_made_is_named_in_a_sentence(tmp_path: Path, search):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="can't be used"):
        Study.open(tmp_path / "file" / "optuna.db", "sweep", search(), 1, {})

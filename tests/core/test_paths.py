import pytest

from lorasweep.core.errors import SpecError
from lorasweep.core.paths import run_name, sweep_paths


def test_everything_lies_below_the_output_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = sweep_paths("mlruns", "quick")
    places = [paths.mlflow_database, paths.optuna_database, paths.spec, paths.adapter(3)]
    assert all(place.is_relative_to(tmp_path / "mlruns") for place in places)
    assert paths.adapter(3) == tmp_path / "mlruns/sweeps/quick/trials/0003/adapter"


def test_a_link_that_leads_out_is_refused(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "mlruns/sweeps").mkdir(parents=True)
    (tmp_path / "mlruns/sweeps/quick").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(SpecError, match="leads out of"):
        sweep_paths(str(tmp_path / "mlruns"), "quick")


def test_run_names_sort_as_numbers():
    assert sorted(map(run_name, [10, 9, 100])) == ["0009", "0010", "0100"]


def test_sqlite_means_the_sweeps_own_database(tmp_path):
    paths = sweep_paths(str(tmp_path), "quick")
    assert paths.tracking_uri("sqlite") == f"sqlite:///{tmp_path}/mlflow.db"
    assert paths.tracking_uri("http://server:5000") == "http://server:5000"

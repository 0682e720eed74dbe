import subprocess
import sys

import pytest

import lorasweep


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after ``code``."""
    program = f"{code}\nimport sys; print(*{{m.partition('.')[0] for m in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_every_name_loads_and_is_listed():
    assert lorasweep.__all__ == sorted(lorasweep.__all__)
    assert set(lorasweep.__all__) == set(lorasweep._HOMES)
    for name in lorasweep.__all__:
        assert getattr(lorasweep, name).__name__ == name
        assert name in dir(lorasweep)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'sweep_run'"):
        lorasweep.sweep_run  # noqa: B018


def test_importing_the_package_loads_nothing_heavy():
    heavy = {"torch", "mlflow", "transformers", "optuna", "datasets", "pydantic", "sklearn"}
    assert not heavy & loaded_by("import lorasweep")


HELP = "from lorasweep.cli.app import main; assert main(['--help']) == 0"
VALIDATE = (
    "from lorasweep.cli.app import main\nassert main(['validate', 'sweeps/quickstart.yaml']) == 0"
)


@pytest.mark.parametrize("code", [HELP, VALIDATE], ids=["help", "validate"])
def test_help_and_validate_load_neither_torch_nor_mlflow(code, pytestconfig, monkeypatch):
    monkeypatch.chdir(pytestconfig.rootpath)
    assert not {"torch", "mlflow", "transformers"} & loaded_by(code)

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from lorasweep.tracking.environment import describe


def test_versions_and_machine() -> None:
    found = describe()
    assert json.loads(json.dumps(found)) == found
    assert {"torch", "transformers", "peft", "optuna", "mlflow"} <= found["versions"].keys()
    assert found["cores"] >= 1
    assert found["memory_gib"] > 0
    assert found["python"]
    assert found["cpu"]
    info = Path("/proc/cpuinfo")
    if info.exists() and "cpu family" in info.read_text(encoding="utf-8"):
        assert " (family " in found["cpu"]


def test_outside_a_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    found = describe(tmp_path)
    assert (found["git_commit"], found["git_dirty"]) == (None, None)


def test_without_git(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe()["git_commit"] is None


def test_commit_and_changes(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        done = subprocess.run(
            ["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    git("init", "-q")
    (tmp_path / "a").write_text("one")
    git("add", "a")
    git("commit", "-qm", "first")
    assert describe(tmp_path)["git_commit"] == git("rev-parse", "HEAD")
    assert describe(tmp_path)["git_dirty"] is False
    (tmp_path / "a").write_text("two")
    assert describe(tmp_path)["git_dirty"] is True

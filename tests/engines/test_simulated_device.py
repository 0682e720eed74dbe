"""On an accelerator a pack does what it does on the CPU, and no step makes the host wait."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SAME = 1e-5  # sums are taken in another order: padded products instead of grouped ones
ARCHITECTURES = ("bert", "distilbert", "roberta", "electra", "deberta-v2", "modernbert")
MINILM = "embedded/minilm 0.1"
MEAN = "modernbert-mean 0.1"  # its head reads the mean of a row's tokens
PACKS = (*(f"{name} {rate}" for name in ARCHITECTURES for rate in (0.1, 0.0)), MEAN, MINILM)

WAITS = {
    "item": "a number is read",
    "if": "a number is read",
    "tolist": "copy to the host",
    "nonzero": "nonzero",
    "where": "nonzero",
    "equal": "equal",
    "masked_select": "masked_select",
    "unique": "unique",
    "unique_consecutive": "unique",
    "bincount": "bincount",
    "index by mask": "index by mask",
    "write by mask": "index by mask",
    "index by list": "copy to the device",
    "repeats": "repeat_interleave without output_size",
    "to the host": "copy to the host",
    "write to the host": "copy to the host",
    "to the device": "copy to the device",
    "write to the device": "copy to the device",
    "list to the device": "copy to the device",
    "segments": "segment_reduce without unsafe",
    "backward": "a number is read",
}


@pytest.fixture(scope="module")
def report(
    tiny_base_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """What ``simulated_report.py`` tells of all packs: one process, since it adds a device."""
    mean = tmp_path_factory.mktemp("mean") / "base"
    shutil.copytree(tiny_base_folder("modernbert"), mean)
    config = json.loads((mean / "config.json").read_text())
    (mean / "config.json").write_text(json.dumps({**config, "classifier_pooling": "mean"}))
    paths = {name: str(tiny_base_folder(name)) for name in ARCHITECTURES}
    paths["modernbert-mean"] = str(mean)
    bases = {}
    for pack in PACKS:
        name, rate = pack.split()
        bases[pack] = (paths.get(name, name), float(rate))
    script = Path(__file__).with_name("simulated_report.py")
    # Compiled kernels serve only the CPU: without them both sides take the same way.
    found = subprocess.run(
        [sys.executable, script, tmp_path_factory.mktemp("simulated"), json.dumps(bases)],
        env={**os.environ, "LORASWEEP_KERNELS": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, found.stderr
    told: dict[str, Any] = json.loads(found.stdout)
    return told


@pytest.mark.parametrize("name", PACKS)
def test_a_pack_trains_there_as_on_the_cpu(name, report):
    """No tensor of the CPU meets one of the device: that would be an error, as on CUDA."""
    cpu, simulated = report["packs"][name]["cpu"], report["packs"][name]["simulated"]
    assert (cpu["error"], simulated["error"]) == ("", "")
    assert simulated["outcomes"] == cpu["outcomes"]
    assert [state for _, state, _, _ in cpu["outcomes"]] == ["completed"] * 5
    for numbers in ("steps", "logits"):
        assert simulated[numbers].keys() == cpu[numbers].keys()
        for trial, expected in cpu[numbers].items():
            np.testing.assert_allclose(
                simulated[numbers][trial], expected, rtol=SAME, atol=SAME, strict=True
            )


@pytest.mark.parametrize("name", PACKS)
def test_no_step_makes_the_host_wait(name, report):
    told = report["packs"][name]["simulated"]
    assert told["waits_in_steps"] == []
    # It did look: steps were made, and what is read between them was seen.
    assert told["pack_steps"] >= 10
    assert any("lorasweep/engines/lane_scoring.py" in wait for wait in told["waits_elsewhere"])


def test_a_wait_in_a_step_would_be_found_there(report):
    told = report["with_a_wait"]
    assert told["error"] == ""
    (wait,) = told["waits_in_steps"]
    assert wait.startswith("a number is read, lorasweep/engines/lane_adamw.py:")


@pytest.mark.parametrize(("operation", "kind"), WAITS.items())
def test_the_device_notes_what_the_host_waits_for(operation, kind, report):
    assert report["tried"][operation] == [kind]


def test_the_device_notes_nothing_else(report):
    fine = {name: told for name, told in report["tried"].items() if name.startswith("fine")}
    assert len(fine) >= 10
    assert set(map(str, fine.values())) == {"[]"}
    refused = {"two devices", "two devices in a product"}
    assert set(report["tried"]) == {*WAITS, *fine, *refused}


@pytest.mark.parametrize("operation", ["two devices", "two devices in a product"])
def test_the_device_refuses_tensors_of_the_cpu(operation, report):
    assert "on simulated and on the CPU" in report["tried"][operation]


def test_the_checks_for_a_gpu_can_be_collected_and_want_one():
    """They run on no machine of ours: at least they must not fall behind what they import."""
    checks = Path(__file__).with_name("cuda_checks.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-k", "there_is_a_gpu", checks],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    assert "test_there_is_a_gpu - assert []" in done.stdout

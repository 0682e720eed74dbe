"""What every test shares: quiet, offline, single-threaded libraries, and the real data's folder."""

from __future__ import annotations

import os
from pathlib import Path

# Before torch, transformers or mlflow are imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    MLFLOW_DISABLE_TELEMETRY="true",
    DO_NOT_TRACK="true",
    MPLBACKEND="agg",
)

import pytest


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets. Unset: skip, but never in CI."""
    folder = os.environ.get("LORASWEEP_DATA")
    if folder:
        path = Path(folder).resolve()
        if path.is_dir():
            return path
        pytest.fail(f"LORASWEEP_DATA names {path}, which is not a folder")
    if os.environ.get("CI"):
        pytest.fail("CI must export LORASWEEP_DATA")
    pytest.skip("LORASWEEP_DATA is not set")

"""What only a GPU can show: ``LORASWEEP_TEST_DEVICE=cuda pytest tests/engines/cuda_checks.py``.

Not among the tests that are collected, since a test that finds no GPU would have to fail.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from recorder import Recorder

from lorasweep.core.plans import AdapterPlan, EngineSettings
from lorasweep.engines.lane_adamw import LaneAdamW, adamw
from lorasweep.engines.pack_run import PackRun
from lorasweep.engines.packed import PackedEngine
from lorasweep.model import grouped_products
from lorasweep.model.transfer import OnItsWay, on_device
from lorasweep.model.varlen_proof import proven_options

DEVICES = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]


def test_there_is_a_gpu():
    assert DEVICES


@pytest.fixture(params=DEVICES, ids=str)
def device(request: pytest.FixtureRequest) -> torch.device:
    return request.param


def test_arrays_go_there_and_numbers_come_back(device):
    arrays = [np.arange(5), np.zeros((0, 3), np.float32), np.arange(7, dtype=np.int16) % 3 == 0]
    there = on_device(arrays, device)
    for array, tensor in zip(arrays, there, strict=True):
        np.testing.assert_array_equal(tensor.cpu().numpy(), array, strict=True)
    values = torch.zeros(2, 3, device=device)
    way = OnItsWay(values)
    values += torch.ones(4096, 4096, device=device).sum() / 4096**2  # takes a while
    way.send()
    assert way.read() == [[1.0] * 3] * 2


def test_the_update_is_compiled(device):
    assert LaneAdamW(device)._arithmetic is not adamw


@pytest.mark.parametrize("window", [None, 64])
def test_attention_is_the_flash_kernels(device, window):
    assert proven_options(device, torch.bfloat16, 12, 32, window) is not None


def test_grouped_products_are_used_where_torch_has_a_kernel(device):
    assert grouped_products.grouped_differs(device, torch.bfloat16) == ""
    has_it = torch.cuda.get_device_capability(device) in grouped_products._WITH_KERNEL
    assert grouped_products._proven_on(device, torch.bfloat16) is has_it


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("architecture", ["bert", "deberta-v2", "modernbert"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("base_dropout", [0.0, 0.1])
def test_no_step_makes_the_host_wait(
    device: torch.device,
    architecture: str,
    precision: str,
    base_dropout: float,
    open_tiny: Callable,
    splits: tuple,
    make_plan: Callable,
):
    base = open_tiny(architecture, base_dropout=base_dropout)
    settings = EngineSettings(precision=precision, device=str(device), log_every=1)
    engine = PackedEngine(base, *splits, settings, 2)
    plans = [make_plan(n, seed=n, adapter=AdapterPlan(2 * n, 8.0, 0.1)) for n in (1, 2)]
    run = PackRun(engine, iter(plans), Recorder())
    list(run._fill())
    run.steps.take()  # compiles, and tries kernels out
    try:
        torch.cuda.set_sync_debug_mode("error")
        run.steps.take()
        run.steps.take()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert engine.adamw._arithmetic is not adamw  # it would be, had it waited

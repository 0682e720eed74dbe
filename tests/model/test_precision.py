"""Which precision ``auto`` means, on processors that this machine may not have."""

from __future__ import annotations

import pytest
import torch

from lorasweep.core.errors import ModelError
from lorasweep.model import precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("flags", "onednn", "expected"),
    [
        ({"avx2", "avx512f", "avx512_bf16"}, True, "bf16"),
        ({"avx512f", "amx_bf16", "amx_tile"}, True, "bf16"),
        ({"asimd", "bf16"}, True, "bf16"),  # ARM
        ({"avx2", "avx512f"}, True, "fp32"),  # oneDNN would emulate it
        ({"avx512_bf16"}, False, "fp32"),  # a build of torch without it
        (set(), True, "fp32"),
    ],
)
def test_auto_takes_bf16_where_the_processor_multiplies_it(flags, onednn, expected, monkeypatch):
    monkeypatch.setattr(precision, "_cpu_flags", lambda: frozenset(flags))
    monkeypatch.setattr(
        torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn, raising=False
    )
    assert precision.resolve("auto", CPU) == expected
    assert precision.resolve("fp32", CPU) == "fp32"
    assert precision.resolve("bf16", CPU) == "bf16"


def test_the_flags_of_this_machine_are_read():
    flags = precision._cpu_flags()
    assert isinstance(flags, frozenset)
    if torch.cpu._is_avx512_bf16_supported():
        assert "avx512_bf16" in flags


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert precision.pick_device("auto") == precision.pick_device("cpu") == CPU
    for name in ("cuda:0", "cuda"):
        with pytest.raises(ModelError, match="torch sees 0 CUDA devices"):
            precision.pick_device(name)
    for name in ("tpu", "mps", "cuda:x"):
        with pytest.raises(ModelError, match="must be auto, cpu or cuda:N"):
            precision.pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert precision.pick_device("auto") == torch.device("cuda", 0)
    assert precision.pick_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ModelError, match="torch sees 2 CUDA devices"):
        precision.pick_device("cuda:2")

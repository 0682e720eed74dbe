"""Arrays on their way to a device, and numbers on their way back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorasweep.model import transfer
from lorasweep.model.transfer import OnItsWay, on_device

CPU = torch.device("cpu")
ARRAYS = [
    np.arange(5),
    np.zeros((0, 3), np.float32),
    np.arange(7, dtype=np.int16),
    np.arange(6).reshape(2, 3).T,  # not contiguous
    np.array([True, False, True]),
    np.array([[1.5, np.nan]]),
    np.float32([[-1.0]]),
]


def test_on_the_cpu_arrays_are_not_copied():
    array = np.arange(3)
    (tensor,) = on_device([array], CPU)
    tensor[1] = 7
    assert array.tolist() == [0, 7, 2]


def test_elsewhere_they_all_go_in_one_transfer(monkeypatch):
    class Elsewhere:
        """Any device but the CPU, by its name; the numbers stay where they are."""

        type = "elsewhere"

    copies = []

    def to(self: torch.Tensor, device: object, non_blocking: bool) -> torch.Tensor:
        assert isinstance(device, Elsewhere)
        copies.append((self.dtype, non_blocking))
        return self.clone()

    monkeypatch.setattr(torch.Tensor, "to", to)
    found = on_device(ARRAYS, Elsewhere())
    assert copies == [(torch.uint8, True)]
    for array, tensor in zip(ARRAYS, found, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array, strict=True)


def test_numbers_are_read_as_the_device_left_them():
    values = torch.zeros(2, 2)
    way = OnItsWay(values)
    values[1] = torch.tensor([1.0, torch.inf])
    way.send()
    assert way.read() == [[0.0, 0.0], [1.0, float("inf")]]


@pytest.mark.parametrize("array", ARRAYS)
def test_types_have_torchs_names(array):
    assert transfer._type_of(array) == torch.from_numpy(array.copy()).dtype

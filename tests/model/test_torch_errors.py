"""What torch's exceptions mean."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit, InternalTorchDynamoError

from lorasweep.model.torch_errors import first_line, is_of_the_compiler, is_out_of_memory


@pytest.mark.parametrize(
    ("error", "out"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("could not create a primitive descriptor for a matmul primitive"), False),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("Triton Error [CUDA]: out of memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_says_that_memory_ran_out(error, out):
    assert is_out_of_memory(error) is out


@pytest.mark.parametrize(
    ("error", "its"),
    [
        (FailOnRecompileLimitHit("too many"), True),
        (InternalTorchDynamoError("it broke"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (torch.OutOfMemoryError("CUDA out of memory"), False),
    ],
)
def test_what_is_the_compilers_fault(error, its):
    assert is_of_the_compiler(error) is its


def test_one_line_says_what_it_was():
    assert first_line(ValueError("so\nand so")) == "ValueError: so"
    assert first_line(ValueError("")) == "ValueError"

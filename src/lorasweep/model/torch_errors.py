"""What torch's exceptions mean, where their types don't say it."""

from __future__ import annotations

import re
from typing import Any

import torch

# What has no exception of its own: torch's allocator on a CPU; oneDNN without room for the code of
# a product (one that it can't do at all, it says before that, of the primitive's descriptor);
# CUDA's driver and Triton, when they load code or pin memory; cuBLAS, also where a full device has
# no room for its handle.
_SAID = re.compile(
    r"can't allocate memory|could not create a primitive$|CUDA.*: out of memory"
    r"|CUBLAS_STATUS_ALLOC_FAILED|CUBLAS_STATUS_NOT_INITIALIZED"
)


def is_out_of_memory(error: Any) -> bool:
    """Whether an exception says that memory ran out."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_SAID.search(str(error)))


def is_of_onednns_code(error: Exception) -> bool:
    """Whether oneDNN found no room for the code of a product or activation."""
    return isinstance(error, RuntimeError) and str(error).endswith("could not create a primitive")


def is_of_the_device(error: Exception) -> bool:
    """Whether the accelerator itself failed: every later call to it fails as well."""
    return isinstance(error, torch.AcceleratorError)


def is_of_the_compiler(error: Exception) -> bool:
    """Whether ``torch.compile`` failed before any compiled code ran."""
    from torch._dynamo import exc  # torch itself loads it only where something is compiled

    return isinstance(error, exc.TorchDynamoException | exc.FailOnRecompileLimitHit)


def first_line(error: Exception) -> str:
    """Return an exception's type and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".rstrip(": ")

"""Tensors behind which there is nothing: whoever reads or writes further is killed."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor


def at_the_end_of_memory(tensor: Tensor) -> Tensor:
    """Copy a tensor to where the next byte may be neither read nor written."""
    page = mmap.PAGESIZE
    room = -(-tensor.nbytes // page) * page
    pages = mmap.mmap(-1, room + page)
    at = ctypes.addressof(ctypes.c_char.from_buffer(pages))
    if ctypes.CDLL(None).mprotect(ctypes.c_void_p(at + room), ctypes.c_size_t(page), 0):
        raise OSError("mprotect failed")
    flat = torch.frombuffer(
        pages, dtype=tensor.dtype, count=tensor.numel(), offset=room - tensor.nbytes
    )
    return flat.view(tensor.shape).copy_(tensor)

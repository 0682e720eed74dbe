"""Attention inside rows by torch's own flash kernel for rows of unequal length, on CUDA.

One launch serves all rows, without padding (Dao 2023, arXiv:2307.08691). It takes no dropout mask
from outside. Whether it works at all depends on the device and on torch's version and build, so
it is used only where :mod:`lorasweep.model.varlen_proof` has seen it work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def varlen_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    starts: Tensor,
    longest: int,
    window: int | None,
    options: Mapping[str, Any],
) -> Tensor:
    """Attend inside each row.

    Args:
        query: ``(tokens, heads, width)``; or ``(rows, heads, width)``, each row's first token
            only, which takes no window: the kernel would count it from the row's end.
        key: ``(tokens, heads, width)``.
        value: As ``key``.
        scaling: Of the scores.
        starts: Where each row begins, and the end of the last; int32 ``(rows + 1,)``.
        longest: Tokens of the longest row.
        window: One more than how far a token sees in either direction; None for all.
        options: From :func:`lorasweep.model.varlen_proof.proven_options`.

    Returns:
        A tensor of ``query``'s shape.

    Raises:
        ImportError: This version of torch has no such kernel.
        TypeError: It has one that takes other arguments.
        RuntimeError: It doesn't run on this device, or not with these tensors.
    """
    # Here, since not every torch has it that the project runs with.
    from torch.nn.attention.varlen import varlen_attn

    asking, most = starts, longest
    if len(query) != len(key):
        asking, most = torch.arange(len(starts), device=starts.device, dtype=torch.int32), 1
    seen = -1 if window is None else window - 1

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Any = varlen_attn(
            q,
            k,
            v,
            cu_seq_q=asking,
            cu_seq_k=starts,
            max_q=most,
            max_k=longest,
            scale=scaling,
            window_size=(seen, seen),
            **options,
        )
        return found

    # Any strides will do but that between a head's own elements.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    if not torch.is_grad_enabled():
        return call(q, k, v)
    result: Tensor = Repeatable.apply(call, q, k, v)
    return result


class Repeatable(torch.autograd.Function):
    """A function of tensors whose gradients are the same, bit by bit, each time.

    The kernel adds up a long row's gradients in any order, unless torch as a whole is told to
    keep to one; so it is told for the time of this backward pass.
    """

    @staticmethod
    def forward(ctx: Any, call: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """Return what ``call`` returns for the tensors."""
        inputs = [x.detach().requires_grad_() for x in given]
        with torch.enable_grad():
            out = call(*inputs)
        ctx.inner = out, inputs
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the tensors' gradients."""
        out, inputs = ctx.inner
        del ctx.inner  # the memory is wanted before the whole graph goes
        with _one_order():
            return (None, *torch.autograd.grad(out, inputs, grads[0].contiguous()))


@contextmanager
def _one_order() -> Iterator[None]:
    """Have torch add up in the same order each time."""
    settings: Any = torch.utils.deterministic
    mode, filled = torch.get_deterministic_debug_mode(), settings.fill_uninitialized_memory
    torch.set_deterministic_debug_mode("error")
    settings.fill_uninitialized_memory = False  # by launches that nobody needs
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = filled
        torch.set_deterministic_debug_mode(mode)

"""The compiled loops of ``csrc/``, called with torch's tensors."""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_SUFFIX = {torch.float32: "float", torch.bfloat16: "bf16"}
TYPES = frozenset(_SUFFIX)


class _Rows(ctypes.Structure):
    _fields_ = [
        ("rows", c_int64),
        ("first", c_void_p),
        ("length", c_void_p),
        ("query_first", c_void_p),
        ("query_count", c_void_p),
    ]


class _Attending(ctypes.Structure):
    _fields_ = [
        ("heads", c_int64),
        ("width", c_int64),
        ("scaling", c_float),
        ("window", c_int64),
        ("streams", c_void_p),
        ("key", c_int64),
        ("rate", c_int32),
    ]


class _Lanes(ctypes.Structure):
    _fields_ = [("lanes", c_int64), ("ends", c_void_p)]


class _Matrices(ctypes.Structure):
    _fields_ = [("at", c_void_p), ("lane", c_int64), ("row", c_int64), ("column", c_int64)]


class _Product(ctypes.Structure):
    _fields_ = [
        ("out", c_void_p),
        ("out_row", c_int64),
        ("x", c_void_p),
        ("x_row", c_int64),
        ("scale", c_void_p),
        ("add", c_int),
        ("depth", c_int64),
        ("columns", c_int64),
    ]


class _Outer(ctypes.Structure):
    _fields_ = [
        ("out", c_void_p),
        ("left", c_void_p),
        ("left_row", c_int64),
        ("narrow", c_int64),
        ("right", c_void_p),
        ("right_row", c_int64),
        ("wide", c_int64),
    ]


@dataclass(frozen=True, slots=True)
class RowPlaces:
    """Where rows lie among tokens, and who asks; int64, ``(rows,)`` each, on the CPU.

    Attributes:
        first: The token with which each row starts.
        length: Its tokens.
        query_first: Where its queries start.
        query_count: How many of its first tokens ask.
        gaps: Tokens that belong to no row, int64 ``(gaps,)``; None for none.
        query_gaps: The same of queries.
    """

    first: Tensor
    length: Tensor
    query_first: Tensor
    query_count: Tensor
    gaps: Tensor | None = None
    query_gaps: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Attending:
    """How attention is done.

    Attributes:
        scaling: Of the scores.
        window: One more than how far a token sees in either direction; 0 for all.
        streams: int64, ``(tokens,)``: of each token as a query; None for no dropout.
        key: Of the dropout.
        rate: Byte values that drop, of 256.
    """

    scaling: float
    window: int = 0
    streams: Tensor | None = None
    key: int = 0
    rate: int = 0


class Kernels:
    """The loaded library."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._multiplies = bool(self._library.lane_products_there())

    def drop(
        self, x: Tensor, streams: Tensor, key: int, rate: int | Tensor, scale: float, out: Tensor
    ) -> None:
        """Write ``x`` where kept, times ``scale``, and 0 where dropped.

        Args:
            x: ``(entries, width)``, contiguous.
            streams: int64, ``(entries,)``.
            key: Of the module.
            rate: Byte values that drop, of 256; or int16 of each entry.
            scale: Of what is kept.
            out: As ``x``; may be ``x``.
        """
        each = rate if isinstance(rate, Tensor) else None
        self._call("drop", x.dtype)(
            _at(out),
            _at(x),
            c_int64(streams.numel()),
            c_int64(x.numel() // max(1, streams.numel())),
            _at(streams),
            c_int64(key),
            _at(each),
            c_int32(0 if isinstance(rate, Tensor) else rate),
            c_float(scale),
            c_int(torch.get_num_threads()),
        )

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rows: RowPlaces, how: Attending
    ) -> tuple[Tensor, Tensor]:
        """Attend inside each row.

        Args:
            query: ``(queries, heads, width)``.
            key: ``(tokens, heads, width)``.
            value: As ``key``.
            rows: Where rows lie.
            how: Scaling, window, dropout.

        Returns:
            A tensor like ``query``, 0 in the gaps, and what :meth:`attend_backward` wants:
            float32, ``(queries, heads)``.
        """
        out = _blank(query, rows.query_gaps)
        sums = torch.empty(query.shape[:2], dtype=torch.float32)
        self._attend("attend", (out, sums), query, key, value, rows, how)
        return out, sums

    def attend_backward(
        self,
        grad: Tensor,
        sums: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: RowPlaces,
        how: Attending,
        key_wanted: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the gradients of query, key (None unless wanted) and value; 0 in the gaps."""
        of_query, of_value = _blank(query, rows.query_gaps), _blank(value, rows.gaps)
        of_key = _blank(key, rows.gaps) if key_wanted else None
        arrays = (of_query, of_key, of_value, grad.contiguous(), sums)
        self._attend("attend_backward", arrays, query, key, value, rows, how)
        return of_query, of_key, of_value

    def multiplies(self, x: Tensor, matrices: Tensor) -> bool:
        """Whether :meth:`product` takes such operands, on such a processor."""
        return (
            self.sums(x)
            and matrices.dtype == torch.bfloat16
            and 1 in matrices.stride()[1:]
            and x.shape[1] % 2 == 0
        )

    def sums(self, *operands: Tensor) -> bool:
        """Whether :meth:`outer` takes such operands, on such a processor."""
        return self._multiplies and all(
            x.dtype == torch.bfloat16 and x.stride(1) == 1 for x in operands
        )

    def product(
        self,
        x: Tensor,
        matrices: Tensor,
        ends: Tensor,
        scaling: Tensor | None,
        onto: Tensor | None,
    ) -> Tensor:
        """Multiply each lane's rows with its own matrix.

        Args:
            x: bfloat16, ``(rows, in)``, an even number of columns side by side.
            matrices: bfloat16, ``(lanes, in, out)``; rows or columns lie side by side.
            ends: One past each lane's last row, int32, ``(lanes,)``.
            scaling: Of each row of the result, ``(rows, 1)``; None for none.
            onto: What the result is added to in place, columns side by side; None for nothing.

        Returns:
            bfloat16, ``(rows, out)``.
        """
        rows, (lanes, depth, columns) = len(x), matrices.shape
        out = x.new_empty(rows, columns) if onto is None else onto
        # The loop reads and writes by these sizes: another one would be somebody else's memory.
        _expect(x.shape[1] == depth, "columns of x", x.shape[1], depth)
        _expect_ends(ends, lanes, rows)
        _expect(out.shape == (rows, columns), "room", tuple(out.shape), (rows, columns))
        _expect(out.dtype == x.dtype, "type of room", out.dtype, x.dtype)
        _expect(out.stride(1) == 1, "numbers from column to column of the room", out.stride(1), 1)
        _expect(scaling is None or scaling.numel() == rows, "scaling's numbers", scaling, rows)
        scale = None if scaling is None else scaling.float().contiguous()
        wanted = _Product(
            _at(out),
            out.stride(0),
            _at(x),
            x.stride(0),
            _at(scale),
            onto is not None,
            depth,
            columns,
        )
        weights = _Matrices(_at(matrices), *matrices.stride())
        done = self._library.lane_product_bf16(
            ctypes.byref(wanted),
            ctypes.byref(weights),
            ctypes.byref(_Lanes(lanes, _at(ends))),
            c_int(torch.get_num_threads()),
        )
        if not done:
            raise MemoryError(f"no memory to multiply by {tuple(matrices.shape)}")
        return out

    def outer(self, narrow: Tensor, wide: Tensor, ends: Tensor) -> Tensor:
        """Sum each lane's outer products.

        Args:
            narrow: bfloat16, ``(rows, n)``, columns side by side.
            wide: bfloat16, ``(rows, m)``, columns side by side.
            ends: As above.

        Returns:
            float32, ``(lanes, n, m)``.
        """
        _expect(len(narrow) == len(wide), "rows", len(narrow), len(wide))
        _expect_ends(ends, len(ends), len(narrow))
        shape = len(ends), narrow.shape[1], wide.shape[1]
        out = torch.empty(shape, dtype=torch.float32, device=narrow.device)
        wanted = _Outer(
            _at(out),
            _at(narrow),
            narrow.stride(0),
            narrow.shape[1],
            _at(wide),
            wide.stride(0),
            wide.shape[1],
        )
        done = self._library.lane_outer_bf16(
            ctypes.byref(wanted),
            ctypes.byref(_Lanes(len(ends), _at(ends))),
            c_int(torch.get_num_threads()),
        )
        if not done:
            raise MemoryError(f"no memory for sums over {len(narrow)} rows")
        return out

    def _attend(
        self,
        name: str,
        arrays: tuple[Tensor | None, ...],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        rows: RowPlaces,
        how: Attending,
    ) -> None:
        inputs = [x if x.stride(2) == 1 else x.contiguous() for x in (query, key, value)]
        strides = (c_int64 * 6)(*(x.stride(axis) for x in inputs for axis in (0, 1)))
        places = (rows.first, rows.length, rows.query_first, rows.query_count)
        laid = _Rows(len(rows.first), *map(_at, places))
        asked = _Attending(
            query.shape[1],
            query.shape[2],
            how.scaling,
            how.window,
            _at(how.streams),
            how.key,
            how.rate,
        )
        done = self._call(name, query.dtype)(
            *map(_at, arrays),
            *map(_at, inputs),
            strides,
            ctypes.byref(laid),
            ctypes.byref(asked),
            c_int(torch.get_num_threads()),
        )
        if not done:
            raise MemoryError(f"no memory for attention over rows of {int(rows.length.max())}")

    def _call(self, name: str, dtype: torch.dtype) -> Any:
        return getattr(self._library, f"{name}_{_SUFFIX[dtype]}")


def _blank(like: Tensor, gaps: Tensor | None) -> Tensor:
    """Make room for as many numbers; the kernels write all but the gaps."""
    room = torch.empty(like.shape, dtype=like.dtype)
    return room if gaps is None else room.index_fill_(0, gaps, 0)


def _expect_ends(ends: Tensor, lanes: int, rows: int) -> None:
    _expect(ends.dtype == torch.int32, "type of the lanes' ends", ends.dtype, torch.int32)
    _expect(ends.is_contiguous(), "lanes' ends", "scattered", "side by side")
    _expect(len(ends) == lanes, "lanes", len(ends), lanes)
    _expect(lanes == 0 or int(ends[-1]) == rows, "the last lane's end", ends[-1:].tolist(), rows)


def _expect(holds: bool, what: str, found: object, expected: object) -> None:
    if not holds:
        raise ValueError(f"{what}: expected {expected}, got {found}")


def _at(tensor: Tensor | None) -> c_void_p | None:
    return None if tensor is None else c_void_p(tensor.data_ptr())

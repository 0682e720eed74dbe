"""The compiled loops of ``csrc/``, called with torch's tensors."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
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


class _Dropping(ctypes.Structure):
    _fields_ = [("streams", c_void_p), ("key", c_int64), ("rates", c_void_p), ("rate", c_int32)]


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
        ("of_x", POINTER(_Dropping)),
        ("of_product", POINTER(_Dropping)),
        ("depths", c_void_p),
        ("widths", c_void_p),
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
        ("of_right", POINTER(_Dropping)),
        ("narrows", c_void_p),
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


@dataclass(slots=True)
class Dropping:
    """What dropout leaves out of ``(entries, width)``.

    Attributes:
        streams: int64, ``(entries,)``.
        key: Of the module.
        rate: Byte values that drop, of 256: one number, or int16 of each entry, ``(entries, 1)``.
    """

    streams: Tensor
    key: int
    rate: int | Tensor

    @property
    def rates(self) -> tuple[Tensor | None, int]:
        """The rate of each entry, or None and the one of all."""
        return (self.rate, 0) if isinstance(self.rate, Tensor) else (None, self.rate)


class Kernels:
    """The loaded library."""

    def __init__(self, library: Path) -> None:
        self._library = ctypes.CDLL(str(library))
        self._multiplies = bool(self._library.lane_products_there())

    def drop(self, x: Tensor, mask: Dropping, scale: float, out: Tensor) -> None:
        """Write ``x`` where kept, times ``scale``, and 0 where dropped.

        Args:
            x: ``(entries, width)``, contiguous.
            mask: What is dropped.
            scale: Of what is kept.
            out: As ``x``; may be ``x``.
        """
        entries, (each, one) = mask.streams.numel(), mask.rates
        self._call("drop", x.dtype)(
            _at(out),
            _at(x),
            c_int64(entries),
            c_int64(x.numel() // max(1, entries)),
            _at(mask.streams),
            c_int64(mask.key),
            _at(each),
            c_int32(one),
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
        scaling: Tensor | None = None,
        onto: Tensor | None = None,
        x_mask: Dropping | None = None,
        mask: Dropping | None = None,
        depths: Tensor | None = None,
        widths: Tensor | None = None,
    ) -> Tensor:
        """Multiply each lane's rows with its own matrix.

        Args:
            x: bfloat16, ``(rows, in)``, an even number of columns side by side.
            matrices: bfloat16, ``(lanes, in, out)``; rows or columns lie side by side.
            ends: One past each lane's last row, int32, ``(lanes,)``.
            scaling: Of each row of the result, ``(rows, 1)``; None for none.
            onto: What the result is added to in place, columns side by side; None for nothing.
            x_mask: Of dropout on ``x``; None for none.
            mask: Of dropout on the product, before it is added; None for none.
            depths: Rows of each lane's matrix that aren't all 0: the first ones; int32,
                ``(lanes,)``; None for all.
            widths: The same of its columns.

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
        if scaling is not None:
            _expect(scaling.numel() == rows, "scaling's numbers", scaling.numel(), rows)
        _expect_within(depths, lanes, depth)
        _expect_within(widths, lanes, columns)
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
            _dropping(x_mask, rows),
            _dropping(mask, rows),
            _at(depths),
            _at(widths),
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

    def outer(
        self,
        narrow: Tensor,
        wide: Tensor,
        ends: Tensor,
        wide_mask: Dropping | None = None,
        narrows: Tensor | None = None,
    ) -> Tensor:
        """Sum each lane's outer products.

        Args:
            narrow: bfloat16, ``(rows, n)``, columns side by side.
            wide: bfloat16, ``(rows, m)``, columns side by side.
            ends: As above.
            wide_mask: Of dropout on ``wide``; None for none.
            narrows: Columns of ``narrow`` that aren't all 0, of each lane: the first ones; int32,
                ``(lanes,)``; None for all.

        Returns:
            float32, ``(lanes, n, m)``.
        """
        _expect(len(narrow) == len(wide), "rows", len(narrow), len(wide))
        _expect_ends(ends, len(ends), len(narrow))
        _expect_within(narrows, len(ends), narrow.shape[1])
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
            _dropping(wide_mask, len(wide)),
            _at(narrows),
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


def _dropping(mask: Dropping | None, rows: int) -> Any:
    if mask is None:
        return None
    each, one = mask.rates
    for what, x, dtype in (
        ("streams", mask.streams, torch.int64),
        ("rates", each, torch.int16),
    ):
        if x is not None:
            _expect(x.numel() == rows, what, x.numel(), rows)
            _expect(x.dtype == dtype, f"type of {what}", x.dtype, dtype)
            _expect(x.is_contiguous(), what, "scattered", "side by side")
    return ctypes.pointer(_Dropping(_at(mask.streams), mask.key, _at(each), one))


def _expect_ends(ends: Tensor, lanes: int, rows: int) -> None:
    _expect(ends.dtype == torch.int32, "type of the lanes' ends", ends.dtype, torch.int32)
    _expect(ends.is_contiguous(), "lanes' ends", "scattered", "side by side")
    _expect(len(ends) == lanes, "lanes", len(ends), lanes)
    _expect(lanes == 0 or int(ends[-1]) == rows, "the last lane's end", ends[-1:].tolist(), rows)


def _expect_within(sizes: Tensor | None, lanes: int, most: int) -> None:
    if sizes is not None:
        _expect(sizes.dtype == torch.int32, "type of sizes", sizes.dtype, torch.int32)
        _expect(sizes.is_contiguous(), "sizes", "scattered", "side by side")
        _expect(len(sizes) == lanes, "sizes", len(sizes), lanes)
        found: list[int] = sizes.tolist()
        _expect(all(0 <= size <= most for size in found), "sizes", found, f"0 to {most}")


def _expect(holds: bool, what: str, found: object, expected: object) -> None:
    if not holds:
        raise ValueError(f"{what}: expected {expected}, got {found}")


def _at(tensor: Tensor | None) -> c_void_p | None:
    return None if tensor is None else c_void_p(tensor.data_ptr())

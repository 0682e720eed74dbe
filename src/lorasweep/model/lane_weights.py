"""The weights and moments of all lanes, one row of one matrix each.

A lane's whole state is its row in three matrices (weights, first and second moments), so a
refill writes a row, an optimizer step is a handful of operations for all lanes, and whatever
goes wrong in one lane stays in its row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Blocks start on multiples of this many numbers: grouped products on CUDA want 16 bytes.
_ALIGNED = 8


@dataclass(frozen=True, slots=True)
class Block:
    """One parameter's place in a lane's row.

    Attributes:
        name: The parameter's name.
        shape: As all lanes hold it; a lane may fill less of it and leaves the rest zero.
        decays: Whether weight decay applies.
    """

    name: str
    shape: tuple[int, ...]
    decays: bool = True

    @property
    def size(self) -> int:
        """Numbers in it."""
        return int(torch.Size(self.shape).numel())

    def widened(self, other: Block) -> Block:
        """Return a block that both fit into."""
        shape = tuple(max(pair) for pair in zip(self.shape, other.shape, strict=True))
        return Block(self.name, shape, self.decays)


@dataclass(slots=True)
class LaneState:
    """A lane's weights and moments outside the pack, by parameter name, unpadded to no lane.

    Attributes:
        weights, first, second: The parameters and AdamW's moments of them.
    """

    weights: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]


class LaneWeights:
    """Trainable weights of all lanes, with gradients and AdamW's moments.

    Attributes:
        blocks: Name to block, in layout order.
        weights, gradients, first, second: float32, ``(lanes, numbers a lane)``.
        decays: 1 where weight decay applies, ``(numbers a lane,)``.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device = device
        self.dtype = dtype
        self.blocks: dict[str, Block] = {}
        self._offsets: dict[str, int] = {}
        self._width = 0
        self._parameters: dict[str, Tensor] = {}
        self._owned: list[dict[str, Block]] = []
        self._allocate(0)

    @property
    def lanes(self) -> int:
        """How many lanes there are."""
        return int(self.weights.shape[0])

    @property
    def width(self) -> int:
        """Numbers a lane, alignment included."""
        return self._width

    def parameter(self, name: str) -> Tensor:
        """Return all lanes' values of a parameter, ``(lanes, *shape)``; a leaf with a gradient."""
        return self._parameters[name]

    def gradient(self, name: str) -> Tensor:
        """Return all lanes' collected gradients of a parameter, ``(lanes, *shape)``."""
        return self._view(self.gradients, name)

    def __contains__(self, name: str) -> bool:
        return name in self.blocks

    def add(self, blocks: Iterable[Block], weights: Mapping[str, Tensor]) -> int:
        """Append a lane with fresh moments and return its number.

        Args:
            blocks: Its parameters; the layout grows when it doesn't hold them yet.
            weights: Its first values by name; smaller than the block where padded.
        """
        state = LaneState(dict(weights), {}, {})
        return self.restore(blocks, state)

    def restore(self, blocks: Iterable[Block], state: LaneState) -> int:
        """Append a lane that was taken out before, and return its number."""
        self._owned.append({block.name: block for block in blocks})
        self._lay_out(list(range(self.lanes)))
        lane = self.lanes - 1
        for matrix, values in (
            (self.weights, state.weights),
            (self.first, state.first),
            (self.second, state.second),
        ):
            for name, value in values.items():
                self._view(matrix, name)[lane][_corner(value.shape)] = value
        return lane

    def state(self, lane: int, shapes: Mapping[str, torch.Size]) -> LaneState:
        """Copy a lane's weights and moments, cut to the lane's own shapes."""
        found = [
            {
                name: self._view(matrix, name)[lane][_corner(shape)].clone()
                for name, shape in shapes.items()
            }
            for matrix in (self.weights, self.first, self.second)
        ]
        return LaneState(*found)

    def keep(self, lanes: list[int]) -> None:
        """Keep only these lanes, renumbered in the order given, and no block of the others."""
        self._owned = [self._owned[lane] for lane in lanes]
        self._lay_out(lanes)

    def collect_gradients(self) -> None:
        """Move what backward left at the parameters into :attr:`gradients`.

        Autograd could write there directly but for a warning about strided gradients, and a
        parameter that took no part must count as zero.
        """
        for name, parameter in self._parameters.items():
            view = self._view(self.gradients, name)
            if parameter.grad is None:
                view.zero_()
            else:
                view.copy_(parameter.grad)
                parameter.grad = None

    def drop_gradients(self) -> None:
        """Forget what an unfinished backward pass left behind."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def gradient_norms(self) -> Tensor:
        """Norm of each lane's whole gradient, head included: ``(lanes,)``."""
        return torch.linalg.vector_norm(self.gradients, dim=1)

    def _lay_out(self, lanes: list[int]) -> None:
        """Make room for what the lanes own, and move the given old lanes to the front."""
        index = torch.tensor(lanes, dtype=torch.int64, device=self.device)
        old = [
            {name: self._view(matrix, name).index_select(0, index) for name in self.blocks}
            for matrix in (self.weights, self.first, self.second)
        ]
        wanted: dict[str, Block] = {}
        for block in (block for owned in self._owned for block in owned.values()):
            known = wanted.get(block.name)
            wanted[block.name] = block if known is None else known.widened(block)
        self.blocks, self._offsets, at = wanted, {}, 0
        for name, block in wanted.items():
            self._offsets[name] = at
            at += -(-block.size // _ALIGNED) * _ALIGNED
        self._width = at
        self._allocate(len(self._owned))
        for matrix, values in zip((self.weights, self.first, self.second), old, strict=True):
            for name in values.keys() & wanted.keys():
                value = values[name]
                new = self._view(matrix, name)
                # What a block loses is padding of lanes that left.
                corner = _corner(map(min, value.shape[1:], new.shape[1:]))
                new[(slice(len(lanes)), *corner)] = value[(slice(None), *corner)]

    def _allocate(self, lanes: int) -> None:
        def zeros() -> Tensor:
            return torch.zeros(lanes, self._width, device=self.device, dtype=self.dtype)

        self.weights, self.gradients, self.first, self.second = (zeros() for _ in range(4))
        self.decays = torch.zeros(self._width, device=self.device, dtype=self.dtype)
        self._parameters = {}
        for name, block in self.blocks.items():
            offset = self._offsets[name]
            self.decays[offset : offset + block.size] = float(block.decays)
            self._parameters[name] = self._view(self.weights, name).detach().requires_grad_()

    def _view(self, matrix: Tensor, name: str) -> Tensor:
        block, offset = self.blocks[name], self._offsets[name]
        return matrix[:, offset : offset + block.size].unflatten(1, block.shape)


def _corner(shape: Iterable[int]) -> tuple[slice, ...]:
    """Index the first entries along each dimension."""
    return tuple(slice(n) for n in shape)

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

from lorasweep.model.torch_errors import is_out_of_memory

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


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each parameter lies in a lane's row.

    Attributes:
        blocks: Name to block, in the order in which they lie.
        offsets: Name to the block's first number.
        width: Numbers a lane, alignment included.
    """

    blocks: dict[str, Block]
    offsets: dict[str, int]
    width: int

    @classmethod
    def of(cls, owned: Iterable[Mapping[str, Block]]) -> Layout:
        """Lay out what some lanes own, each block as wide as any of them needs it."""
        blocks: dict[str, Block] = {}
        for block in (block for lane in owned for block in lane.values()):
            known = blocks.get(block.name)
            blocks[block.name] = block if known is None else known.widened(block)
        offsets, at = {}, 0
        for name, block in blocks.items():
            offsets[name] = at
            at += -(-block.size // _ALIGNED) * _ALIGNED
        return cls(blocks, offsets, at)

    def view(self, matrix: Tensor, name: str) -> Tensor:
        """Return a parameter's part of ``(lanes, width)`` as ``(lanes, *shape)``."""
        block, offset = self.blocks[name], self.offsets[name]
        return matrix[:, offset : offset + block.size].unflatten(1, block.shape)


@dataclass(slots=True)
class LaneState:
    """A lane's weights and moments outside the pack, by parameter name, unpadded to no lane.

    Attributes:
        weights, first, second: The parameters and AdamW's moments of them, on the CPU.
    """

    weights: dict[str, Tensor]
    first: dict[str, Tensor]
    second: dict[str, Tensor]


class LaneWeights:
    """Trainable weights of all lanes, with gradients and AdamW's moments.

    Lanes come and go whole or not at all: where memory runs out, all is as it was.

    Attributes:
        weights, gradients, first, second: float32, ``(lanes, numbers a lane)``.
        decays: 1 where weight decay applies, ``(numbers a lane,)``.
    """

    weights: Tensor
    gradients: Tensor
    first: Tensor
    second: Tensor
    decays: Tensor
    _parts: dict[tuple[int, range], dict[str, Tensor]]
    _first_sizes: dict[str, Tensor]

    def __init__(self, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
        self.device = device
        self.dtype = dtype
        layout = Layout.of(())
        self._adopt([], layout, self._decays(layout), [self._zeros(0, 0) for _ in range(4)])

    @property
    def blocks(self) -> dict[str, Block]:
        """Name to block, in layout order."""
        return self._layout.blocks

    @property
    def lanes(self) -> int:
        """How many lanes there are."""
        return int(self.weights.shape[0])

    @property
    def width(self) -> int:
        """Numbers a lane, alignment included."""
        return self._layout.width

    def part(self, lanes: range, number: int = 0) -> dict[str, Tensor]:
        """Return all parameters of some lanes, ``(lanes, *shape)`` each; leaves with gradients.

        Args:
            lanes: Whose.
            number: Parts of another number have leaves of their own, so that several passes may
                go back at the same time, also if a lane is in more than one of them.
        """
        if (number, lanes) not in self._parts:
            rows = self.weights[lanes.start : lanes.stop]
            self._parts[number, lanes] = {
                name: self._layout.view(rows, name).detach().requires_grad_()
                for name in self.blocks
            }
        return self._parts[number, lanes]

    def first_sizes(self, name: str, lanes: range) -> Tensor:
        """Return how much of a parameter's first dimension some lanes own; the rest is 0.

        Args:
            name: The parameter's.
            lanes: Whose.

        Returns:
            int32, ``(lanes,)``, on the CPU; 0 where a lane has no such parameter.
        """
        if name not in self._first_sizes:
            sizes = [owned[name].shape[0] if name in owned else 0 for owned in self._owned]
            self._first_sizes[name] = torch.tensor(sizes, dtype=torch.int32)
        return self._first_sizes[name][lanes.start : lanes.stop]

    def gradient(self, name: str) -> Tensor:
        """Return all lanes' collected gradients of a parameter, ``(lanes, *shape)``."""
        return self._layout.view(self.gradients, name)

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
        before = self.lanes
        owned = [*self._owned, {block.name: block for block in blocks}]
        layout, matrices = self._moved(list(range(before)), owned)
        for matrix, values in zip(
            matrices, (state.weights, state.first, state.second), strict=False
        ):
            # A whole row in one copy: an accelerator needs room beside it for parts.
            row = torch.zeros(1, layout.width, dtype=self.dtype)
            for name, value in values.items():
                layout.view(row, name)[0][_corner(value.shape)] = value
            matrix[before:].copy_(row)
        self._adopt(owned, layout, self._decays(layout), matrices)
        return before

    def state(self, lane: int, shapes: Mapping[str, torch.Size]) -> LaneState:
        """Copy a lane's weights and moments to the CPU, cut to the lane's own shapes.

        It takes no memory of an accelerator: that may have run out.
        """
        matrices = (self.weights, self.first, self.second)
        return LaneState(*(self._cut(matrix, lane, shapes) for matrix in matrices))

    def values(self, lane: int, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
        """Copy a lane's weights alone, as :meth:`state` does."""
        return self._cut(self.weights, lane, shapes)

    def _cut(
        self, matrix: Tensor, lane: int, shapes: Mapping[str, torch.Size]
    ) -> dict[str, Tensor]:
        row = matrix[lane : lane + 1].cpu()
        return {
            name: self._layout.view(row, name)[0][_corner(shape)].clone()
            for name, shape in shapes.items()
        }

    def keep(self, lanes: list[int]) -> None:
        """Keep only these lanes, renumbered in the order given, and no block of the others.

        Where there is no memory for that, lanes that stay in their order move up in the
        memory that is there, and its other blocks and rows go the next time.
        """
        owned = [self._owned[lane] for lane in lanes]
        try:
            layout, matrices = self._moved(lanes, owned)
            decays = self._decays(layout)
        except Exception as error:
            if lanes != sorted(lanes) or not is_out_of_memory(error):
                raise
            layout, decays, matrices = self._layout, self.decays, self._moved_up(lanes)
        self._adopt(owned, layout, decays, matrices)

    def collect_gradients(self) -> None:
        """Move what backward left at the parameters into :attr:`gradients`.

        Autograd could write there directly but for a warning about strided gradients, and a
        parameter that took no part must count as zero.
        """
        self.gradients.zero_()
        # In the order of the parts, not in that in which threads came to them: sums round.
        for (_, lanes), leaves in sorted(self._parts.items(), key=lambda part: part[0][0]):
            rows = self.gradients[lanes.start : lanes.stop]
            for name, parameter in leaves.items():
                if parameter.grad is not None:
                    self._layout.view(rows, name).add_(parameter.grad)
        self.drop_gradients()

    def drop_gradients(self) -> None:
        """Forget what an unfinished backward pass left behind."""
        # Other parts won't come back as they were: rows are cut elsewhere in every step.
        whole = (0, range(self.lanes))
        self._parts = {which: part for which, part in self._parts.items() if which == whole}
        for parameter in self._parts.get(whole, {}).values():
            parameter.grad = None

    def gradient_norms(self) -> Tensor:
        """Norm of each lane's whole gradient, head included: ``(lanes,)``."""
        return torch.linalg.vector_norm(self.gradients, dim=1)

    def _moved(
        self, lanes: list[int], owned: list[dict[str, Block]]
    ) -> tuple[Layout, list[Tensor]]:
        """Make room for what lanes own, and copy the given old lanes to the front of it.

        Returns:
            The layout, and weights, first and second moments and gradients by it.
        """
        layout = Layout.of(owned)
        matrices = [self._zeros(len(owned), layout.width) for _ in range(4)]
        index = torch.tensor(lanes, dtype=torch.int64, device=self.device)
        old = (self.weights, self.first, self.second)
        for name in self.blocks.keys() & layout.blocks.keys():
            for matrix, before in zip(matrices, old, strict=False):
                new = layout.view(matrix, name)
                value = self._layout.view(before, name).index_select(0, index)
                # What a block loses is padding of lanes that left.
                corner = _corner(map(min, value.shape[1:], new.shape[1:]))
                new[(slice(len(lanes)), *corner)] = value[(slice(None), *corner)]
        return layout, matrices

    def _moved_up(self, lanes: list[int]) -> list[Tensor]:
        """Do :meth:`_moved` for ascending lanes in the memory that is there, as laid out now."""
        matrices = [self.weights, self.first, self.second]
        for new, old in enumerate(lanes):
            for matrix in matrices:
                if new != old:
                    matrix[new].copy_(matrix[old])
        # Between blocks, a lane that left may have left what is no number.
        matrices.append(self.gradients.zero_())
        return [matrix[: len(lanes)] for matrix in matrices]

    def _decays(self, layout: Layout) -> Tensor:
        decays = torch.zeros(layout.width, device=self.device, dtype=self.dtype)
        for name, block in layout.blocks.items():
            offset = layout.offsets[name]
            decays[offset : offset + block.size] = float(block.decays)
        return decays

    def _adopt(
        self,
        owned: list[dict[str, Block]],
        layout: Layout,
        decays: Tensor,
        matrices: list[Tensor],
    ) -> None:
        """Take over what was made for these lanes; it takes no memory for numbers itself."""
        self._owned, self._layout, self.decays = owned, layout, decays
        self.weights, self.first, self.second, self.gradients = matrices
        self._parts, self._first_sizes = {}, {}

    def _zeros(self, lanes: int, width: int) -> Tensor:
        return torch.zeros(lanes, width, device=self.device, dtype=self.dtype)


def _corner(shape: Iterable[int]) -> tuple[slice, ...]:
    """Index the first entries along each dimension."""
    return tuple(slice(n) for n in shape)

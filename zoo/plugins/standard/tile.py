"""How a tensor of rows is cut into tiles, one program a tile: [rows, width] in tiles of [ROWS, BLOCK].

Every kernel of the elementwise side takes ``WIDTH``, ``ROWS`` and ``BLOCK`` as constants and the number of rows at run time, and
waits for its inputs by itself (``zoo.plugins.overlap``).
Columns are masked against a constant width, so that a width that is a multiple of 8 keeps accesses of 16 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from zoo.errors import CompileError
from zoo.plugins.kernels import Arg, CudaNode, Kernel, Launch, Size, TensorRef, fixed

ELEMENTS = 2048  # of a tile: 16 for each thread of 4 warps
WIDEST = 32768  # columns that a program which needs a whole row can hold: 32 for each thread of 32 warps


def matrix(tensor: TensorRef) -> tuple[Size, int]:
    """A tensor as rows of a constant width: [1, T, E] -> (T, E), and [T], whose width is no constant, -> (T, 1)."""
    if tensor.shape and isinstance(tensor.shape[-1], int):
        return tensor.rows, tensor.shape[-1]
    return TensorRef(tensor.name, tensor.dtype, (*tensor.shape, 1)).rows, 1


@dataclass(frozen=True)
class Tiles:
    """The tiles of one launch: how many, how large, and the warps that work on one."""

    rows: Size
    width: int
    height: int
    block: int
    warps: int

    def launch(
        self,
        source: str,
        tensors: Sequence[tuple[str, TensorRef]],
        numbers: Sequence[tuple[str, str, Arg]] = (),
        **constants: int | float | bool | str,
    ) -> Launch:
        """A launch over these tiles.

        tensors    (parameter, tensor) in the order of the kernel's parameters
        numbers    (parameter, Triton type, value), behind the tensors and before ``rows``
        constants  besides WIDTH, ROWS and BLOCK
        """
        kernel = Kernel(
            source,
            (
                *((name, tensor.pointer) for name, tensor in tensors),
                *((name, kind) for name, kind, _ in numbers),
                ("rows", "i32"),
            ),
            (*constants.items(), ("WIDTH", self.width), ("ROWS", self.height), ("BLOCK", self.block)),
            num_warps=self.warps,
            overlaps=True,
        )
        grid = (Size(self.rows.symbol, self.rows.times, self.height), fixed(-(-self.width // self.block)), fixed(1))
        return Launch(kernel, grid, (*(tensor.name for _, tensor in tensors), *(value for *_, value in numbers), self.rows))


def tiles(tensor: TensorRef) -> Tiles:
    """Tiles for work on single elements: a row may be cut."""
    rows, width = matrix(tensor)
    block = min(_power_of_two(width), ELEMENTS)
    return Tiles(rows, width, ELEMENTS // block, block, 4)


def row_tiles(node: CudaNode, tensor: TensorRef) -> Tiles:
    """Tiles of whole rows, for what is summed over them. Raises CompileError for a row that is too wide."""
    rows, width = matrix(tensor)
    block = _power_of_two(width)
    if block > WIDEST:
        raise CompileError(f"{node.name}: {node.op} over {width} columns; the cuda target has kernels for up to {WIDEST}")
    warps = int(node.tuning.get("row_warps", min(max(block // 512, 4), 32)))
    return Tiles(rows, width, max(1, ELEMENTS // 2 // block), block, warps)


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()

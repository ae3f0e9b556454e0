"""Tile sizes and tensor descriptors of kernel launches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor


@dataclass(frozen=True)
class TileSizes:
    """Tile sizes and launch options of a kernel."""

    queries: int
    keys: int
    num_warps: int
    stages: int
    max_registers: int | None = None

    def launch(self) -> dict[str, int]:
        """Launch options; the interpreter rejects `maxnreg`."""
        options = {"num_warps": self.num_warps}
        if self.max_registers is not None and not knobs.runtime.interpret:
            options["maxnreg"] = self.max_registers
        return options


def descriptor(states: Tensor, size: int, columns: int) -> TensorDescriptor:
    """TMA descriptor of [..., length, dimensions] states, for tiles of `size` tokens of one head."""
    block = [1] * (states.ndim - 2) + [size, columns]
    return TensorDescriptor(states, list(states.shape), list(states.stride()), block)

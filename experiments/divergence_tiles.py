"""Times the two kernels of stage 1's loss in other tile shapes, for the heads of one layer.

`python experiments/divergence_tiles.py --length 131072 --output tiles.json`
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtpurbo.benchmarks.timing import CudaClock, measure
from rtpurbo.config import AttentionRule
from rtpurbo.ops.packed import indexer_divergence
from rtpurbo.ops.triton.training import divergence

HEADS, HEAD_DIM, INDEX_DIM = 5, 128, 16
# Query rows, keys, warps, stages, registers of a thread (None: as many as the compiler likes).
ROW_TILES = [
    (128, 64, 8, 2, 128),
    (128, 64, 8, 3, 128),
    (128, 64, 8, 2, None),
    (128, 32, 8, 3, 128),
    (128, 128, 8, 2, None),
    (64, 64, 4, 2, 168),
]
COLUMN_TILES = [
    (64, 128, 8, 2, 128),
    (64, 128, 8, 3, 128),
    (64, 128, 8, 2, None),
    (32, 128, 8, 3, 128),
    (128, 128, 8, 2, None),
    (64, 64, 4, 2, 168),
]


@contextmanager
def tiles(name: str, shape: tuple[Any, ...]) -> Iterator[None]:
    """Lets one of the kernels have this shape."""
    kind = getattr(divergence, name)
    before = kind.__dict__["choose"]
    kind.choose = classmethod(lambda cls, *_: cls(*shape))
    try:
        yield
    finally:
        kind.choose = before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--length", type=int, action="append")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    found = []
    for length in arguments.length or [49152, 131072]:
        run = problem(length)
        for reading in ("paper", "residual"):
            for name, shapes in (("RowTiles", ROW_TILES), ("ColumnTiles", COLUMN_TILES)):
                for shape in shapes:
                    entry = time(run, reading, name, shape) | {"length": length}
                    found.append(entry)
                    print(entry, flush=True)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def problem(length: int) -> Callable[[str], tuple[Tensor, Tensor]]:
    """The loss of random heads: a function of the reading that returns losses and index keys."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)

    def draw(size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(HEADS, length, size, generator=generator, device=device).to(dtype)

    queries, keys = (draw(HEAD_DIM, torch.bfloat16) for _ in range(2))
    index_queries, index_keys = (draw(INDEX_DIM, torch.float32).requires_grad_() for _ in range(2))
    rows = torch.arange(length, device=device)

    def run(reading: str) -> tuple[Tensor, Tensor]:
        losses = indexer_divergence(
            queries, keys, torch.arange(HEADS, device=device), index_queries, index_keys, rows,
            torch.zeros_like(rows), AttentionRule(reading=reading), scaling=HEAD_DIM**-0.5,
        )  # fmt: skip
        return losses, index_keys

    return run


def time(
    run: Callable[[str], tuple[Tensor, Tensor]], reading: str, name: str, shape: tuple[Any, ...]
) -> dict[str, Any]:
    """Milliseconds of a sweep in this shape."""
    entry = {"kernel": name, "reading": reading, "shape": shape}
    try:
        with tiles(name, shape):
            losses, index_keys = run(reading)
            if name == "RowTiles":
                call: Callable[[], Any] = lambda: run(reading)  # noqa: E731
            else:
                weights = torch.ones_like(losses)
                call = lambda: torch.autograd.grad(  # noqa: E731
                    losses, index_keys, weights, retain_graph=True
                )
            call()
            taken = measure(call, CudaClock(), 5).milliseconds
        return entry | {"milliseconds": round(taken, 2)}
    except Exception as error:
        return entry | {"error": str(error).splitlines()[0]}


if __name__ == "__main__":
    main()

"""A wrong kernel gets no figure: rows of its output against fp64, on the tensors to be timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rtpurbo.benchmarks.layer import LayerStates

# Rows that are looked at: so many anywhere, and so many at the end.
RANDOM_QUERIES = 64
LAST_QUERIES = 64
# Rows of one head that are computed at once; at 1M tokens they weigh 256 MiB in fp64.
QUERIES_AT_ONCE = 32
# An output may be rounded once more than plain PyTorch's.
EPSILON = {torch.float16: 2**-11, torch.bfloat16: 2**-8, torch.float32: 2**-22}

# What rows of a query head see: (sequence, head, int64 [rows]) to bool [rows, k_len].
Mask = Callable[[int, int, Tensor], Tensor]


@dataclass(frozen=True)
class Comparison:
    """How far outputs are from fp64, relative to the length of the row, at the worst row.

    Attributes:
        error: of the kernel.
        plain_error: of plain PyTorch in the same precision.
        allowed: what the kernel may have.
    """

    error: float
    plain_error: float
    allowed: float

    @property
    def complaint(self) -> str | None:
        """What is wrong; None if nothing is."""
        if self.error <= self.allowed:  # false for NaN
            return None
        return (
            f"its output is off by {self.error:.3g} of a row where plain PyTorch is off by "
            f"{self.plain_error:.3g}"
        )


def sampled_queries(length: int, device: torch.device, seed: int = 0) -> Tensor:
    """Rows to look at, int64, ascending."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(length, (RANDOM_QUERIES,), generator=generator)
    last = torch.arange(max(0, length - LAST_QUERIES), length)
    return torch.cat([rows, last]).unique().to(device)


def compare(
    output: Tensor, states: LayerStates, mask: Mask, rows: Tensor | None = None
) -> Comparison:
    """Holds sampled rows of an output against fp64 under an explicit mask.

    Args:
        output: [batch, num_attention_heads, q_len, head_dim].
        states: what it was computed from.
        mask: what each row sees.
        rows: int64, the rows to look at; a sample if None.
    """
    if rows is None:
        rows = sampled_queries(output.shape[2], output.device)
    group = states.queries.shape[1] // states.keys.shape[1]
    worst = torch.zeros(2, dtype=torch.float64, device=output.device)
    for sequence in range(output.shape[0]):
        for head in range(output.shape[1]):
            keys, values = (part[sequence, head // group] for part in (states.keys, states.values))
            exact_keys, exact_values = keys.double(), values.double()
            for some in rows.split(QUERIES_AT_ONCE):
                queries = states.queries[sequence, head, some]
                visible = mask(sequence, head, some)
                exact = _attend(queries.double(), exact_keys, exact_values, visible, states.scaling)
                plain = _attend(queries, keys, values, visible, states.scaling)
                both = torch.stack([output[sequence, head, some], plain]).double()
                errors = (both - exact).norm(dim=-1) / exact.norm(dim=-1)
                worst = torch.maximum(worst, errors.amax(-1))  # a NaN stays
    error, plain_error = worst.tolist()
    return Comparison(error, plain_error, 2 * plain_error + EPSILON[output.dtype])


def _attend(
    queries: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scaling: float
) -> Tensor:
    logits = (queries @ keys.T * scaling).masked_fill(~visible, -torch.inf)
    kind = torch.promote_types(logits.dtype, torch.float32)
    return logits.softmax(-1, dtype=kind).to(values.dtype) @ values


def causal(rows: Tensor, length: int) -> Tensor:
    """Everything up to the row itself: bool [rows, length]."""
    return torch.arange(length, device=rows.device) <= rows[:, None]


def near(rows: Tensor, length: int, num_sinks: int, window: int) -> Tensor:
    """Sinks and window: bool [rows, length]."""
    columns = torch.arange(length, device=rows.device)
    recent = columns > rows[:, None] - window
    return ((columns < num_sinks) | recent) & (columns <= rows[:, None])

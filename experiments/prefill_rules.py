"""The prefill rules that `sparse_prefill.py` compares."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class PrefillRule:
    """One row of the table.

    Attributes:
        name: of the row.
        changes: fields of the attention rule.
        model: the teacher, the sparse model with the teacher's weights, or the sparse model.
        as_dense_as: changes of a rule whose density on prose this one is brought to, by `row_share`.
        decoding: the rows of the answer select for themselves, as in `generate`, although the rows
            before them are dense.
    """

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    model: Literal["teacher", "before stage 2", "sparse"] = "sparse"
    as_dense_as: dict[str, Any] | None = None
    decoding: bool = False


def tiles(mode: str, share: float, **changes: Any) -> dict[str, Any]:
    """Changes for a mode in which tiles share one block list."""
    return {"prefill_mode": mode, "row_share": share, **changes}


REFERENCE = "dense retrieval heads"
SHARES = {"1/16": 1 / 16, "1/8": 1 / 8, "1/4": 1 / 4}
BEST_GUESS = tiles("row_peak", 1 / 8)

RULES = [
    PrefillRule("full attention", model="teacher"),
    PrefillRule(
        "dense retrieval heads before stage 2", {"prefill_mode": "dense"}, "before stage 2"
    ),
    PrefillRule(REFERENCE, {"prefill_mode": "dense"}, decoding=True),
    PrefillRule("dense retrieval heads, in the answer too", {"prefill_mode": "dense"}),
    # Served by kernels on a GPU.
    *(
        PrefillRule(f"row_peak {name}", tiles("row_peak", share))
        for name, share in {**SHARES, "1/2": 1 / 2}.items()
    ),
    *(
        PrefillRule(
            f"row_peak 1/8, one row in {stride} asked", {**BEST_GUESS, "row_stride": stride}
        )
        for stride in (2, 4, 8)
    ),
    *(
        PrefillRule(
            f"row_peak, tiles of {rows} rows, blocks of {keys}, as dense as 1/8",
            {"prefill_mode": "row_peak", "query_block_size": rows, "block_size": keys},
            as_dense_as=BEST_GUESS,
        )
        for rows, keys in ((64, 64), (32, 64), (128, 32), (64, 32), (32, 32))
    ),
    *(
        PrefillRule(
            f"row_peak 1/8, retrieval window {window}", {**BEST_GUESS, "retrieval_window": window}
        )
        for window in (64, 256)
    ),
    *(
        PrefillRule(
            f"row_peak as dense as row_share {name}",
            {"prefill_mode": "row_peak"},
            as_dense_as=tiles("row_share", share),
        )
        for name, share in SHARES.items()
    ),
    # Eager everywhere, so slow: last.
    *(
        PrefillRule(f"row_share {name}", tiles("row_share", share))
        for name, share in SHARES.items()
    ),
    *(
        PrefillRule(
            f"top_p {top_p:.2f}", {"prefill_mode": "top_p", "top_p": top_p, "min_tokens": 128}
        )
        for top_p in (0.90, 0.95, 0.98)
    ),
]

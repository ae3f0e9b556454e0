"""Counts and the table of `sparse_prefill.py`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from long_tasks import SCORING
from prefill_rules import REFERENCE
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.ops import SelectionStatistics


@dataclass
class BlockStatistics(SelectionStatistics):
    """Counts far keys, and the far blocks that any row of a tile reads.

    Attributes:
        row_tile: rows of a tile.
        key_block: keys of a block.
        far_blocks: pairs of a tile and a block with a far key, summed over heads.
        far_blocks_read: those of which a row of the tile reads a far key.
    """

    row_tile: int = 128
    key_block: int = 64
    far_blocks: float = 0.0
    far_blocks_read: float = 0.0

    def add(self, far: Tensor, selected: Tensor) -> None:
        """Adds rows; chunks of rows begin with a tile, as the eager operators cut them."""
        super().add(far, selected)
        self.far_blocks += float(self._any(far).sum()) * selected.shape[1]
        self.far_blocks_read += float(self._any(selected).sum())

    def _any(self, read: Tensor) -> Tensor:
        rows, keys = read.shape[-2:]
        padding = (0, -keys % self.key_block, 0, -rows % self.row_tile)
        blocks = F.pad(read, padding).unflatten(-1, (-1, self.key_block)).any(-1)
        return blocks.unflatten(-2, (-1, self.row_tile)).any(-2)

    @property
    def block_share(self) -> float | None:
        """Share of the far blocks read; kernels count keys alone, of which a listed block has all."""
        return self.far_blocks_read / self.far_blocks if self.far_blocks else self.share_read

    @contextmanager
    def watching(self, model: PreTrainedModel) -> Iterator[None]:
        """Counts over every forward inside."""
        modules = headwise_modules(model)
        for module in modules:
            module.statistics = self
        try:
            yield
        finally:
            for module in modules:
                module.statistics = None


def mean_and_error(values: Sequence[Sequence[float]]) -> tuple[float, float]:
    """The mean over tasks of the means over questions, and its standard error."""
    mean = variance = 0.0
    for task in values:
        task_mean = sum(task) / len(task)
        mean += task_mean / len(values)
        if len(task) > 1:
            spread = sum((value - task_mean) ** 2 for value in task) / (len(task) - 1)
            variance += spread / len(task) / len(values) ** 2
    return mean, math.sqrt(variance)


def compare(record: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """How a rule's mean differs from the reference's over the questions that both were asked.

    Returns:
        `mean` and `error` of the rule; `difference` from the reference and its `paired_error`;
        `within`: whether it is no more than one standard error below (the larger one of both
        rules' means).
    """
    mine, others = (list(one["right"].values()) for one in (record, reference))
    asked = min(len(task) for task in (*mine, *others))
    mine, others = ([list(map(float, task[:asked])) for task in one] for one in (mine, others))
    differences = [
        [a - b for a, b in zip(*tasks, strict=True)] for tasks in zip(mine, others, strict=True)
    ]
    mean, error = mean_and_error(mine)
    difference, paired_error = mean_and_error(differences)
    allowed = max(error, mean_and_error(others)[1])
    return {
        "asked": asked,
        "mean": mean,
        "error": error,
        "difference": difference,
        "paired_error": paired_error,
        "within": difference >= -allowed - 1e-9,
    }


def markdown_table(records: Sequence[dict[str, Any]]) -> str:
    """All rules, side by side, and how they were scored."""
    reference = next((one for one in records if one["rule"] == REFERENCE), None)
    tasks = list(records[0]["right"]) if records else []
    lines = [
        f"| rule | {' | '.join(tasks)} | mean | minus dense | within 1 SE | perplexity "
        "| far keys read | blocks | ms | backend | questions a task |",
        f"|---|{'---:|' * len(tasks)}---:|---:|---|---:|---:|---:|---:|---|---:|",
    ]
    for record in records:
        found = compare(record, reference or record)
        shares = [sum(right) / len(right) for right in record["right"].values()]
        backends = dict.fromkeys([record["backend"], record["backend_in_tasks"]])
        share = record["changes"].get("row_share")
        threshold = f" (share {share:.4f})" if " as dense as " in record["rule"] and share else ""
        lines.append(
            f"| {record['rule']}{threshold} | "
            + " | ".join(f"{value:.2f}" for value in shares)
            + f" | {found['mean']:.3f} ± {found['error']:.3f} "
            f"| {found['difference']:+.3f} ± {found['paired_error']:.3f} "
            f"| {'yes' if found['within'] else 'no'} | {record['perplexity']:.2f} "
            f"| {record['far_keys_read']:.4f} | {record['blocks_read']:.3f} "
            f"| {record['milliseconds']:.1f} | {', '.join(backends)} "
            f"| {len(next(iter(record['right'].values())))} |"
        )
    notes = (
        f"{SCORING} Under dense prefill the rows of the answer select as decoding steps do (`{REFERENCE}`); "
        "under the other rules they select as all rows do. Mean: over the tasks, ± its standard error. "
        "Minus dense: over the questions that both were asked, ± the standard error of paired "
        "differences. Within 1 SE: no more than the larger standard error of both means below dense. "
        "Perplexity, far keys and blocks (read by any row of a tile): six held-out windows of prose. "
        "ms: one forward over such a window."
    )
    return "\n".join([*lines, "", notes])

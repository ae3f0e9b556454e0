"""Steps that launch every kernel once before the first request, so that no request waits for a compilation.

Triton compiles a kernel for each combination of dtypes, constants, and divisibility of sizes and addresses. Batches
of any size share one combination (see `step_queries`), so one step of each kind suffices for a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from rtpurbo.config import AttentionRule
from rtpurbo.serving.vllm.pages import NULL_BLOCK, Batch

GENERATED = (2, 1)
"""Request whose query selects: two tokens, one of them prompt."""


@dataclass(frozen=True)
class WarmUpStep:
    """Step of requests with one query each, which reads block 0 and stores nothing.

    Attributes:
        requests: tokens and prompt tokens of each request.
        uniform: as in `Batch`.
        has_workspace: the histogram workspace suffices for the step.
    """

    requests: tuple[tuple[int, int], ...]
    uniform: bool = False
    has_workspace: bool = True

    def batch(self, num_blocks: int, device: torch.device) -> Batch:
        """Batch of the step.

        Args:
            num_blocks: width of vLLM's block table, on which constants of the kernels depend.
            device: device of the caches.
        """
        count = len(self.requests)
        lengths, prompt_lengths = (
            torch.tensor(numbers, dtype=torch.int32) for numbers in zip(*self.requests, strict=True)
        )
        return Batch(
            starts=torch.arange(count + 1, dtype=torch.int32),
            lengths=lengths,
            prompt_lengths=prompt_lengths,
            block_table=torch.full(
                (count, num_blocks), NULL_BLOCK, dtype=torch.int32, device=device
            ),
            slots=torch.full((count,), -1, dtype=torch.int64, device=device),
            device_lengths=lengths.to(device),
            device_prompt_lengths=prompt_lengths.to(device),
            uniform=self.uniform,
        )


def warm_up_steps(
    rule: AttentionRule, max_model_len: int, *, uniform: bool, exceeds_workspace: bool
) -> Iterator[WarmUpStep]:
    """Yields the steps that launch every kernel of a layer.

    Args:
        rule: windows and selection of the layer.
        max_model_len: largest number of tokens of a request.
        uniform: the engine has uniform steps.
        exceeds_workspace: batches may exceed the histogram workspace.
    """
    # The shortest prompt whose last query is dense in local heads, if the rule has such queries.
    prompt = min(rule.sliding_window + 1, max_model_len)
    yield WarmUpStep((GENERATED, (prompt, prompt)))
    if uniform:
        yield WarmUpStep((GENERATED,), uniform=True)
    if exceeds_workspace:
        yield WarmUpStep((GENERATED,), has_workspace=False)

"""Head gates: which heads need the whole context, learned from the answers that they change.

Each head mixes its full attention with its windowed attention by a gate from 0 (windowed) to 1 (full).
The gates are trained to keep the dense model's distribution at answers while their sum shrinks to the
number of heads asked for; the weights stay frozen. DuoAttention (arXiv 2410.10819) optimises such gates
under an L1 penalty; here the budget is a constraint, met by projection, so there is no penalty to tune.
Unlike attention scores, gates rank a head by its effect on the output and see that two heads do one job.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.config import AttentionRule, HeadMap, RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.models.architecture import num_key_value_heads
from rtpurbo.models.sparsify import (
    empty_head_map,
    gated_heads,
    headwise_modules,
    restore,
    running_dense,
    sparsify,
)
from rtpurbo.settings import DistillationSettings, Progress, no_progress
from rtpurbo.training.sequences import TrainingMix
from rtpurbo.training.stage2 import autocast, loss_on
from rtpurbo.training.teacher import teacher_targets

INITIAL_GATE = 0.95
"""Below 1: where every gate is open the divergence and its gradient are zero."""

CLOSING_STEPS = 0.7
"""Share of the steps over which the budget shrinks; in the rest heads compete at the final budget."""

LEARNING_RATE = 0.03

MIX: dict[str, Any] = {
    "needle_share": 0.15,
    "variable_share": 0.2,
    "passage_share": 0.1,
    "haystack_share": 0.3,
    "counting_share": 0.1,
    "reading_share": 0.1,
}
"""Shares of the kinds of training sequences; the rest is prose."""

TARGETS = DistillationSettings(labels_per_sequence=1024, answer_weight=2.0, decode_rows=0)
"""Target positions: every token of the answer and some of the text before it."""


def train_gates(
    model: PreTrainedModel,
    mix: TrainingMix,
    rule: AttentionRule,
    *,
    steps: int,
    ratio: float,
    per_group: bool,
    progress: Progress = no_progress,
) -> dict[int, Tensor]:
    """Trains a gate for each query head or KV head and returns each head's mean gate.

    The mean over all steps ranks heads for any budget: the longer a head resists, the higher.

    Args:
        model: dense, on any device.
        mix: training sequences, longer than sinks and window.
        rule: sinks and window of a closed head.
        steps: optimiser steps, one sequence each.
        ratio: share of the gates that may stay open in the end.
        per_group: one gate for each KV head, shared by its query heads, instead of each query head.
        progress: called after each step.

    Raises:
        RTPurboError: a loss is not finite.

    Returns:
        For each converted layer, fp32 [num_attention_heads] from 0 to 1 on the CPU.
    """
    with _gated(model, rule, per_group) as gates:
        parameters = list(gates.values())
        count = sum(gate.numel() for gate in parameters)
        total = {layer: torch.zeros_like(gate) for layer, gate in gates.items()}
        optimizer = torch.optim.Adam(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99))
        for step in range(steps):
            sequence = mix.sequence(step)
            with running_dense(model), autocast(model):
                targets = teacher_targets(model, sequence, TARGETS, f"gates-{step}")
            loss = loss_on(model, sequence, targets, TARGETS)
            if not loss.isfinite():
                raise RTPurboError(
                    f"the loss of step {step + 1} of the gates is {loss.item()}: try --dtype float32, or "
                    "--set calibration.ranking=copies."
                )
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            closed = min(1.0, (step + 1) / max(1, CLOSING_STEPS * steps))
            budget = count * (INITIAL_GATE + (ratio - INITIAL_GATE) * closed)
            project(parameters, budget)
            for layer, gate in gates.items():
                total[layer] += gate.detach()
            progress("gates", step + 1, steps, {"loss": loss.item(), "open": budget})
        heads = model.config.num_attention_heads
        return {
            layer: (value / steps).repeat_interleave(heads // value.numel()).cpu()
            for layer, value in total.items()
        }


@torch.no_grad()
def project(gates: Sequence[Tensor], budget: float) -> None:
    """Moves gates to the nearest point with values from 0 to 1 and a sum of at most `budget`.

    The nearest point shifts all gates by one amount before they are clamped; bisection finds it.

    Args:
        gates: fp32 tensors, changed in place.
        budget: the largest sum, from 0 to the number of gates.
    """
    values = torch.cat([gate.flatten() for gate in gates])
    low, high = 0.0, float(values.max().clamp(min=0))
    if values.clamp(0, 1).sum() <= budget:
        high = 0.0
    for _ in range(50):
        middle = (low + high) / 2
        if (values - middle).clamp(0, 1).sum() > budget:
            low = middle
        else:
            high = middle
    for gate in gates:
        gate.sub_(high).clamp_(0, 1)


@contextmanager
def _gated(
    model: PreTrainedModel, rule: AttentionRule, per_group: bool
) -> Iterator[dict[int, Tensor]]:
    """A dense model with gates on its heads, ready for their gradients, and dense again afterwards.

    Yields:
        The gates by layer: fp32 [num_key_value_heads] or [num_attention_heads].
    """
    config = model.config
    count = num_key_value_heads(config) if per_group else config.num_attention_heads
    head_map: HeadMap = empty_head_map(model)
    sparsify(model, RTPurboConfig(head_map, rule))
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    gates = {
        module.layer_idx: torch.full(
            (count,), INITIAL_GATE, device=module.device, requires_grad=True
        )
        for module in headwise_modules(model)
    }
    try:
        with gated_heads(model, gates):
            yield gates
    finally:
        model.eval()
        if on_gpu:
            model.gradient_checkpointing_disable()
        restore(model)

"""Head gates: which heads need the whole context, learned from the answers that they change.

Each head mixes its full attention with its windowed attention by a gate from 0 (windowed) to 1 (full).
The gates are trained to keep the dense model's distribution at answers while their sum shrinks to the
number of heads asked for; the weights stay frozen. DuoAttention (arXiv 2410.10819) optimises such gates
under an L1 penalty; here the budget is a constraint, met by projection, so there is no penalty to tune.
Unlike attention scores, gates rank a head by its effect on the output and see that two heads do one job.

Where all queries of a prompt will be dense (`dense_prompt_tokens`), gates act on answers only, which read windows
and heavy hitters as decode steps will. Nothing before the first answer depends on the gates then, so its keys and
values are kept from the forward of the dense model, and only the tokens after it are read again, with gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from rtpurbo.calibration.answer_sequences import Sequences, target_positions
from rtpurbo.config import AttentionRule, RTPurboConfig
from rtpurbo.data.prompts import Conversation
from rtpurbo.errors import RTPurboError
from rtpurbo.models.families import FAMILIES
from rtpurbo.models.sparse_layer import KeysAndValues
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import empty_head_map, restore, runtime, sparsify
from rtpurbo.ops.eager.heavy_hitters import OBSERVED_QUERIES
from rtpurbo.settings import DistillationSettings, Progress, no_progress
from rtpurbo.training.checkpoint import Checkpoint
from rtpurbo.training.sequences import TrainingSequence
from rtpurbo.training.stage2 import autocast, loss_of, predictions
from rtpurbo.training.student import set_gradient_checkpointing
from rtpurbo.training.teacher import TeacherTargets, targets_at, top_logits_divergence

INITIAL_GATE = 0.95
"""Below 1: where every gate is open the divergence and its gradient are zero."""

CLOSING_STEPS = 0.7
"""Share of the steps over which the budget shrinks; in the rest heads compete at the final budget."""

LEARNING_RATE = 0.03
"""Change of a gate whose gradient is the root mean square of all gates' gradients."""

MOMENTUM, SCALE_DECAY, MAX_GRADIENT = 0.9, 0.99, 5.0
"""Averages of the gradient and of its square over steps; a gradient is clipped to so many times its usual size."""

TARGETS = DistillationSettings(answer_weight=2.0, decode_queries=0)


def train_gates(
    model: PreTrainedModel,
    sequences: Sequences,
    rule: AttentionRule,
    *,
    steps: int,
    ratio: float,
    per_group: bool,
    checkpoint: Checkpoint | None = None,
    progress: Progress = no_progress,
) -> dict[int, Tensor]:
    """Trains a gate for each query head or KV head and returns each head's mean gate.

    The mean is taken over the last steps, in which the gates compete at the final budget.

    Args:
        model: dense, on any device.
        sequences: longer than sinks and window.
        rule: windows, heavy hitters and dense prompt queries of a closed head.
        steps: optimiser steps, one sequence each.
        ratio: share of the gates that may stay open in the end.
        per_group: one gate for each KV head, shared by its query heads, instead of each query head.
        checkpoint: restored at the start and saved regularly.
        progress: called after each step.

    Raises:
        RTPurboError: a loss is not finite.

    Returns:
        For each converted layer, fp32 [num_attention_heads] from 0 to 1 on the CPU.
    """
    checkpoint = checkpoint or Checkpoint(None)
    # The next sequence is drawn while the model reads one.
    with gated_model(model, rule, per_group) as gates, ThreadPoolExecutor(1) as thread:
        parameters = list(gates.values())
        count = sum(gate.numel() for gate in parameters)
        optimizer = SharedScaleDescent(parameters)
        last = [step for step in range(steps) if step + 1 >= CLOSING_STEPS * steps]
        total = {layer: torch.zeros_like(gate) for layer, gate in gates.items()}
        trained = [*parameters, *total.values()]
        done = checkpoint.restore(trained, optimizer, None)
        upcoming = thread.submit(sequences.sequence, done)
        for step in range(done, steps):
            conversation = upcoming.result()
            if step + 1 < steps:
                upcoming = thread.submit(sequences.sequence, step + 1)
            positions, answers = target_positions(conversation, f"gates-{step}")
            ids, begin = conversation.input_ids, prompt_length(model, rule, conversation)
            with (
                runtime(model).dense(),
                runtime(model).keeping_prompt(begin) as prompt,
                autocast(model),
            ):
                targets = targets_at(model, ids, positions, answers, TARGETS.top_logits)
            # Around the backward pass too, which recomputes layers.
            with gated_answers(model, rule, gates, conversation, prompt if begin else None):
                loss = loss_after(model, begin, ids, targets, TARGETS)
                if not loss.isfinite():
                    raise RTPurboError(
                        f"the loss of step {step + 1} of the gates is {loss.item()}: try --dtype float32, or "
                        "--set calibration.ranking=induction."
                    )
                loss.backward()
            optimizer.step()
            closed = min(1.0, (step + 1) / max(1, CLOSING_STEPS * steps))
            budget = count * (INITIAL_GATE + (ratio - INITIAL_GATE) * closed)
            project(parameters, budget)
            if step in last:
                for layer, gate in gates.items():
                    total[layer] += gate.detach() / len(last)
            checkpoint.save(step + 1, trained, optimizer, None)
            progress("gates", step + 1, steps, {"loss": loss.item(), "open": budget})
        return {
            module.layer_idx: gate.repeat_interleave(
                module.num_attention_heads // gate.numel()
            ).cpu()
            for module, gate in zip(headwise_modules(model), total.values(), strict=True)
        }


def gated_answers(
    model: PreTrainedModel,
    rule: AttentionRule,
    gates: Mapping[int, Tensor],
    conversation: Conversation,
    prompt: Mapping[int, KeysAndValues] | None = None,
) -> AbstractContextManager[None]:
    """Context in which gates act on the answers alone, or on all queries where the prompt is not dense.

    The answer of prose is its second half. With `prompt`, the forward has only the tokens after `prompt_length`.
    """
    spans = _gated_spans(rule, conversation)
    if prompt is not None:
        assert spans is not None
        begin = prompt_length(model, rule, conversation)
        spans = [(first - begin, end - begin) for first, end in spans]
    return runtime(model).gated(gates, spans, prompt)


def _gated_spans(rule: AttentionRule, conversation: Conversation) -> list[tuple[int, int]] | None:
    """First query and end of each answer on which gates act; None if they act on all queries."""
    length = len(conversation.input_ids)
    if rule.num_dense_queries(length) < length:
        return None
    return list(conversation.answer_spans) or [(length // 2, length)]


def prompt_length(model: PreTrainedModel, rule: AttentionRule, conversation: Conversation) -> int:
    """Tokens that no gate changes and that need not be read again; 0 for a model whose layers keep other states too.

    Heavy hitters need the last queries before an answer.
    """
    spans = _gated_spans(rule, conversation)
    layers = headwise_modules(model)
    is_known = model.config.get_text_config().model_type in FAMILIES
    if spans is None or not is_known or len(layers) < model.config.num_hidden_layers:
        return 0
    return max(0, spans[0][0] - OBSERVED_QUERIES)


def loss_after(
    model: PreTrainedModel,
    begin: int,
    input_ids: list[int],
    targets: TeacherTargets,
    settings: DistillationSettings,
) -> Tensor:
    """Loss of a sequence of which only the tokens from `begin` on are read; before them nothing diverges."""
    before = int((targets.positions < begin).sum())
    moved = TeacherTargets(*(each[before:] for each in vars(targets).values())).to(model.device)
    moved.positions = moved.positions - begin
    found = predictions(model, TrainingSequence(input_ids[begin:]), moved, begin)
    divergence = F.pad(top_logits_divergence(found, moved), (before, 0))
    return loss_of(divergence, targets.answers, settings)[0]


class SharedScaleDescent(Optimizer):
    """Gradient descent with momentum, scaled by one root mean square over all gates.

    Adam scales each gate by its own gradients, which makes a small effect on every sequence worth more than
    a large one on few: heads that a rare task needs were closed (docs/experiment-log.md).

    Args:
        gates: fp32 tensors that require gradients.
    """

    def __init__(self, gates: Sequence[Tensor]) -> None:
        super().__init__(gates, {"mean_square": 0.0, "steps": 0})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Updates the gates in place and clears their gradients."""
        [group] = self.param_groups
        gates, steps, mean_square = group["params"], group["steps"], group["mean_square"]
        gradients = [torch.zeros_like(g) if g.grad is None else g.grad for g in gates]
        pulls = torch.cat([_free(*each) for each in zip(gates, gradients, strict=True)])
        square = pulls.square().mean().item() if len(pulls) else 0.0
        if steps and square:
            usual = mean_square / (1 - SCALE_DECAY**steps)
            clip = min(1.0, MAX_GRADIENT * math.sqrt(usual / square))
            gradients, square = [clip * g for g in gradients], clip**2 * square
        steps += 1
        mean_square = SCALE_DECAY * mean_square + (1 - SCALE_DECAY) * square
        group["steps"], group["mean_square"] = steps, mean_square
        scale = math.sqrt(mean_square / (1 - SCALE_DECAY**steps)) + 1e-12
        for gate, gradient in zip(gates, gradients, strict=True):
            average = self.state[gate].setdefault("momentum", torch.zeros_like(gate))
            average.lerp_(gradient, 1 - MOMENTUM)
            gate.sub_(LEARNING_RATE / scale / (1 - MOMENTUM**steps) * average)
            gate.grad = None


def _free(gate: Tensor, gradient: Tensor) -> Tensor:
    """Returns the gradients of gates that can move along them: not clamped at 0 or 1."""
    return gradient[
        (gate > 0) & (gate < 1) | (gate == 0) & (gradient < 0) | (gate == 1) & (gradient > 0)
    ]


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
def gated_model(
    model: PreTrainedModel, rule: AttentionRule, per_group: bool
) -> Iterator[dict[int, Tensor]]:
    """Attaches trainable gates to the heads of a dense model, inside a `with` block.

    Yields:
        The gates by layer: fp32 [num_key_value_heads] or [num_attention_heads].
    """
    sparsify(model, RTPurboConfig(empty_head_map(model), rule))
    on_gpu = model.device.type == "cuda"
    if on_gpu:
        set_gradient_checkpointing(model, True)
    model.train()
    gates = {
        module.layer_idx: torch.full(
            (module.num_key_value_heads if per_group else module.num_attention_heads,),
            INITIAL_GATE,
            device=module.device,
            requires_grad=True,
        )
        for module in headwise_modules(model)
    }
    try:
        yield gates
    finally:
        model.eval()
        if on_gpu:
            set_gradient_checkpointing(model, False)
        restore(model)

"""What each head's window costs: its share of the divergence that windows on all heads together cause.

Every head gets a gate between what it does (0) and what it would do with sinks and a window alone (1).
Opened together, the gates lead from the dense model to one whose heads are all local; the gradient of
the divergence from the dense model, added up along the way, divides what is lost in the end among the
heads (integrated gradients: Sundararajan, Taly and Yan, 2017). No head is judged by how it looks, but by
what answers lose without it, while the others lose theirs too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.calibration.selection import Scores
from rtpurbo.config import AttentionRule, RTPurboConfig
from rtpurbo.models.sparse_layer import SparseAttention
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import empty_head_map, restore, runtime, sparsify
from rtpurbo.ops import KeyValueStates
from rtpurbo.training.sequences import TrainingMix, TrainingSequence
from rtpurbo.training.stage2 import autocast
from rtpurbo.training.targets import states_at

SHARES = {"needles": 0.4, "variables": 0.4, "passage": 0.2}
"""Of the kinds of sequences; each ends with an answer that needs what lies far back."""

POINTS = (1 / 6, 3 / 6, 5 / 6)
"""Where on the way gradients are taken: the middles of its thirds."""


def divergence_shares(
    model: PreTrainedModel,
    mix: TrainingMix,
    num_sequences: int,
    rule: AttentionRule,
    points: Sequence[float] = POINTS,
) -> Scores:
    """The share of each head in what answers lose if all heads see sinks and window alone.

    Args:
        model: dense, and left so.
        mix: draws sequences that end with answers, longer than the window.
        num_sequences: how many are looked at.
        rule: sinks and window.
        points: of the way at which gradients are taken, the same part of it for each.

    Returns:
        For each layer, nats an answer token of each head, mean over sequences; None for a layer that is not converted.
        They add up to the divergence at the end of the way, as far as the points are enough.
    """
    sparsify(model, RTPurboConfig(empty_head_map(model), rule))
    try:
        with gated(model) as gates, runtime(model).dense():
            for number in range(num_sequences):
                sequence = mix.sequence(number)
                with torch.no_grad():
                    _open(gates, 0.0)
                    expected = _answer_logits(model, sequence).log_softmax(-1)
                for point in points:
                    _open(gates, point)
                    found = _answer_logits(model, sequence).log_softmax(-1)
                    divergence = F.kl_div(found, expected, reduction="none", log_target=True)
                    (divergence.sum(-1).mean() / (len(points) * num_sequences)).backward()
    finally:
        restore(model)
    shares: list[Sequence[float] | None] = [None] * model.config.num_hidden_layers
    for layer, gate in gates.items():
        assert gate.grad is not None
        shares[layer] = gate.grad.tolist()
    return shares


@contextmanager
def gated(model: PreTrainedModel) -> Iterator[dict[int, Tensor]]:
    """Puts gates between full attention and window into a sparse model that runs dense.

    Yields:
        For each layer its gates, fp32 [num_attention_heads].
    """
    gates: dict[int, Tensor] = {}
    modules = headwise_modules(model)
    for module in modules:
        gate = torch.zeros(module.num_attention_heads, device=model.device, requires_grad=True)
        gates[module.layer_idx] = gate
        module._attend_densely = _through(module, gate)  # type: ignore[method-assign]
    try:
        yield gates
    finally:
        for module in modules:
            del module._attend_densely


def _through(module: SparseAttention, gate: Tensor) -> Callable[..., Tensor]:
    attend = module._attend_densely

    def attend_between(
        queries: Tensor, positions: Tensor, states: KeyValueStates, sinks: Tensor | None
    ) -> Tensor:
        whole = attend(queries, positions, states, sinks)
        windowed = module.attend(positions, queries, None, *module._divided(states, None), sinks)
        return whole + gate[:, None, None].to(whole.dtype) * (windowed - whole)

    return attend_between


def _open(gates: dict[int, Tensor], point: float) -> None:
    with torch.no_grad():
        for gate in gates.values():
            gate.fill_(point)


def _answer_logits(model: PreTrainedModel, sequence: TrainingSequence) -> Tensor:
    """Logits of the tokens that predict the answer: [answer tokens, vocabulary]."""
    last = len(sequence.input_ids) - 1
    positions = torch.arange(last - sequence.num_answer_tokens, last)
    # In half precision on a GPU, whose kernels for windows with gradients need no room for logits.
    with autocast(model):
        states = states_at(model, sequence.input_ids, positions)
        return model.get_output_embeddings()(states).float()

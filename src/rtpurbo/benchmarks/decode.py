"""Decode attention of one layer, sparse and dense, each in a CUDA graph.

A graph runs over several sets of inputs, as a model runs over its layers, so that inputs are read from memory and
not from the GPU's L2 cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from rtpurbo.benchmarks import sdpa
from rtpurbo.benchmarks.correctness import Mask, compare, near
from rtpurbo.benchmarks.layer import LayerShape, LayerStates
from rtpurbo.benchmarks.session import Entry, Session, release
from rtpurbo.benchmarks.timing import Call, replayed
from rtpurbo.config import AttentionRule, Granularity, IndexStorage
from rtpurbo.models.cache_layers import RingBuffer
from rtpurbo.models.ring import RingSlots
from rtpurbo.ops.api import new_histogram_workspace
from rtpurbo.ops.states import HeadLayout, KeyValueStates
from rtpurbo.ops.triton.decode.attention import decode_step
from rtpurbo.speed_records import stated_density

# Unit of selection and storage of index keys of our variants.
OURS: dict[str, tuple[Granularity, IndexStorage]] = {
    "rtpurbo": ("block", "model"),
    "rtpurbo-float8-index": ("block", "float8"),
    "rtpurbo-token": ("token", "model"),
}
IMPLEMENTATIONS = (*OURS, "sdpa-flash", "sdpa-cudnn")

# Several times the L2 cache of a Hopper GPU.
BYTES_BETWEEN_READS = 300 * 2**20
# Bytes of keys and values of all sets.
MEMORY = 24 * 2**30
MAX_SETS = 16
# Selections are rounded up to a whole level of scores.
SELECTION_TOLERANCE = 0.25


def forced_note(density: float, selected: float) -> str:
    """Note of a record whose selection was forced."""
    return f"selection of {100 * density:g} % of the keys forced, {100 * selected:.3g} % selected"


def forced(
    rule: AttentionRule, density: float, length: int, granularity: Granularity
) -> AttentionRule:
    """Rule under which every retrieval head selects this share of the keys, independent of their mass."""
    return replace(
        rule,
        granularity=granularity,
        top_p=1e-6,
        min_tokens=int(density * length),
        reading="residual",
    )


@dataclass
class DecodeCase:
    """Layer with several sets of inputs of a decode step.

    Attributes:
        shape: heads of the layer.
        rule: windows and selection.
        sets: inputs; the last key is that of the new token.
    """

    shape: LayerShape
    rule: AttentionRule
    sets: list[LayerStates]

    @classmethod
    def random(
        cls,
        shape: LayerShape,
        rule: AttentionRule,
        length: int,
        batch: int,
        dtype: torch.dtype,
        device: torch.device,
        density: float,
    ) -> DecodeCase:
        """Random inputs: enough sets that no implementation finds its inputs in the L2 cache."""
        count = num_sets(shape, rule, length, batch, dtype, density)
        sets = [
            LayerStates.random(shape, 1, length, dtype, device, batch, seed)
            for seed in range(count)
        ]
        return cls(shape, rule, sets)

    def keeping_index(self, storage: IndexStorage) -> DecodeCase:
        """Same case with another storage of index keys."""
        if storage == "model":
            return self
        sets = [
            replace(states, index_keys=states.index_keys.to(torch.float8_e4m3fn))
            for states in self.sets
        ]
        return DecodeCase(self.shape, replace(self.rule, index_storage=storage), sets)

    @cached_property
    def layout(self) -> HeadLayout:
        """Head layout of the layer."""
        return self.shape.layout(self.sets[0].keys.device)

    @cached_property
    def divided(self) -> list[tuple[KeyValueStates, KeyValueStates]]:
        """Full and windowed KV heads of each set, in the form of a static cache."""
        return [self._divided(states) for states in self.sets]

    def _divided(self, states: LayerStates) -> tuple[KeyValueStates, KeyValueStates]:
        full, windowed = states.divided(self.layout)
        length = torch.tensor([states.length], dtype=torch.int32, device=states.keys.device)
        slots = RingSlots(self.rule.num_sink_tokens, self.rule.sliding_window, 0)
        ring = RingBuffer(slots)
        slots.begin_forward(states.positions[:, :-1])
        ring.append(windowed.keys[:, :, :-1], windowed.values[:, :, :-1])
        slots.begin_forward(states.positions[:, -1:])
        in_ring = ring.append(windowed.keys[:, :, -1:], windowed.values[:, :, -1:])
        histogram_workspace = new_histogram_workspace(
            full.keys.shape[0], len(self.layout.retrieval), full.keys.device
        )
        return replace(full, length=length, histogram_workspace=histogram_workspace), in_ring

    def facts(self, density: float) -> dict[str, Any]:
        """Record fields that are known before the measurement."""
        return self.shape.facts("decode", self.sets[0], self.rule, density)


def num_sets(
    shape: LayerShape,
    rule: AttentionRule,
    length: int,
    batch: int,
    dtype: torch.dtype,
    density: float,
) -> int:
    """Number of sets of inputs that exceed the L2 cache in total, as far as memory allows."""
    size = dtype.itemsize
    token = 2 * shape.head_dim * size
    index = shape.num_index_keys * shape.index_dim * min(size, 2)
    selected = len(shape.retrieval_heads) * density * token
    window = shape.num_key_value_heads * min(length, rule.sliding_window) * token
    least_bytes = batch * (length * (index + selected) + window)
    set_bytes = batch * length * (shape.num_key_value_heads * token + index)
    needed = -(-BYTES_BETWEEN_READS // max(1, int(least_bytes)))
    return max(1, min(needed, MAX_SETS, MEMORY // set_bytes))


def bench_decode(
    session: Session,
    shape: LayerShape,
    rules: Sequence[AttentionRule],
    lengths: Sequence[int],
    densities: Sequence[float],
    batches: Sequence[int],
    dtype: torch.dtype,
) -> None:
    """Measures decode attention at every length and batch size, sparse attention with every rule and density."""
    for batch in sorted(batches):
        for length in sorted(lengths):
            with session.guarded(f"decode at {length:,} tokens x {batch}"):
                shortest_window = min(rules, key=lambda rule: rule.sliding_window)
                case = DecodeCase.random(
                    shape, shortest_window, length, batch, dtype, session.device, min(densities)
                )
                for rule in rules:
                    with_rule = DecodeCase(shape, rule, case.sets)
                    for density in densities:
                        for entry in _ours(session, with_rule, density):
                            session.run(entry)
                for entry in _peers(case, session.device):
                    session.run(entry)
                del case, with_rule, entry
            release(session.device)


def _ours(session: Session, whole: DecodeCase, density: float) -> Iterator[Entry]:
    for name, (granularity, storage) in OURS.items():
        if not session.wants(name):
            continue
        case = whole.keeping_index(storage)
        rule = forced(case.rule, density, case.sets[0].length, granularity)
        mask, selected = step_mask(case, rule)
        length = case.sets[0].length
        far = max(0, length - rule.near_window - rule.num_sink_tokens) / length
        yield Entry(
            name,
            {"": partial(_sparse_calls, case, rule, session.device)},
            case.facts(stated_density(density, selected, SELECTION_TOLERANCE)),
            partial(_check, case, rule, mask, min(density, far), selected),
            is_ours=True,
            growth=1,
            calls=len(case.sets),
            note=forced_note(density, selected),
        )


def step(case: DecodeCase, rule: AttentionRule, number: int) -> tuple[Tensor, Any]:
    """Output and selection of a decode step on one set of inputs."""
    states = case.sets[number]
    full, windowed = case.divided[number]
    output, _, selection = decode_step(
        states.queries, full, windowed, case.layout, states.index_queries, rule, states.scaling
    )
    return output, selection


def step_mask(case: DecodeCase, rule: AttentionRule) -> tuple[Mask, float]:
    """Visible keys of the heads in a step on the first set, and the share of the keys that is selected."""
    states, sinks = case.sets[0], rule.num_sink_tokens
    length = states.length
    _, selection = step(case, rule, 0)
    last = torch.tensor([length - 1], device=states.keys.device)
    far = ~near(last, length, sinks, rule.near_window)
    selected = far.expand(states.keys.shape[0], len(case.shape.retrieval_heads), -1)
    if selection is not None:
        selected = selected & selection.keys(length)
    places = {head: place for place, head in enumerate(case.shape.retrieval_heads)}

    def mask(sequence: int, head: int, query_indices: Tensor) -> Tensor:
        if head not in places:
            return near(last, length, sinks, rule.sliding_window)
        return near(last, length, sinks, rule.near_window) | selected[sequence, places[head]]

    return mask, float(selected.float().mean())


def _check(
    case: DecodeCase, rule: AttentionRule, mask: Mask, least: float, selected: float, call: Call
) -> str | None:
    # A block may extend beyond the far keys.
    if selected < least - rule.block_size / case.sets[0].length:
        return f"it selects {selected:.4g} of the keys instead of at least {least:.4g}"
    output, _ = step(case, rule, 0)
    only_query = torch.zeros(1, dtype=torch.int64, device=output.device)
    return compare(output, case.sets[0], mask, only_query).complaint


def _sparse_calls(case: DecodeCase, rule: AttentionRule, device: torch.device) -> Call:
    steps: list[Call] = [partial(step, case, rule, number) for number in range(len(case.sets))]
    return replayed(steps, device)


def _dense_calls(case: DecodeCase, attend: sdpa.Attention, device: torch.device) -> Call:
    steps: list[Call] = [
        partial(attend, states.queries, states.keys, states.values, states.scaling)
        for states in case.sets
    ]
    return replayed(steps, device)


def _peers(case: DecodeCase, device: torch.device) -> Iterator[Entry]:
    for name in sdpa.BACKENDS:
        yield Entry(
            name,
            {
                title: partial(_dense_calls, case, attend, device)
                for title, attend in sdpa.step_attentions(name).items()
            },
            case.facts(1.0),
            growth=1,
            calls=len(case.sets),
        )

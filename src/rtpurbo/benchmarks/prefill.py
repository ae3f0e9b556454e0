"""Prefill attention of one layer: sparse, windowed with dense retrieval heads, and fully dense."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rtpurbo.benchmarks import sdpa
from rtpurbo.benchmarks.correctness import Mask, causal, compare, near
from rtpurbo.benchmarks.layer import LayerShape, LayerStates
from rtpurbo.benchmarks.lists import density_of, listed_keys
from rtpurbo.benchmarks.session import Entry, Session, release
from rtpurbo.benchmarks.sparse_prefill import SparsePrefill
from rtpurbo.benchmarks.timing import Call
from rtpurbo.config import AttentionRule
from rtpurbo.ops import headwise_attention
from rtpurbo.speed_records import stated_density

IMPLEMENTATIONS = (
    "rtpurbo",
    "rtpurbo-dense-retrieval",
    "duo-attention-shape",
    "sdpa-flash",
    "sdpa-cudnn",
    "flex",
    "eager",
)
# Beyond these lengths, a block mask or the matrix of all scores takes too much memory.
FLEX_LIMIT = 131072
EAGER_LIMIT = 4096


@dataclass
class PrefillCase:
    """Layer and prompt, with a note for every record."""

    shape: LayerShape
    rule: AttentionRule
    states: LayerStates
    note: str = ""

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.states.length

    def facts(self, density: float, num_retrieval_heads: int | None = None) -> dict[str, Any]:
        """Record fields that are known before the measurement."""
        retrieval = num_retrieval_heads or len(self.shape.retrieval_heads)
        return self.shape.facts(
            "prefill", self.states, self.rule, density, num_retrieval_heads=retrieval
        )


def bench_prefill(
    session: Session,
    shape: LayerShape,
    rules: Sequence[AttentionRule],
    lengths: Sequence[int],
    densities: Sequence[float],
    dtype: torch.dtype,
) -> None:
    """Measures a layer with random inputs at every length, sparse prefill with every rule and density."""
    for length in sorted(lengths):
        with session.guarded(f"prefill at {length:,} tokens"):
            states = LayerStates.random(shape, length, length, dtype, session.device)
            cases = [PrefillCase(shape, rule, states) for rule in rules]
            for case in cases:
                for density in densities:
                    measure_sparse(session, case, density)
            measure_dense(session, cases)
            del states, cases, case
        release(session.device)


def measure_sparse(session: Session, case: PrefillCase, density: float | None) -> None:
    """Measures sparse prefill at a density, or at that which the index selects if None."""
    if not session.wants("rtpurbo"):
        return
    layout = case.shape.layout(session.device)
    operator = SparsePrefill(layout, case.rule)
    states = case.states
    full, windowed = states.divided(layout)
    arguments = states.queries, full, windowed, states.index_queries, states.scaling
    if density is None:
        check_lists = operator.found_lists(*arguments)
        reached = density_of(check_lists, case.length, case.rule)
        note = "density as selected by the index"
    else:
        reached, note = operator.force(density, *arguments), ""
        assert operator.lists is not None
        check_lists = dict(operator.lists)
        reached = stated_density(density, reached, 0.05)
        if reached != density:
            note = f"density {density:g} requested, changed by near blocks and rounding"
    places = {head: place for place, head in enumerate(case.shape.retrieval_heads)}

    def mask(sequence: int, head: int, positions: Tensor) -> Tensor:
        sinks = case.rule.num_sink_tokens
        if head not in places:
            return near(positions, case.length, sinks, case.rule.sliding_window)
        seen = near(positions, case.length, sinks, case.rule.near_window)
        seen |= listed_keys(check_lists, places[head], positions, case.length)
        return seen & causal(positions, case.length)

    def check(call: Call) -> str | None:
        complaint = compare(call(), case.states, mask).complaint
        check_lists.clear()  # frees the lists of the index, which are large
        return complaint

    session.run(
        Entry(
            "rtpurbo",
            {"": lambda: partial(operator, *arguments)},
            case.facts(reached),
            check,
            is_ours=True,
            result_bytes=case.states.queries.nbytes,
            note="; ".join(filter(None, [case.note, note])),
        )
    )


def measure_dense(session: Session, cases: Sequence[PrefillCase]) -> None:
    """Measures dense retrieval heads in every case, and fully dense kernels once."""
    for case in cases:
        for entry in _windowed(case):
            session.run(entry)
    for entry in _dense(cases[0]):
        session.run(entry)


def _windowed(case: PrefillCase) -> Iterator[Entry]:
    choices = [
        ("rtpurbo-dense-retrieval", case.shape.retrieval_heads, "triton"),
        ("duo-attention-shape", case.shape.whole_groups(), "triton"),
    ]
    if case.length <= EAGER_LIMIT:
        choices.append(("eager", case.shape.retrieval_heads, "eager"))
    for name, heads, backend in choices:
        yield Entry(
            name,
            {"": partial(_headwise, case, heads, backend)},
            case.facts(1.0, len(heads)),
            partial(_check_dense, case, heads),
            is_ours=True,
            result_bytes=case.states.queries.nbytes,
            note=case.note,
        )

    if case.length <= FLEX_LIMIT:
        variants = {"": partial(flex_attention, case)}
        result = case.states.queries.nbytes
        yield Entry("flex", variants, case.facts(1.0), result_bytes=result, note=case.note)


def _headwise(case: PrefillCase, heads: Sequence[int], backend: str) -> Call:
    """Call of the public operator with dense retrieval heads."""
    states = case.states
    layout = case.shape.layout(states.queries.device, heads)
    full, windowed = states.divided(layout)
    full = replace(full, index_keys=None)
    rule = replace(case.rule, prefill_mode="dense")
    arguments = states.queries, states.positions, full, windowed, layout, None, rule

    def call() -> Tensor:
        output, _ = headwise_attention(*arguments, scaling=states.scaling, backend=backend)
        return output

    return call


def _check_dense(case: PrefillCase, heads: Sequence[int], call: Call) -> str | None:
    return compare(call(), case.states, dense_mask(case, heads)).complaint


def dense_mask(case: PrefillCase, heads: Sequence[int]) -> Mask:
    """Causal mask for `heads`, sinks and window for the others."""

    def mask(sequence: int, head: int, positions: Tensor) -> Tensor:
        if head in heads:
            return causal(positions, case.length)
        return near(positions, case.length, case.rule.num_sink_tokens, case.rule.sliding_window)

    return mask


def _dense(case: PrefillCase) -> Iterator[Entry]:
    states = case.states

    def prepare(name: str, grouped: bool) -> Call:
        attend = sdpa.attention(name, is_causal=True, grouped=grouped)
        keys, values = states.keys, states.values
        if not grouped:
            keys, values = (part.repeat_interleave(case.shape.group, 1) for part in (keys, values))
        return partial(attend, states.queries, keys, values, states.scaling)

    for name in sdpa.BACKENDS:
        variants = {
            "KV heads expanded beforehand": partial(prepare, name, False),
            "KV heads shared": partial(prepare, name, True),
        }
        result = states.queries.nbytes
        yield Entry(name, variants, case.facts(1.0), result_bytes=result, note=case.note)


def flex_attention(case: PrefillCase) -> Call:
    """Call of FlexAttention with dense retrieval heads, and windows for the others.

    It is compiled, and its block mask is created here, outside of the timing.
    """
    from torch.nn.attention import flex_attention as flex

    states, heads = case.states, case.shape.num_attention_heads
    device = states.queries.device
    retrieves = torch.zeros(heads, dtype=torch.bool, device=device)
    retrieves[list(case.shape.retrieval_heads)] = True
    sinks, window = case.rule.num_sink_tokens, case.rule.sliding_window

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        is_near = (key < sinks) | (query - key < window)
        return (query >= key) & (retrieves[head] | is_near)

    make: Any = flex.create_block_mask
    attend: Any = flex.flex_attention
    if device.type == "cuda":
        # Compiled, so that the whole mask is never materialised.
        make, attend = (torch.compile(function, dynamic=False) for function in (make, attend))
    blocks = make(mask, None, heads, states.length, states.length, device=str(device))
    return lambda: attend(
        states.queries,
        states.keys,
        states.values,
        block_mask=blocks,
        scale=states.scaling,
        enable_gqa=True,
    )

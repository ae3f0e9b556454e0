"""KV append and attention over pages with Triton kernels; equals `eager`, but decode kernels round selections.

All selecting queries of a step, of any request, form one decode call, each as a sequence of its own. The prompt
queries of all requests are one call of the prefill kernel, and the queries at the end of their prompts another one.
Nothing here waits for the GPU or iterates over requests. N queries select, P requests have other queries; for other
letters see `pages`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops import HeadLayout
from rtpurbo.ops.sinks import with_sinks
from rtpurbo.ops.states import PagedStates
from rtpurbo.serving.vllm.heavy_hitters import decode_table
from rtpurbo.serving.vllm.pages import LayerCache
from rtpurbo.serving.vllm.rank_heads import LayerHeads
from rtpurbo.serving.vllm.step_queries import PromptQueries, rounded_up, step_queries

if TYPE_CHECKING:
    from rtpurbo.ops.triton.heads import HeadTable

HISTOGRAM_BATCH = 64
"""Sequences that the histogram workspace suffices for: 1 MiB per retrieval head of the layer that has most."""


def append(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    rotary: tuple[Tensor, Tensor],
    norms: tuple[Any, Any, bool] | None,
    indexer: Any,
    full: LayerCache | None,
    windowed: LayerCache | None,
    layout: HeadLayout,
    rule: AttentionRule,
) -> tuple[Tensor, Tensor | None]:
    """Appends tokens to the pages in one launch.

    Args:
        queries: [T, H, D], as projected.
        keys: [T, KV heads, D], as projected.
        values: same shape.
        rotary: table of cosines and sines as in `RotaryTable`, and positions int64 [T].
        norms: RMSNorm modules of query and key heads, and whether their factor is 1 + weight; or None.
        indexer: indexer of the layer; None without retrieval heads.
        full: full KV heads of the layer; None if it has none.
        windowed: windowed KV heads of the layer; None if it has none.
        layout: query and KV heads by kind.
        rule: windows and selection.

    Returns:
        Queries [T, H, D] after norm and RoPE, and index queries [T, retrieval heads, index_dim] or None. In a uniform
        step, the index query of a prompt is zeros.
    """
    # Imported here, so that the module can be imported without Triton.
    from rtpurbo.ops.triton.decode.fused_append import (
        HeadNorm,
        IndexProjection,
        PagedSlots,
        RotaryTable,
        fused_kv_append,
    )

    norm = projection = lengths = prompt_lengths = None
    if norms is not None:
        query_norm, key_norm, unit_offset = norms
        norm = HeadNorm(
            query_norm.weight, key_norm.weight, query_norm.variance_epsilon, unit_offset
        )
    if indexer is not None and len(layout.retrieval):
        projection = IndexProjection(
            indexer.query_weight,
            indexer.key_weight,
            indexer.feature_dimensions,
            indexer.settings.index_space != "pre_rope",
        )
    # A missing cache is not written by any head: any pages will do.
    of_full, of_windowed = full or windowed, windowed or full
    assert of_full is not None
    assert of_windowed is not None
    batch = of_full.batch
    if batch.uniform and rule.prefill_mode == "dense":
        assert batch.device_prompt_lengths is not None
        lengths, prompt_lengths = batch.device_lengths, batch.device_prompt_lengths
    rotated, index_queries = fused_kv_append(
        queries[:, :, None],
        keys[:, :, None],
        values[:, :, None],
        RotaryTable(*rotary),
        norm,
        projection,
        layout,
        PagedSlots(
            full_slots=of_full.batch.slots,
            windowed_slots=of_windowed.batch.slots,
            full_keys=of_full.pages.keys,
            full_values=of_full.pages.values,
            windowed_keys=of_windowed.pages.keys,
            windowed_values=of_windowed.pages.values,
            index_keys=of_full.pages.index_keys,
            lengths=lengths,
            prompt_lengths=prompt_lengths,
            key_scale=of_full.pages.key_scale,
            value_scale=of_full.pages.value_scale,
        ),
    )
    return rotated[:, :, 0], None if index_queries is None else index_queries[:, :, 0]


def attend(
    queries: Tensor,
    index_queries: Tensor | None,
    full: LayerCache | None,
    windowed: LayerCache | None,
    layout: HeadLayout,
    rule: AttentionRule,
    scaling: float,
    output: Tensor,
    sinks: Tensor | None = None,
) -> None:
    """Writes the attention output of a step; arguments as in `eager.attend`.

    A uniform step depends on device tensors alone, so that it can be captured in a CUDA graph. It may be replayed when
    a query is the last one of a prompt, which must be dense in retrieval heads. The index query is zeros then (see
    `append`): all far keys have the same score and level, and `min_tokens` selects whole levels.
    """
    cache = full or windowed
    assert cache is not None
    if cache.batch.uniform:
        count = min(queries.shape[0], cache.batch.device_lengths.shape[0])
        of_full, of_windowed = (
            None
            if part is None
            else _paged(part, decode_table(part, rule)[:count], part.batch.device_lengths[:count])
            for part in (full, windowed)
        )
        chosen = None if index_queries is None else index_queries[:count]
        _decode(
            queries[:count],
            chosen,
            of_full,
            of_windowed,
            layout,
            rule,
            scaling,
            output[:count],
            sinks,
        )
        return
    step = step_queries(cache, rule)
    if step.selecting.numel():
        of_full, of_windowed = (
            None
            if part is None
            else _paged(part, step_queries(part, rule).block_table, step.lengths)
            for part in (full, windowed)
        )
        chosen_queries = queries[step.selecting]
        attended = torch.empty_like(chosen_queries)
        _decode(
            chosen_queries,
            None if index_queries is None else index_queries[step.selecting],
            of_full,
            of_windowed,
            layout,
            rule,
            scaling,
            attended,
            sinks,
        )
        output[step.selecting] = attended
    tables = _tables(layout, rule)
    log_sum_exp = None
    if sinks is not None and (step.prompts.most or step.dense.most):
        log_sum_exp = _infinite_sums(queries)
    parts = [
        (part, step_queries(part, rule), name)
        for part, name in ((full, "full"), (windowed, "windowed"))
        if part is not None
    ]
    launches = [
        [(part, of_group.prompts, tables[f"prompts_{name}"]) for part, of_group, name in parts]
    ]
    # Dense queries come last: they replace the results for the local heads. Where blocks are missing, they have other
    # positions in each group, hence a launch for each.
    launches += [
        [(part, of_group.dense, tables[f"dense_local_{name}"])] for part, of_group, name in parts
    ]
    for sources in launches:
        _prefill(queries, sources, rule, scaling, output, log_sum_exp)
    if sinks is not None and log_sum_exp is not None:
        # Queries of the decode call have infinite sums here, of which sinks have no share.
        shared, _ = with_sinks(output[None].transpose(1, 2), log_sum_exp, sinks)
        output.copy_(shared[0].transpose(0, 1))


def _infinite_sums(queries: Tensor) -> Tensor:
    """Log-sum-exp fp32 [1, H, T] for the prefill kernels to fill in, infinite for other queries."""
    tokens, heads = queries.shape[:2]
    # Triton compiles another kernel for strides that are not multiples of 16.
    sums = queries.new_full((1, heads, rounded_up(tokens)), torch.inf, dtype=torch.float32)
    return sums[..., :tokens]


def _tables(layout: HeadLayout, rule: AttentionRule) -> dict[str, HeadTable]:
    """Head tables of the prefill launches of full and windowed KV heads, cached per layout and window."""
    from rtpurbo.ops.triton.heads import EVERYTHING, HeadTable
    from rtpurbo.ops.triton.headwise import head_tables

    key = ("serving", rule.sliding_window)
    if key not in layout.derived:
        tables = head_tables(layout, rule)
        layout.derived[key] = {
            "prompts_full": tables["dense_and_local_full"],
            "prompts_windowed": tables["local_windowed"],
            "dense_local_full": HeadTable.build(layout.local_full, EVERYTHING),
            "dense_local_windowed": HeadTable.build(layout.local_windowed, EVERYTHING),
        }
    cached: dict[str, HeadTable] = layout.derived[key]
    return cached


def _paged(cache: LayerCache, block_table: Tensor, lengths: Tensor) -> PagedStates:
    pages = cache.pages
    return PagedStates(
        pages.keys, pages.values, block_table, lengths, pages.index_keys, cache.histograms
    )


def new_histograms(heads: Sequence[LayerHeads]) -> Tensor:
    """Histogram workspace for all layers of a rank, which run one after the other, on the default device.

    Batches of more than `HISTOGRAM_BATCH` sequences, and the reading `paper`, which needs two histograms for each head,
    allocate their own in each layer, which costs a launch.
    """
    from rtpurbo.ops.triton.decode.workspace import zero_histograms

    largest = max(len(of_layer.retrieval) for of_layer in heads)
    return zero_histograms(largest * HISTOGRAM_BATCH, torch.get_default_device())


def _histograms(workspace: Tensor | None, batch: int, num_retrieval: int) -> Tensor | None:
    """The part of the workspace for a batch; None if it does not suffice."""
    rows = batch * num_retrieval
    return workspace[:rows] if workspace is not None and rows <= len(workspace) else None


def _without_heads(states: PagedStates) -> PagedStates:
    """The same pages, of which no head is used."""
    return PagedStates(states.keys[:, :0], states.values[:, :0], states.block_table, states.lengths)


def _decode(
    queries: Tensor,
    index_queries: Tensor | None,
    full: PagedStates | None,
    windowed: PagedStates | None,
    layout: HeadLayout,
    rule: AttentionRule,
    scaling: float,
    output: Tensor,
    sinks: Tensor | None,
) -> None:
    """Writes the decode attention [N, H, D] of queries [N, H, D] and index queries [N, retrieval heads, index_dim]."""
    from rtpurbo.ops.triton.decode.attention import decode_step

    some = full or windowed
    assert some is not None
    if full is not None:
        workspace = _histograms(full.histogram_workspace, len(queries), len(layout.retrieval))
        full = replace(full, histogram_workspace=workspace)
    decode_step(
        queries[:, :, None],
        full or _without_heads(some),
        windowed or _without_heads(some),
        layout,
        None if index_queries is None else index_queries[:, :, None],
        rule,
        scaling=scaling,
        sinks=sinks,
        output=output[:, :, None],
    )


def _prefill(
    queries: Tensor,
    sources: Sequence[tuple[LayerCache, PromptQueries, HeadTable]],
    rule: AttentionRule,
    scaling: float,
    output: Tensor,
    log_sum_exp: Tensor | None,
) -> None:
    """Writes the attention of prompt queries of all requests, without learned sinks, for the heads in the tables.

    The queries of all sources are the same, and at the same positions.
    """
    from rtpurbo.ops.triton.prefill import hopper, portable

    prompts = sources[0][1]
    paged = [
        (_paged(cache, of_group.block_table, of_group.counts), table)
        for cache, of_group, table in sources
        if len(table)
    ]
    if not prompts.most or not paged:
        return
    states = queries[None].transpose(1, 2)
    on_hopper = all(hopper.supports_pages(states, pages) for pages, _ in paged)
    kernels: Any = hopper if on_hopper else portable
    kernels.window_attention(
        states,
        paged,
        prompts.starts,
        rule.num_sink_tokens,
        scaling,
        output[None].transpose(1, 2),
        log_sum_exp,
        portable.PackedQueries(prompts.offsets, prompts.counts, prompts.most),
    )

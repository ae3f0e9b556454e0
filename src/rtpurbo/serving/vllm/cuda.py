"""Attention over pages with Triton kernels; equals `eager`, except that decode kernels round selections.

All selecting queries of a step, of any request, form one decode call, each as a sequence of its own. The prompt
queries of each request are one call of the prefill kernels. N queries select; for other letters see `pages`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops import HeadGroup, HeadLayout
from rtpurbo.ops.states import PagedStates
from rtpurbo.serving.vllm.pages import Batch, LayerCache, no_states


@dataclass(frozen=True)
class PromptQueries:
    """Consecutive queries of one request that do not select.

    Attributes:
        start: first query.
        end: end of the range, exclusive.
        request: index of the request.
        length: int32 [1], tokens of the request up to the last of these queries, on the device.
    """

    start: int
    end: int
    request: int
    length: Tensor


@dataclass(frozen=True)
class StepQueries:
    """Queries of a step by kernel; the same for all layers and groups.

    Attributes:
        selecting: int64 [N], indices of the selecting queries.
        requests: int64 [N], requests of these queries.
        lengths: int32 [N], tokens of the request up to each query.
        prompts: queries that do not select.
    """

    selecting: Tensor
    requests: Tensor
    lengths: Tensor
    prompts: tuple[PromptQueries, ...]


def attend(
    queries: Tensor,
    index_queries: Tensor | None,
    full: LayerCache | None,
    windowed: LayerCache | None,
    layout: HeadLayout,
    rule: AttentionRule,
    scaling: float,
    output: Tensor,
) -> None:
    """Writes the attention output of a step; arguments as in `eager.attend`."""
    cache = full or windowed
    assert cache is not None
    if cache.batch.uniform:
        _attend_uniform(queries, index_queries, full, windowed, layout, rule, scaling, output)
        return
    step = _step_queries(cache.batch, rule)
    if step.selecting.numel():
        chosen = None
        if index_queries is not None:
            chosen = index_queries[:, step.selecting].transpose(0, 1)
        output[step.selecting] = _decoded(
            queries[step.selecting],
            chosen,
            _per_query(full, step),
            _per_query(windowed, step),
            layout,
            rule,
            scaling,
        )
    for prompt in step.prompts:
        output[prompt.start : prompt.end] = _prefilled(
            queries[prompt.start : prompt.end],
            _of_prompt(full, prompt),
            _of_prompt(windowed, prompt),
            layout,
            rule,
            scaling,
        )


def _attend_uniform(
    queries: Tensor,
    index_queries: Tensor | None,
    full: LayerCache | None,
    windowed: LayerCache | None,
    layout: HeadLayout,
    rule: AttentionRule,
    scaling: float,
    output: Tensor,
) -> None:
    """Attention of one query per request, without host synchronisation, so that it can be captured in a CUDA graph.

    A graph may be replayed when a query is the last one of a prompt, which must be dense. Its index query is set to
    zeros: then all far keys have the same score and level, and `min_tokens` selects whole levels.
    """
    cache = full or windowed
    assert cache is not None
    batch = cache.batch
    count = min(queries.shape[0], batch.device_lengths.shape[0])
    lengths = batch.device_lengths[:count]
    chosen = None
    if index_queries is not None:
        chosen = index_queries[:, :count].transpose(0, 1)
        if rule.prefill_mode == "dense":
            assert batch.device_prompt_lengths is not None
            selects = lengths > batch.device_prompt_lengths[:count]
            chosen = chosen * selects[:, None, None]
            rule = replace(rule, min_tokens=max(1, rule.min_tokens))
    of_full, of_windowed = (
        None if part is None else _paged(part, part.batch.block_table[:count], lengths)
        for part in (full, windowed)
    )
    output[:count] = _decoded(queries[:count], chosen, of_full, of_windowed, layout, rule, scaling)


def _step_queries(batch: Batch, rule: AttentionRule) -> StepQueries:
    """Queries of a step by kernel, computed by the first layer and cached in the batch."""
    if batch.step_queries is None:
        device = batch.block_table.device
        single: list[tuple[int, int, int]] = []
        prompts: list[tuple[int, int, int, int]] = []
        for request, start, end, length in batch.requests():
            first = end - batch.num_selecting_queries(request, rule)
            if start < first:
                prompts.append((start, first, request, length - (end - first)))
            single += [(query, request, length - (end - 1 - query)) for query in range(first, end)]
        selecting = torch.tensor(single, dtype=torch.int64).reshape(-1, 3).to(device)
        ends = torch.tensor([end for *_, end in prompts], dtype=torch.int32).to(device)
        batch.step_queries = StepQueries(
            selecting[:, 0],
            selecting[:, 1],
            selecting[:, 2].to(torch.int32),
            tuple(
                PromptQueries(start, end, request, ends[number : number + 1])
                for number, (start, end, request, _) in enumerate(prompts)
            ),
        )
    assert isinstance(batch.step_queries, StepQueries)
    return batch.step_queries


def _paged(cache: LayerCache, block_table: Tensor, lengths: Tensor) -> PagedStates:
    pages = cache.pages
    return PagedStates(pages.keys, pages.values, block_table, lengths, pages.index_keys)


def _per_query(cache: LayerCache | None, step: StepQueries) -> PagedStates | None:
    """Paged states of the selecting queries, each as a sequence that ends with it."""
    if cache is None:
        return None
    return _paged(cache, cache.batch.block_table[step.requests], step.lengths)


def _of_prompt(cache: LayerCache | None, prompt: PromptQueries) -> PagedStates | None:
    """Paged states of a request, up to the last of some queries."""
    if cache is None:
        return None
    return _paged(cache, cache.batch.block_table[prompt.request][None], prompt.length)


def _prefilled(
    queries: Tensor,
    full: PagedStates | None,
    windowed: PagedStates | None,
    layout: HeadLayout,
    rule: AttentionRule,
    scaling: float,
) -> Tensor:
    """Prefill attention [queries, H, D], with dense retrieval heads."""
    # Imported here, so that the module can be imported without Triton.
    from rtpurbo.ops.triton.headwise import prefill_attention

    # Missing states are not read by any head: any states will do.
    full, windowed = full or windowed, windowed or full
    assert full is not None
    assert windowed is not None
    output, _ = prefill_attention(
        queries[None].transpose(1, 2), full, windowed, layout, None, rule, scaling=scaling
    )
    return output[0].transpose(0, 1)


def _decoded(
    queries: Tensor,
    index_queries: Tensor | None,
    full: PagedStates | None,
    windowed: PagedStates | None,
    layout: HeadLayout,
    rule: AttentionRule,
    scaling: float,
) -> Tensor:
    """Decode attention [N, H, D] of queries [N, H, D] and index queries [N, retrieval heads, index_dim].

    The decode kernels support pages for full KV heads only. So query heads of windowed KV heads are a second call, in
    which their KV heads are passed as full ones with local heads only.
    """
    from rtpurbo.ops.triton.decode.attention import decode_attention

    output = torch.empty_like(queries)
    # Windowed KV heads have no retrieval heads, so their window is that of local heads.
    calls = ((full, "full", rule), (windowed, "windowed", replace(rule, retrieval_window=None)))
    for states, kind, call_rule in calls:
        if states is None:
            continue
        heads, part = _part_of(layout, kind)
        retrieves = index_queries is not None and len(part.retrieval) > 0
        attended, _ = decode_attention(
            queries[:, heads, None],
            states,
            no_states(queries, queries.shape[0]),
            part,
            index_queries[:, :, None] if retrieves and index_queries is not None else None,
            call_rule,
            scaling=scaling,
        )
        output[:, heads] = attended[:, :, 0]
    return output


def _part_of(layout: HeadLayout, kind: str) -> tuple[Tensor, HeadLayout]:
    """Query heads of the full or of the windowed KV heads, and a layout of these heads alone."""
    key = ("served", kind)
    if key not in layout.derived:
        kept = layout.full_key_value_heads if kind == "full" else layout.windowed_key_value_heads
        num_key_value_heads = (
            layout.full_key_value_heads.numel() + layout.windowed_key_value_heads.numel()
        )
        group = layout.order.numel() // num_key_value_heads
        device = layout.order.device
        heads = (kept[:, None] * group + torch.arange(group, device=device)).flatten()
        retrieval = torch.empty(0, dtype=torch.int64, device=device)
        if kind == "full":
            retrieval = torch.searchsorted(heads, layout.retrieval.heads)
        everything = torch.arange(heads.numel(), device=device)
        local = everything[~torch.isin(everything, retrieval)]
        no_heads = HeadGroup(everything[:0], everything[:0])
        layout.derived[key] = (
            heads,
            HeadLayout(
                HeadGroup(retrieval, retrieval // group),
                HeadGroup(local, local // group),
                no_heads,
                torch.arange(kept.numel(), device=device),
                everything[:0],
                torch.cat([retrieval, local]).argsort(),
            ),
        )
    return layout.derived[key]

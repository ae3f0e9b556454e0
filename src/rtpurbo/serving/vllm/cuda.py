"""Attention over pages by kernels, equal to `eager` but for what decoding kernels round in a selection.

Rows that select, of whatever requests, make one decoding step, each as a sequence of its own. The
prompt rows of a request are one call of the prefill kernels. N rows select; for the rest see `pages`.
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
class PromptRows:
    """Consecutive rows of one request that do not select.

    Attributes:
        start: their first row.
        end: behind their last.
        request: whose they are.
        length: int32 [1], tokens up to the last of these rows, on the device.
    """

    start: int
    end: int
    request: int
    length: Tensor


@dataclass(frozen=True)
class Division:
    """How a step's rows are shared among kernels; the same for all layers and groups.

    Attributes:
        selecting: int64 [N], rows.
        requests: int64 [N], whose they are.
        lengths: int32 [N], tokens up to each row.
        prompts: rows that do not select.
    """

    selecting: Tensor
    requests: Tensor
    lengths: Tensor
    prompts: tuple[PromptRows, ...]


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
    """Writes the attention of a step's rows; arguments as in `eager.attend`."""
    held = full or windowed
    assert held is not None
    if held.batch.uniform:
        _attend_uniform(queries, index_queries, full, windowed, layout, rule, scaling, output)
        return
    division = _divided(held.batch, rule)
    if division.selecting.numel():
        chosen = None
        if index_queries is not None:
            chosen = index_queries[:, division.selecting].transpose(0, 1)
        output[division.selecting] = _decoded(
            queries[division.selecting],
            chosen,
            _of_rows(full, division),
            _of_rows(windowed, division),
            layout,
            rule,
            scaling,
        )
    for prompt in division.prompts:
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
    """One row of each request, divided on the device, so that a graph of it serves any step.

    A graph may be replayed where the one row is the last of a prompt, and must be dense. An index query
    of zeros sees to it: all far keys score alike, so all share the level that the floor reads whole.
    """
    held = full or windowed
    assert held is not None
    batch = held.batch
    rows = min(queries.shape[0], batch.device_lengths.shape[0])
    lengths = batch.device_lengths[:rows]
    chosen = None
    if index_queries is not None:
        chosen = index_queries[:, :rows].transpose(0, 1)
        if rule.prefill_mode == "dense":
            assert batch.device_prompt_lengths is not None
            selects = lengths > batch.device_prompt_lengths[:rows]
            chosen = chosen * selects[:, None, None]
            rule = replace(rule, min_tokens=max(1, rule.min_tokens))
    of_full, of_windowed = (
        None if cache is None else _paged(cache, cache.batch.block_table[:rows], lengths)
        for cache in (full, windowed)
    )
    output[:rows] = _decoded(queries[:rows], chosen, of_full, of_windowed, layout, rule, scaling)


def _divided(batch: Batch, rule: AttentionRule) -> Division:
    """The division of a step, worked out by the first layer that asks."""
    if batch.division is None:
        device = batch.block_table.device
        rows: list[tuple[int, int, int]] = []
        prompts: list[tuple[int, int, int, int]] = []
        for request, start, end, length in batch.requests():
            first = end - batch.num_selecting_rows(request, rule)
            if start < first:
                prompts.append((start, first, request, length - (end - first)))
            rows += [(row, request, length - (end - 1 - row)) for row in range(first, end)]
        selecting = torch.tensor(rows, dtype=torch.int64).reshape(-1, 3).to(device)
        ends = torch.tensor([end for *_, end in prompts], dtype=torch.int32).to(device)
        batch.division = Division(
            selecting[:, 0],
            selecting[:, 1],
            selecting[:, 2].to(torch.int32),
            tuple(
                PromptRows(start, end, request, ends[number : number + 1])
                for number, (start, end, request, _) in enumerate(prompts)
            ),
        )
    assert isinstance(batch.division, Division)
    return batch.division


def _paged(cache: LayerCache, block_table: Tensor, lengths: Tensor) -> PagedStates:
    pages = cache.pages
    return PagedStates(pages.keys, pages.values, block_table, lengths, pages.index_keys)


def _of_rows(cache: LayerCache | None, division: Division) -> PagedStates | None:
    """Each selecting row as a sequence that ends with it."""
    if cache is None:
        return None
    return _paged(cache, cache.batch.block_table[division.requests], division.lengths)


def _of_prompt(cache: LayerCache | None, prompt: PromptRows) -> PagedStates | None:
    """A request up to the last of some rows."""
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
    """[rows, H, D], dense for retrieval heads."""
    # Where there are no kernels, nothing here is called, but the module can be imported.
    from rtpurbo.ops.triton.headwise import prefill_attention

    # No head reads states of which the layer has none.
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
    """[N, H, D] of queries [N, H, D] and index queries [N, retrieval heads, index_dim].

    The kernels know pages of full KV heads only, so heads of windowed ones are a call of their own, in
    which they are local heads of KV heads that happen to hold no more than they need.
    """
    from rtpurbo.ops.triton.decode.attention import decode_attention

    output = torch.empty_like(queries)
    # Local heads have the one window, retrieval heads perhaps another.
    calls = ((full, "full", rule), (windowed, "windowed", replace(rule, retrieval_window=None)))
    for states, kind, its_rule in calls:
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
            its_rule,
            scaling=scaling,
        )
        output[:, heads] = attended[:, :, 0]
    return output


def _part_of(layout: HeadLayout, kind: str) -> tuple[Tensor, HeadLayout]:
    """The query heads of a layer's full or windowed KV heads, and their layout without the others."""
    key = ("served", kind)
    if key not in layout.derived:
        kept = layout.full_key_value_heads if kind == "full" else layout.windowed_key_value_heads
        of_layer = layout.full_key_value_heads.numel() + layout.windowed_key_value_heads.numel()
        group = layout.order.numel() // of_layer
        device = layout.order.device
        heads = (kept[:, None] * group + torch.arange(group, device=device)).flatten()
        retrieval = torch.empty(0, dtype=torch.int64, device=device)
        if kind == "full":
            retrieval = torch.searchsorted(heads, layout.retrieval.heads)
        everything = torch.arange(heads.numel(), device=device)
        local = everything[~torch.isin(everything, retrieval)]
        nobody = HeadGroup(everything[:0], everything[:0])
        layout.derived[key] = (
            heads,
            HeadLayout(
                HeadGroup(retrieval, retrieval // group),
                HeadGroup(local, local // group),
                nobody,
                torch.arange(kept.numel(), device=device),
                everything[:0],
                torch.cat([retrieval, local]).argsort(),
            ),
        )
    return layout.derived[key]

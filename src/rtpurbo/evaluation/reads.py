"""Tokens that retrieval heads read, by query, and their attention recall."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.config import AttentionRule, HeadMap
from rtpurbo.models.arguments import named
from rtpurbo.models.cache_layers import GrowingBuffer
from rtpurbo.models.slots import positions_of
from rtpurbo.models.sparse_layer import LayerObservation
from rtpurbo.models.sparse_layers import headwise_modules, is_sparse
from rtpurbo.ops import SelectionQueries, SelectionStatistics
from rtpurbo.ops.eager.attend import attention_logits
from rtpurbo.ops.eager.visibility import causal_mask, near_mask, query_chunks

# Of rows that come together, every so many is measured unless a meter sets another stride.
ROW_STRIDE = 8
# Where kernels decode, a step that is measured runs eager, for many times as long as a replayed graph:
# every fourth of the first 32 steps of an answer does, so that a long answer costs no more than eight.
STEP_STRIDE = 4
STEPS_WATCHED = 32


@dataclass(frozen=True)
class Reads:
    """Tokens read in a test; a row is one query of one head.

    Attributes:
        tokens_mean: tokens read, sinks and window included; None if no row was measured, as with
            the two after it.
        tokens_p50: half of the rows read no more.
        tokens_p95: of 100 rows, 95 read no more.
        mass_kept: mean share of a row's full attention that lies on what it reads.
        far_tokens_mean: tokens read beyond sinks and window, of the rows that have any.
        far_rows: how many those are.
        far_share: what share of the tokens at hand they read; None if there are no such rows.
        far_histogram: rows that have any by the far tokens that they read: none, 1, 2 to 3, 4 to 7,
            and so on in powers of two.
        rows: how many were measured.
    """

    tokens_mean: float | None = None
    tokens_p50: float | None = None
    tokens_p95: float | None = None
    mass_kept: float | None = None
    far_tokens_mean: float = 0.0
    far_rows: int = 0
    far_share: float | None = None
    far_histogram: tuple[int, ...] = ()
    rows: int = 0


@dataclass
class ReadMeter(SelectionStatistics):
    """Measures rows that select, while `metering` lets it.

    Figures stay on the device until `reads` is asked, so that nothing waits for them.

    Attributes:
        row_stride: of rows that come together, every so many is measured.
    """

    row_stride: int = ROW_STRIDE

    def __post_init__(self) -> None:
        # Each [4, rows]: tokens read, far tokens read, far tokens available, attention recall.
        self._measured: list[Tensor] = []
        self._active: Tensor | None = None

    def begin(self, active: Tensor | None, measure: bool) -> None:
        """Announces a forward: which sequences [batch] still write, and whether its rows count."""
        self._active = active
        self.needs_queries = measure

    def add(self, far: Tensor, selected: Tensor) -> None:
        """Ignores the kernels' counts, which lack the attention mass."""

    def add_counts(self, far_keys: float, far_keys_read: float, rows: int) -> None:
        """Ignores the kernels' counts."""

    def add_queries(self, rows: SelectionQueries, selected: Tensor) -> None:
        """Measures rows; see `SelectionStatistics.add_queries`."""
        if not self.needs_queries:
            return
        stride = self.row_stride if rows.logits.shape[2] > 1 else 1
        near, far, selected, logits = (
            part[:, :, ::stride] for part in (rows.near, rows.far, selected, rows.logits)
        )
        read = near | selected
        everything = logits.masked_fill(~(near | far), -torch.inf).logsumexp(-1)
        kept = logits.masked_fill(~read, -torch.inf).logsumexp(-1)
        self._keep(
            read.expand(logits.shape).sum(-1),
            selected.sum(-1),
            far.sum(-1).expand(kept.shape),
            (kept - everything).exp(),
            rows.query_positions[:, None, ::stride].expand(kept.shape),
        )

    def add_dense_rows(self, positions: Tensor, num_heads: int) -> None:
        """Adds rows at these positions int64 [batch, rows] that read all they may."""
        if self.needs_queries:
            positions = positions[:, None, :: self.row_stride if positions.shape[1] > 1 else 1]
            positions = positions.expand(-1, num_heads, -1)
            tokens = positions + 1
            # A dense model has no window: all that it reads counts as far.
            self._keep(tokens, tokens, tokens, torch.ones_like(tokens), positions)

    def _keep(
        self, tokens: Tensor, far_read: Tensor, far: Tensor, mass: Tensor, positions: Tensor
    ) -> None:
        real = positions >= 0
        if self._active is not None:
            real = real & self._active[:, None, None]
        parts = [part.float() for part in (tokens, far_read, far, mass)]
        # Rows that do not count are marked, not taken out: that would wait for the device.
        parts[0] = parts[0].masked_fill(~real, -1)
        self._measured.append(torch.stack([part.flatten() for part in parts]))

    def measured(self) -> NDArray[np.float32]:
        """Returns the measurements so far, float32 [4, queries].

        They are: tokens read, far tokens read, far tokens at hand, attention recall.
        """
        # Few and large tensors leave a device faster than many small ones.
        by_device: dict[torch.device, list[Tensor]] = {}
        for part in self._measured:
            by_device.setdefault(part.device, []).append(part)
        joined = [torch.cat(parts, 1).to("cpu") for parts in by_device.values()]
        measured = torch.cat(joined, 1) if joined else torch.zeros(4, 0)
        array: NDArray[np.float32] = measured[:, measured[0] >= 0].numpy()
        return array

    def reads(self) -> Reads:
        """Figures measured so far."""
        return reads_of(self.measured())


def reads_of(measured: NDArray[np.float32]) -> Reads:
    """Returns the figures of an array that `ReadMeter.measured` returned."""
    tokens, far_read, far, mass = torch.from_numpy(measured).double()
    if not tokens.numel():
        return Reads()
    with_far = far > 0
    some_far = bool(with_far.any())
    # quantile takes at most 2**24 numbers; this takes any.
    ordered = tokens.sort().values
    median, high = (
        float(ordered[max(0, -(-ordered.numel() * part // 100) - 1)]) for part in (50, 95)
    )
    return Reads(
        float(tokens.mean()),
        median,
        high,
        float(mass.mean()),
        float(far_read[with_far].mean()) if some_far else 0.0,
        int(with_far.sum()),
        float(far_read.sum() / far.sum()) if some_far else None,
        _histogram(far_read[with_far]),
        tokens.numel(),
    )


def _histogram(counts: Tensor) -> tuple[int, ...]:
    """Histogram of counts, in the bins 0, 1, 2 to 3, 4 to 7, ..."""
    # The exponent e of m * 2**e with m from 1/2 to 1: 0 for 0, 1 for 1, 2 for 2 and 3.
    bins = torch.frexp(counts).exponent
    return tuple(torch.bincount(bins).tolist()) if bins.numel() else ()


class WindowReader:
    """Shows a meter what heads would read that have become local: sinks and window.

    Their caches no longer hold the other keys, so this keeps keys of its own.

    Args:
        meter: measures.
        head_map: the heads that retrieved before.
        rule: sinks and window.
    """

    def __init__(self, meter: ReadMeter, head_map: HeadMap, rule: AttentionRule) -> None:
        self.meter, self.head_map, self.rule = meter, head_map, rule
        self._keys: dict[int, GrowingBuffer] = {}
        self._positions: dict[int, GrowingBuffer] = {}

    def __call__(self, observation: LayerObservation) -> None:
        """Takes the states of a layer; more than one row at once begins a new prompt."""
        layer, positions = observation.layer, observation.positions
        heads = list(self.head_map.retrieval_heads[layer] or ())
        if not heads:
            return
        if positions.shape[1] > 1 or layer not in self._keys:
            self._keys[layer], self._positions[layer] = GrowingBuffer(), GrowingBuffer()
        group = self.head_map.group_size(layer)
        kv_heads = [head // group for head in heads]
        keys = self._keys[layer].append(observation.keys[:, sorted(set(kv_heads))])
        labels = self._positions[layer].append(positions[:, None, :, None])[:, 0, :, 0]
        if not self.meter.needs_queries:
            return
        order = {kv_head: place for place, kv_head in enumerate(sorted(set(kv_heads)))}
        keys = keys[:, [order[kv_head] for kv_head in kv_heads]]
        queries = observation.queries[:, heads]
        per_row = keys.shape[0] * keys.shape[1] * keys.shape[2]
        for chunk in query_chunks(queries.shape[2], per_row, ROW_STRIDE):
            rows, own = queries[:, :, chunk], positions[:, chunk]
            near = near_mask(own, labels, self.rule.near_window, self.rule.num_sink_tokens)
            logits = attention_logits(rows, keys, observation.scaling)
            far = causal_mask(own, labels) & ~near
            selection = SelectionQueries(rows, keys, own, labels, logits, near, far, logits.clone)
            self.meter.add_queries(selection, torch.zeros_like(logits, dtype=torch.bool))


class ForwardWatch:
    """Tells a meter of every forward of a model before it runs, and whether its rows count.

    Where kernels decode, a step whose rows do not count must find nobody watching, so that a graph
    can be replayed. That is decided before anything of the model's own forward, in whose place the
    graph may stand; no module within is then called. A base model that is called without its head
    announces itself.

    A reader needs the keys of every step up to the last that counts, so none before it is replayed.

    Args:
        model: dense or sparse.
        meter: measures.
        head_map: the heads that retrieve, where the model itself has none.
        stop_ids: tokens that end or pad a sequence.
        reader: shown the states of heads that have become local; None where heads retrieve.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        meter: ReadMeter,
        head_map: HeadMap,
        stop_ids: Collection[int],
        reader: WindowReader | None = None,
    ) -> None:
        self.model, self.meter, self.head_map, self.reader = model, meter, head_map, reader
        self._is_dense = not is_sparse(model)
        self._modules = [] if self._is_dense else headwise_modules(model)
        self._stops = torch.tensor(sorted(stop_ids), device=model.device)
        self._steps = 0
        self._is_told = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watches the forwards inside a `with` block."""
        hooks = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            self.model.register_forward_hook(self._end, always_call=True),
            self.model.base_model.register_forward_pre_hook(
                self._begin_base, with_kwargs=True, prepend=True
            ),
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._count_in(None)
            self._show(None)

    def _begin(self, module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        self._is_told = True
        self._tell(named(module, arguments, keywords))

    def _end(self, *_: Any) -> None:
        self._is_told = False

    def _begin_base(self, module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        # A step that is captured calls the base model several times, and is one step.
        if not self._is_told:
            self._tell(named(module, arguments, keywords))

    def _tell(self, given: dict[str, Any]) -> None:
        ids, active = given["input_ids"], None
        if ids.shape[1] > 1:
            self._steps = 0
            counts = given.get("use_cache") is False
            self._show(self.reader)
        else:
            counts = step_counts(self._steps, ids.device)
            if not any_step_counts_from(self._steps, ids.device):
                self._show(None)
            self._steps += 1
            if counts:
                active = ~torch.isin(ids[:, 0], self._stops)
        if counts != self.meter.needs_queries:
            self._count_in(self.meter if counts else None)
        self.meter.begin(active, counts)
        if self._is_dense:
            self.meter.add_dense_rows(_positions(given), self.head_map.num_retrieval_heads)

    def _count_in(self, meter: ReadMeter | None) -> None:
        for module in self._modules:
            module.statistics = meter

    def _show(self, reader: WindowReader | None) -> None:
        if self.reader is not None:
            for module in self._modules:
                module.observer = reader


def step_counts(step: int, device: torch.device) -> bool:
    """True if a decoding step is measured; steps of an answer count from 0."""
    if device.type != "cuda":
        return True
    return any_step_counts_from(step, device) and step % STEP_STRIDE == 0


def any_step_counts_from(step: int, device: torch.device) -> bool:
    """True if a decoding step or any later one may be measured."""
    return device.type != "cuda" or step < STEPS_WATCHED


@contextmanager
def metering(
    model: PreTrainedModel, head_map: HeadMap, stop_ids: Collection[int]
) -> Iterator[ReadMeter]:
    """Measures what retrieval heads read in the forwards inside.

    Rows count that select, as decoding rows do (on a GPU those of some steps, `step_counts`); without
    a cache, all rows do. Sequences that have ended and wait for others of their batch do not count. A
    dense model's rows read everything; where no head of a sparse model retrieves, those of `head_map`
    read sinks and window.

    Args:
        model: dense or sparse.
        head_map: the heads that retrieve, where the model itself has none.
        stop_ids: tokens that end or pad a sequence.
    """
    meter = ReadMeter(row_stride=ROW_STRIDE)
    reader = None
    if is_sparse(model) and not model.rtpurbo_config.head_map.num_retrieval_heads:
        reader = WindowReader(meter, head_map, model.rtpurbo_config.attention)
    with ForwardWatch(model, meter, head_map, stop_ids, reader).watching():
        yield meter


def _positions(arguments: dict[str, Any]) -> Tensor:
    """Positions int64 [batch, new] of what enters a dense model."""
    ids, mask = arguments["input_ids"], arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return positions_of(mask)[:, -ids.shape[1] :]
    if arguments.get("position_ids") is not None:
        return arguments["position_ids"]
    return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)

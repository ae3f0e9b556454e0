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
from rtpurbo.models.runtime import attributes_set
from rtpurbo.models.slots import positions_of
from rtpurbo.models.sparse_layer import LayerObservation
from rtpurbo.models.sparse_layers import headwise_modules, is_sparse
from rtpurbo.ops import SelectionQueries, SelectionStatistics
from rtpurbo.ops.eager.attend import attention_logits
from rtpurbo.ops.eager.visibility import causal_mask, near_mask, query_chunks

# Default stride of the measured queries of a prefill.
QUERY_STRIDE = 8
# With kernels, a measured decode step runs eager, which takes many times as long as the replay of a CUDA graph:
# every fourth of the first 32 steps of an answer is measured, at most eight.
STEP_STRIDE = 4
STEPS_WATCHED = 32


@dataclass(frozen=True)
class Reads:
    """Tokens read in a case, over the measured queries of all heads.

    Attributes:
        tokens_mean: mean number of tokens read, sinks and window included; None if no query was measured,
            as for the next two.
        tokens_p50: median.
        tokens_p95: 95th percentile.
        recall: mean attention recall.
        far_tokens_mean: mean number of far tokens read, over queries that have far tokens.
        far_queries: number of these queries.
        far_share: share of their far tokens that they read; None if there are no such queries.
        far_histogram: number of these queries by far tokens read: none, 1, 2 to 3, 4 to 7, and so on in
            powers of two.
        queries: number of measured queries.
    """

    tokens_mean: float | None = None
    tokens_p50: float | None = None
    tokens_p95: float | None = None
    recall: float | None = None
    far_tokens_mean: float = 0.0
    far_queries: int = 0
    far_share: float | None = None
    far_histogram: tuple[int, ...] = ()
    queries: int = 0


@dataclass
class ReadMeter(SelectionStatistics):
    """Measures queries that select, inside `metering`.

    Measurements stay on the device until `reads` or `measured` is called, to avoid device synchronisations.

    Attributes:
        query_stride: stride of the measured queries of a prefill.
    """

    query_stride: int = QUERY_STRIDE

    def __post_init__(self) -> None:
        # Each [4, queries]: tokens read, far tokens read, far tokens, attention recall.
        self._measured: list[Tensor] = []
        self._active: Tensor | None = None

    def begin(self, active: Tensor | None, measure: bool) -> None:
        """Prepares for a forward pass, of which queries are measured or not.

        Active sequences, bool [batch], have not ended; None if all are active.
        """
        self._active = active
        self.needs_queries = measure

    def add(self, far: Tensor, selected: Tensor) -> None:
        """Ignores the kernels' counts, which lack the attention mass."""

    def add_counts(self, far_keys: float, far_keys_read: float, queries: int) -> None:
        """Ignores the kernels' counts."""

    def add_queries(self, queries: SelectionQueries, selected: Tensor) -> None:
        """Measures queries; see `SelectionStatistics.add_queries`."""
        if not self.needs_queries:
            return
        stride = self.query_stride if queries.logits.shape[2] > 1 else 1
        near, far, selected, logits = (
            part[:, :, ::stride] for part in (queries.near, queries.far, selected, queries.logits)
        )
        read = near | selected
        everything = logits.masked_fill(~(near | far), -torch.inf).logsumexp(-1)
        kept = logits.masked_fill(~read, -torch.inf).logsumexp(-1)
        self._keep(
            read.expand(logits.shape).sum(-1),
            selected.sum(-1),
            far.sum(-1).expand(kept.shape),
            (kept - everything).exp(),
            queries.query_positions[:, None, ::stride].expand(kept.shape),
        )

    def add_dense_queries(self, positions: Tensor, num_heads: int) -> None:
        """Adds dense queries at these positions, int64 [batch, queries]."""
        if self.needs_queries:
            positions = positions[:, None, :: self.query_stride if positions.shape[1] > 1 else 1]
            positions = positions.expand(-1, num_heads, -1)
            tokens = positions + 1
            # A dense model has no window, so all tokens count as far.
            self._keep(tokens, tokens, tokens, torch.ones_like(tokens), positions)

    def _keep(
        self, tokens: Tensor, far_read: Tensor, far: Tensor, mass: Tensor, positions: Tensor
    ) -> None:
        real = positions >= 0
        if self._active is not None:
            real = real & self._active[:, None, None]
        parts = [part.float() for part in (tokens, far_read, far, mass)]
        # Ignored queries are marked and not removed, which would synchronise with the device.
        parts[0] = parts[0].masked_fill(~real, -1)
        self._measured.append(torch.stack([part.flatten() for part in parts]))

    def measured(self) -> NDArray[np.float32]:
        """Returns the measurements so far, float32 [4, queries].

        Along the first axis: tokens read, far tokens read, far tokens, attention recall.
        """
        # Few large copies from a device are faster than many small ones.
        by_device: dict[torch.device, list[Tensor]] = {}
        for part in self._measured:
            by_device.setdefault(part.device, []).append(part)
        joined = [torch.cat(parts, 1).to("cpu") for parts in by_device.values()]
        measured = torch.cat(joined, 1) if joined else torch.zeros(4, 0)
        array: NDArray[np.float32] = measured[:, measured[0] >= 0].numpy()
        return array

    def reads(self) -> Reads:
        """Returns the figures measured so far."""
        return reads_of(self.measured())


def reads_of(measured: NDArray[np.float32]) -> Reads:
    """Returns the figures of an array that `ReadMeter.measured` returned."""
    tokens, far_read, far, mass = torch.from_numpy(measured).double()
    if not tokens.numel():
        return Reads()
    with_far = far > 0
    some_far = bool(with_far.any())
    # torch.quantile is limited to 2**24 numbers.
    ordered = tokens.sort().values
    median, high = (
        float(ordered[max(0, -(-ordered.numel() * part // 100) - 1)]) for part in (50, 95)
    )
    return Reads(
        tokens_mean=float(tokens.mean()),
        tokens_p50=median,
        tokens_p95=high,
        recall=float(mass.mean()),
        far_tokens_mean=float(far_read[with_far].mean()) if some_far else 0.0,
        far_queries=int(with_far.sum()),
        far_share=float(far_read.sum() / far.sum()) if some_far else None,
        far_histogram=_histogram(far_read[with_far]),
        queries=tokens.numel(),
    )


def _histogram(counts: Tensor) -> tuple[int, ...]:
    """Returns a histogram of counts with the bins 0, 1, 2 to 3, 4 to 7, ..."""
    # The exponent e of m * 2**e with m from 1/2 to 1: 0 for 0, 1 for 1, 2 for 2 and 3.
    bins = torch.frexp(counts).exponent
    return tuple(torch.bincount(bins).tolist()) if bins.numel() else ()


class WindowReader:
    """Observer that passes sinks and window of former retrieval heads, now local, to a meter.

    It keeps all keys, because the windowed cache of these heads does not.

    Args:
        meter: meter.
        head_map: former retrieval heads.
        rule: sinks and window.
    """

    def __init__(self, meter: ReadMeter, head_map: HeadMap, rule: AttentionRule) -> None:
        self.meter, self.head_map, self.rule = meter, head_map, rule
        self._keys: dict[int, GrowingBuffer] = {}
        self._positions: dict[int, GrowingBuffer] = {}

    def __call__(self, observation: LayerObservation) -> None:
        """Receives the states of a layer; more than one query begins a new prompt."""
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
        per_query = keys.shape[0] * keys.shape[1] * keys.shape[2]
        for chunk in query_chunks(queries.shape[2], per_query, QUERY_STRIDE):
            part, own = queries[:, :, chunk], positions[:, chunk]
            near = near_mask(own, labels, self.rule.near_window, self.rule.num_sink_tokens)
            logits = attention_logits(part, keys, observation.scaling)
            far = causal_mask(own, labels) & ~near
            selection = SelectionQueries(
                query_states=part,
                key_states=keys,
                query_positions=own,
                key_positions=labels,
                logits=logits,
                near=near,
                far=far,
                score_index=logits.clone,
            )
            self.meter.add_queries(selection, torch.zeros_like(logits, dtype=torch.bool))


class ForwardWatch:
    """Prepares a meter before every forward pass of a model, and attaches it to layers if queries are measured.

    In steps that are not measured nothing is attached, so that kernels can replay a CUDA graph. This is decided
    in a hook before the forward pass, because the graph may replace the pass and call no inner module. A base
    model that is called without its head has a hook of its own.

    A reader needs the keys of every step up to the last measured one, so none of these is replayed.

    Args:
        model: dense or sparse.
        meter: meter.
        head_map: retrieval heads, if the model has none.
        stop_ids: tokens that end or pad a sequence.
        reader: observer of former retrieval heads; None if the model has retrieval heads.
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
        self._inside_model = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Context in which forward passes are watched."""
        hooks = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            self.model.register_forward_hook(self._end, always_call=True),
            self.model.base_model.register_forward_pre_hook(
                self._begin_base, with_kwargs=True, prepend=True
            ),
        ]
        # What the layers report to now, within `model.rtpurbo.counting` for example.
        before = [
            (module, {"statistics": module.statistics, "observer": module.observer})
            for module in self._modules
        ]
        try:
            with attributes_set(before):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _begin(self, module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        self._inside_model = True
        self._prepare(named(module, arguments, keywords))

    def _end(self, *_: Any) -> None:
        self._inside_model = False

    def _begin_base(self, module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        # The capture of a graph calls the base model several times in one step.
        if not self._inside_model:
            self._prepare(named(module, arguments, keywords))

    def _prepare(self, given: dict[str, Any]) -> None:
        ids, active = given["input_ids"], None
        if ids.shape[1] > 1:
            self._steps = 0
            counts = given.get("use_cache") is False
            self._attach_reader(self.reader)
        else:
            counts = step_counts(self._steps, ids.device)
            if not any_step_counts_from(self._steps, ids.device):
                self._attach_reader(None)
            self._steps += 1
            if counts:
                active = ~torch.isin(ids[:, 0], self._stops)
        if counts != self.meter.needs_queries:
            self._attach_meter(self.meter if counts else None)
        self.meter.begin(active, counts)
        if self._is_dense:
            self.meter.add_dense_queries(_positions(given), self.head_map.num_retrieval_heads)

    def _attach_meter(self, meter: ReadMeter | None) -> None:
        for module in self._modules:
            module.statistics = meter

    def _attach_reader(self, reader: WindowReader | None) -> None:
        if self.reader is not None:
            for module in self._modules:
                module.observer = reader


def step_counts(step: int, device: torch.device) -> bool:
    """Returns True if a decode step is measured; steps of an answer are numbered from 0."""
    if device.type != "cuda":
        return True
    return any_step_counts_from(step, device) and step % STEP_STRIDE == 0


def any_step_counts_from(step: int, device: torch.device) -> bool:
    """Returns True if a decode step or any later one may be measured."""
    return device.type != "cuda" or step < STEPS_WATCHED


@contextmanager
def metering(
    model: PreTrainedModel, head_map: HeadMap, stop_ids: Collection[int]
) -> Iterator[ReadMeter]:
    """Context in which the reads of retrieval heads are measured.

    Queries that select are measured: those of decode steps (on a GPU of some steps, see `step_counts`) and,
    without a cache, all queries. Sequences that have ended by a stop token before others of their batch are
    ignored. Queries of a dense model read everything; if a sparse model has no retrieval heads, those of
    `head_map` read sinks and window.
    """
    meter = ReadMeter(query_stride=QUERY_STRIDE)
    reader = None
    if is_sparse(model) and not model.rtpurbo_config.head_map.num_retrieval_heads:
        reader = WindowReader(meter, head_map, model.rtpurbo_config.attention)
    with ForwardWatch(model, meter, head_map, stop_ids, reader).watching():
        yield meter


def _positions(arguments: dict[str, Any]) -> Tensor:
    """Returns the positions of the input of a dense model, int64 [batch, new]."""
    ids, mask = arguments["input_ids"], arguments.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return positions_of(mask)[:, -ids.shape[1] :]
    if arguments.get("position_ids") is not None:
        return arguments["position_ids"]
    return torch.arange(ids.shape[1], device=ids.device).expand(ids.shape)

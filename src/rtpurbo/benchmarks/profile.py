"""Prefill benchmark on states of a real document: one layer of a converted model, repeated to the length."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rtpurbo.benchmarks.layer import LayerShape, LayerStates, index_dtype_of
from rtpurbo.benchmarks.prefill import PrefillCase, measure_dense, measure_sparse
from rtpurbo.benchmarks.session import Session, release
from rtpurbo.config import AttentionRule
from rtpurbo.data.texts import load_texts
from rtpurbo.errors import RTPurboError
from rtpurbo.models.architecture import context_length
from rtpurbo.models.artifact import load
from rtpurbo.models.sparse_layer import LayerObservation, SparseAttention
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import observing


def bench_profile(
    session: Session,
    artifact: str | Path,
    rule: AttentionRule,
    lengths: Sequence[int],
    dtype: torch.dtype,
    data: Sequence[str] | None = None,
    base_model: str | None = None,
) -> None:
    """Measures the layer with most retrieval heads at every length, at the density that its index selects.

    Sinks and `row_share` are those of the artifact, all else that of `rule`.
    """
    seen = observe(artifact, rule, max(lengths), dtype, session.device, data, base_model)
    for length in sorted(lengths):
        with session.guarded(f"prefill of {artifact} at {length:,} tokens"):
            case = replace(seen, states=repeated(seen.states, length))
            measure_sparse(session, case, None)
            measure_dense(session, [case])
            del case
        release(session.device)


def observe(
    artifact: str | Path,
    rule: AttentionRule,
    length: int,
    dtype: torch.dtype,
    device: torch.device,
    data: Sequence[str] | None = None,
    base_model: str | None = None,
) -> PrefillCase:
    """Case with the states of one document, and a note on their origin."""
    model, tokenizer = load(artifact, base_model=base_model, device=device)
    modules = headwise_modules(model)
    module = max(modules, key=lambda one: len(one.retrieval_heads))
    if not module.retrieval_heads:
        raise RTPurboError(
            f"{artifact} has no retrieval heads, so there is nothing to measure; choose an artifact with some."
        )
    tokens = min(length, context_length(model.config))
    corpus = load_texts(list(data) if data else None, "heldout")
    ids = corpus.sample_tokens(tokenizer, tokens, random.Random(0))
    observations: list[LayerObservation] = []

    def keep(observation: LayerObservation) -> None:
        if observation.layer == module.layer_idx:
            observations.append(observation)

    with observing(model, keep), torch.no_grad():
        model(torch.tensor([ids], device=device), use_cache=False, logits_to_keep=1)
    states = _states(observations[0], module, dtype)
    shape = LayerShape(
        module.num_attention_heads,
        module.num_key_value_heads,
        module.head_dim,
        tuple(module.retrieval_heads),
        states.index_keys.shape[-1],
        module.indexer.settings.shared_keys,
    )
    own = replace(
        rule,
        prefill_mode="row_peak",
        num_sink_tokens=module.rule.num_sink_tokens,
        row_share=module.rule.row_share,
    )
    note = (
        f"states of {Path(artifact).name}, layer {module.layer_idx}, from a document of "
        f"{tokens:,} tokens, repeated"
    )
    return PrefillCase(shape, own, states, note)


def _states(seen: LayerObservation, module: SparseAttention, dtype: torch.dtype) -> LayerStates:
    layout = module.layout(seen.queries.device)
    heads, kv_head_index = layout.retrieval.heads, layout.full_key_value_heads
    if not module.indexer.settings.shared_keys:
        kv_head_index = kv_head_index[layout.retrieval.key_value_heads]
    indexer, index_dtype = module.indexer, index_dtype_of(dtype)
    queries, keys = seen.queries, seen.keys
    index_queries = indexer.features(queries[:, heads], seen.undo_rotation)
    index_keys = indexer.features(keys[:, kv_head_index], seen.undo_rotation)
    with torch.no_grad():
        return LayerStates(
            queries.to(dtype),
            keys.to(dtype),
            # The selection does not depend on the values.
            torch.randn_like(keys).to(dtype),
            indexer.index_queries(index_queries).to(index_dtype),
            indexer.index_keys(index_keys).to(index_dtype),
            seen.scaling,
        )


def repeated(states: LayerStates, length: int) -> LayerStates:
    """States repeated along the sequence to `length`."""

    def filled(part: Tensor) -> Tensor:
        times = -(-length // part.shape[2])
        return part.repeat(1, 1, times, 1)[:, :, :length].contiguous()

    parts: dict[str, Any] = {
        name: filled(part) for name, part in vars(states).items() if name != "scaling"
    }
    return replace(states, **parts)

"""Sparse model in a long context: caches of random states or of prompts, and block lists of a given density."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.benchmarks.layer import index_dtype_of
from rtpurbo.benchmarks.sparse_prefill import SparsePrefill
from rtpurbo.models.arguments import CACHE_NAME
from rtpurbo.models.cache import HeadwiseCache, roomy_capacity
from rtpurbo.models.decoding import CAPTURE_COST_IN_STEPS
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.ops.api import BACKENDS
from rtpurbo.ops.states import AttentionCall
from rtpurbo.ops.triton import headwise

BACKEND = "forced-density"

_density: list[float] = []
_reached: list[float] = []


@contextmanager
def forcing_density(model: PreTrainedModel, density: float) -> Iterator[list[float]]:
    """Context manager that replaces the block selection in prefill by lists of a density.

    Yields:
        Densities of the lists, one per layer with retrieval heads, after the first forward pass.
    """
    BACKENDS[BACKEND] = {"headwise_attention": __name__}
    modules = headwise_modules(model)
    before = [module.backend for module in modules]
    for module in modules:
        module.backend = BACKEND
    _density.append(density)
    _reached.clear()
    try:
        yield _reached
    finally:
        _density.pop()
        del BACKENDS[BACKEND]
        for module, backend in zip(modules, before, strict=True):
            module.backend = backend


def headwise_attention(call: AttentionCall) -> tuple[Tensor, Tensor | None]:
    """Operator of the backend of `forcing_density`, for whole prompts."""
    if call.index_queries is None:  # a layer without retrieval heads
        return headwise.headwise_attention(call)
    derived = call.layout.derived
    key = (BACKEND, call.query_states.shape[2], call.rule, _density[-1])
    arguments = call.query_states, call.full, call.windowed, call.index_queries, call.scaling
    if key not in derived:
        operator = SparsePrefill(call.layout, call.rule)
        _reached.append(operator.force(_density[-1], *arguments))
        derived[key] = operator
    return derived[key](*arguments), None


def filled_cache(model: PreTrainedModel, length: int, batch: int, steps: int) -> HeadwiseCache:
    """Cache of a sparse model with random states, and room for `steps` more tokens."""
    expected = length + steps
    cache = HeadwiseCache(model, reserve=roomy_capacity(length + 1, expected))
    cache.expected_length = expected
    device, dtype = model.device, model.dtype
    cache.begin_forward(None, batch, length, device)

    def states(heads: int, dim: int, kind: torch.dtype) -> Tensor:
        return torch.randn(batch, heads, length, dim, dtype=kind, device=device)

    for module, layer in zip(headwise_modules(model), cache.layers, strict=True):
        index_keys = None
        if module.retrieval_heads:
            num_keys, index_dim, _ = module.indexer.key_weight.shape
            index_keys = states(num_keys, index_dim, index_dtype_of(dtype))
            if module.rule.index_storage == "float8":
                index_keys = index_keys.to(torch.float8_e4m3fn)
        layer.append(
            states(module.num_key_value_heads, module.head_dim, dtype),
            states(module.num_key_value_heads, module.head_dim, dtype),
            index_keys,
            module.layout(device),
        )
    return cache


def read_prompts(model: PreTrainedModel, prompts: Tensor, length: int, batch: int) -> HeadwiseCache:
    """Cache of a sparse model whose sequences have read prompts; sequence b has read prompt b % len(prompts).

    Prompts, int64 [number of prompts, prompt length], are read one at a time, each whole: a batch of them
    would take the activations of all, and dense queries (`AttentionRule.num_dense_queries`) need a prompt of
    one forward. The cache will hold `length` tokens in the end. All layers of the model have full attention.
    """
    # Fewer steps than this would run without a CUDA graph.
    expected = length + CAPTURE_COST_IN_STEPS
    whole: HeadwiseCache | None = None
    for number, prompt in enumerate(prompts):
        cache = HeadwiseCache(model, reserve=roomy_capacity(prompts.shape[1], expected))
        cache.expected_length = expected
        model(prompt[None], **{CACHE_NAME: cache}, logits_to_keep=1)
        if whole is None:
            whole = cache
            whole.batch_repeat_interleave(batch)
            continue
        for layer, read in zip(whole.layers, cache.layers, strict=True):
            for (_, _, held), (_, _, new) in zip(
                layer.held_tensors(), read.held_tensors(), strict=True
            ):
                held[number :: len(prompts)] = new[0]
    assert whole is not None
    return whole

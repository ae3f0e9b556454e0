"""The fused KV append equals PyTorch in every family."""

import copy
from functools import partial

import pytest
import torch

from rtpurbo.models import fused_append, sparse_layer
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.families import FAMILIES as FAST
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import observing
from tests.models.test_decoding import plain_steps  # noqa: F401
from tests.ops.triton.support import DEVICE, DTYPES, EPSILON
from tests.tiny_models import (
    FAMILIES,
    PADDING,
    assert_same_logits,
    logits_of,
    make_sparse,
    padded_batch,
    sparse_config,
    sparse_model,
    tiny_model,
    with_own_keys,
)

pytestmark = pytest.mark.kernels

pytest.importorskip("triton")

BATCHES = {"one sequence": (0,), "left-padded batch": PADDING}
PROMPT, CAPACITY = 12, 64


def assert_as_rounded(actual, expected, dtype):
    """Equal but for a few roundings of the model's dtype."""
    assert actual.dtype == expected.dtype
    if expected.numel():
        tolerance = 8 * EPSILON[dtype] * expected.abs().max().item()
        torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def rotated(states, cosines, sines):
    """Rotary embedding of states [batch, heads, length, head_dim], in halves."""
    cosines, sines = cosines.unsqueeze(1), sines.unsqueeze(1)
    turned, kept = states.split([cosines.shape[-1], states.shape[-1] - cosines.shape[-1]], -1)
    first, second = turned.chunk(2, -1)
    turned = turned * cosines + torch.cat([-second, first], -1) * sines
    return torch.cat([turned.to(states.dtype), kept], -1)


def in_pytorch(layer, queries, keys, values, position_embeddings, past):
    """Reference for `append_fused` in plain PyTorch."""
    module = layer.module
    if FAST[module.config.model_type].query_key_norm == "per_head":
        queries = module.q_norm(queries.transpose(1, 2)).transpose(1, 2)
        keys = module.k_norm(keys.transpose(1, 2)).transpose(1, 2)
    if getattr(module, "use_rope", True):
        queries, keys = (rotated(states, *position_embeddings) for states in (queries, keys))
    undo = partial(layer._undo_rotation, embeddings=position_embeddings)
    index_queries, index_keys = layer.index(queries, keys, undo, True)
    layout = layer.layout(keys.device)
    return queries, index_queries, *past.append(keys, values, index_keys, layout)


@pytest.fixture
def appended(monkeypatch):
    """Layers that ran the fused append, each compared with PyTorch; attention is eager."""
    calls = []

    def compared(module, queries, keys, values, position_embeddings, past):
        twin = copy.deepcopy(past)
        arguments = (module, queries, keys, values, position_embeddings)
        before = [tensor.clone() for _, _, tensor in past.held_tensors()]
        expected = in_pytorch(*arguments, twin)
        actual = append_fused(*arguments, past)
        dtype = queries.dtype
        assert_as_rounded(actual[0], expected[0], dtype)
        assert (actual[1] is None) == (expected[1] is None)
        if actual[1] is not None:
            assert_as_rounded(actual[1], expected[1], dtype)
        for states, others in zip(actual[2:], expected[2:], strict=True):
            assert_same_states(states, others, dtype)
        held = zip(past.held_tensors(), twin.held_tensors(), before, strict=True)
        for (_, _, tensor), (_, _, other), old in held:
            assert_as_rounded(tensor, other, dtype)
            is_new = (other != old).any(-1).any(1)  # by sequence and slot
            assert (is_new.sum(1) <= 1).all()
            kept = ~is_new[:, None, :, None].expand_as(old)
            assert torch.equal(tensor[kept], old[kept])
        assert past.seen == twin.seen
        for name in ("full_keys", "full_values", "index_keys"):
            assert getattr(past, name).length == getattr(twin, name).length
        calls.append(module.layer_idx)
        return actual

    append_fused = fused_append.append_fused
    monkeypatch.setattr(fused_append, "append_fused", compared)
    monkeypatch.setattr(sparse_layer, "chosen_backend", lambda *_: "eager")
    return calls


def assert_same_states(states, others, dtype):
    """States of KV heads that a query reads."""
    for name, value in vars(others).items():
        other = getattr(states, name)
        if name in ("keys", "values", "index_keys") and value is not None:
            assert_as_rounded(other, value, dtype)
        elif isinstance(value, torch.Tensor):
            assert torch.equal(other, value)
        else:
            assert other == value


def by_kernel(model):
    """The model with the fused append where it is supported, and without graphs."""
    model.rtpurbo_graphs = False
    set_backend(model, "triton")
    return model


def static_cache(model, ids, mask, prompt=PROMPT):
    cache = HeadwiseCache(model, crop_slack=3)
    logits_of(model, ids[:, :prompt], mask[:, :prompt], [prompt], cache)
    cache.make_static(CAPACITY)
    return cache


def decode(model, cache, ids, mask):
    """Single tokens behind those in the cache."""
    start = cache.get_seq_length()
    return logits_of(model, ids[:, start:], mask, [1] * (ids.shape[1] - start), cache)


def batch_of(padding, length):
    return (part.to(DEVICE) for part in padded_batch(padding, length))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", BATCHES)
def test_the_fused_append_equals_pytorch_in_every_family(appended, family, batch, dtype):
    model = by_kernel(sparse_model(family, dtype=dtype).to(DEVICE))
    ids, mask = batch_of(BATCHES[batch], PROMPT + 3)
    decode(model, static_cache(model, ids, mask), ids, mask)
    assert appended == [module.layer_idx for module in headwise_modules(model)] * 3


@pytest.mark.parametrize("heads", [(), (1, 4), (0, 2, 3), range(6)], ids=str)
@pytest.mark.parametrize("index_space", ["pre_rope", "post_rope", "low_frequency"])
@pytest.mark.parametrize("shared_keys", [False, True])
def test_heads_and_index_spaces(appended, heads, index_space, shared_keys):
    model = tiny_model("qwen3")
    config = sparse_config(model, heads, index_space, shared_keys)
    model = by_kernel(make_sparse(model, config).to(DEVICE))
    ids, mask = batch_of((0, 3), PROMPT + 3)
    decode(model, static_cache(model, ids, mask), ids, mask)
    assert len(appended) == 6


def test_steps_equal_one_forward_while_the_ring_wraps(appended):
    """The prompt ends within the padding of a sequence, whose sinks come one by one."""
    model = by_kernel(sparse_model("qwen3", dtype=torch.float32).to(DEVICE))
    ids, mask = batch_of(PADDING, 30)
    cache = static_cache(model, ids, mask, prompt=8)
    logits = decode(model, cache, ids, mask)
    assert_same_logits(logits, logits_of(model, ids, mask)[:, 8:], mask, tolerance=1e-3)
    assert len(appended) == 2 * 22
    assert cache.slots.length.item() == 30


def test_steps_by_kernels_alone():
    """No kernel runs between the fused append and the attention kernels."""
    model = sparse_model("qwen3", dtype=torch.float32).to(DEVICE)
    ids, mask = batch_of((0, 3), PROMPT + 3)
    expected = logits_of(model, ids, mask)[:, PROMPT:]
    cache = static_cache(model, ids, mask)
    assert_same_logits(decode(by_kernel(model), cache, ids, mask), expected, mask, tolerance=1e-3)


def test_steps_by_kernels_with_shared_index_keys_equal_those_with_one_a_head():
    """Kernels round a selection up, each head's own way: so they are compared with themselves."""
    model = sparse_model("qwen3", dtype=torch.float32, heads=(0, 1, 4), shared_keys=True)
    model.to(DEVICE)
    ids, mask = batch_of((0, 3), PROMPT + 2)
    steps = []
    for one in (model, with_own_keys(model)):
        cache = static_cache(one, ids, mask)
        steps.append(decode(by_kernel(one), cache, ids, mask))
    assert_same_logits(*steps, mask)


def test_weights_changed_in_place_take_effect(appended):
    """Parameters that are changed in place are used, even if autograd does not see the change."""
    model = by_kernel(sparse_model("qwen3", dtype=torch.float32).to(DEVICE))
    ids, mask = batch_of((0,), PROMPT + 4)
    cache = static_cache(model, ids, mask)
    decode(model, cache, ids[:, :-2], mask[:, :-2])
    for module in headwise_modules(model):
        module.indexer.key_weight.data.neg_()
        module.module.k_norm.weight.data.mul_(2)
    decode(model, cache, ids, mask)
    assert len(appended) == 8


def test_replayed_steps_use_the_fused_append(appended, plain_steps):  # noqa: F811
    model = by_kernel(sparse_model("qwen3", dtype=torch.float32).to(DEVICE))
    ids, mask = batch_of((0,), 40)
    model.rtpurbo_graphs = True
    cache = HeadwiseCache(model)
    cache.expected_length = 40
    logits_of(model, ids[:, :20], mask[:, :20], [20], cache)
    logits_of(model, ids[:, 20:24], mask[:, :24], [1] * 4, cache)
    assert plain_steps.runs == 4
    assert len(appended) == 2 * (1 + 2 + 4)  # warming up, and twice as a graph does


def hooked(model):
    headwise_modules(model)[0].module.k_norm.register_forward_hook(lambda *_: None)


def set_backend(model, backend="eager"):
    for module in headwise_modules(model):
        module.backend = backend


@pytest.mark.parametrize(
    ("change", "layers"), [(hooked, [1, 1]), (set_backend, []), (lambda _: None, [0, 1, 0, 1])]
)
def test_hooks_on_a_norm_and_named_backends_disable_the_fused_append(appended, change, layers):
    model = by_kernel(sparse_model("qwen3", dtype=torch.float32).to(DEVICE))
    change(model)
    ids, mask = batch_of((0,), PROMPT + 2)
    decode(model, static_cache(model, ids, mask), ids, mask)
    assert appended == layers


def test_observers_and_gradients_run_in_pytorch(appended):
    model = by_kernel(sparse_model("qwen3", dtype=torch.float32).to(DEVICE))
    ids, mask = batch_of((0,), PROMPT + 3)
    cache, seen = static_cache(model, ids, mask), []
    with observing(model, seen.append, dense=False):
        logits_of(model, ids[:, PROMPT : PROMPT + 1], mask[:, : PROMPT + 1], [1], cache)
    assert len(seen) == 2
    model(ids[:, PROMPT + 1 : PROMPT + 2], past_key_values=cache)
    assert appended == []
    decode(model, cache, ids, mask)
    assert appended == [0, 1]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_without_kernels_it_is_pytorch(appended, dtype):
    model = by_kernel(sparse_model("qwen3", dtype=dtype).to(DEVICE))
    if dtype == torch.float32:
        set_backend(model, "auto")
    ids, mask = batch_of((0,), PROMPT + 2)
    decode(model, static_cache(model, ids, mask), ids, mask)
    assert appended == []

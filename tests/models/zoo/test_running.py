"""Sparse models of different kinds: generation, copies, files and kernels."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM

from rtpurbo.models.sparse_layers import headwise_modules
from tests.models.zoo.configurations import EQUAL
from tests.models.zoo.test_zoo import FAST, zoo_model
from tests.ops.triton.support import DEVICE, DTYPES
from tests.tiny_models import (
    PADDING,
    assert_same_logits,
    logits_of,
    make_sparse,
    padded_batch,
    sparse_config,
)

WITH_RECURRENT_LAYERS = ("Qwen3.5", "Falcon-H1")


def sparse(name, dtype=torch.float32, **rule):
    model = zoo_model(EQUAL, name).to(dtype)
    rule = {"prefill_mode": "top_p", "top_p": 0.6, **rule}
    return make_sparse(model, sparse_config(model, **rule))


def generate(model, ids, mask, **options):
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, attention_mask=mask, **options)


@pytest.mark.parametrize("name", FAST)
def test_generation_over_the_cache_equals_recomputation(name):
    """In float64: rounding would move keys across the edge of a selection."""
    model, (ids, mask) = sparse(name, torch.float64), padded_batch(PADDING, 24)
    for options in ({}, {"num_beams": 3}):
        expected = generate(model, ids, mask, use_cache=False, **options)
        assert torch.equal(generate(model, ids, mask, **options), expected)
    if name in WITH_RECURRENT_LAYERS:
        with pytest.raises(ValueError, match="stateful"):
            generate(model, ids[:1], mask[:1], prompt_lookup_num_tokens=4)
        return
    ids, mask = ids[1:2], mask[1:2]
    assistant = copy.deepcopy(model)
    assistant.rtpurbo.set_rule(top_p=0.2)
    expected = generate(model, ids, mask, use_cache=False)
    for options in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": assistant}):
        assert torch.equal(generate(model, ids, mask, **options), expected)


@pytest.mark.parametrize("name", FAST)
def test_copies_and_saved_models_are_the_same(name, tmp_path):
    model = sparse(name)
    model.save_pretrained(tmp_path)
    expected = logits_of(model, *padded_batch(), (40, 1, 3))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.rtpurbo_config == model.rtpurbo_config
        assert torch.equal(logits_of(twin, *padded_batch(), (40, 1, 3)), expected)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation="eager")
    assert loaded.rtpurbo_config == model.rtpurbo_config
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in loaded.state_dict().items())
    # Weights that are aligned otherwise in memory round differently.
    actual = logits_of(loaded.eval(), *padded_batch(), (40, 1, 3))
    assert_same_logits(actual, expected, padded_batch()[1])


KERNELS = [
    name
    if name in ("Qwen3.5", "gpt-oss", "Llama 4")
    else pytest.param(name, marks=pytest.mark.slow)
    for name in FAST
]


@pytest.mark.kernels
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_equal_pytorch(name):
    """A prompt, a chunk and decode steps that attend to every key, which leaves no ties to rounding."""
    pytest.importorskip("triton")
    rule = {"top_p": 1.0, "block_size": 16, "sliding_window": 16, "prefill_mode": "dense"}
    model = sparse(name, **rule).to(DEVICE, DTYPES[-1])
    ids, mask = (part.to(DEVICE) for part in padded_batch((5, 0), 26))
    outputs = {}
    for backend in ("eager", "triton"):
        for layer in headwise_modules(model):
            layer.backend = backend
        outputs[backend] = logits_of(model, ids, mask, (20, 4, 1, 1))
        assert {layer.used_backend for layer in headwise_modules(model)} == {backend}
    tolerance = 1e-4 if DTYPES[-1] == torch.float32 else 3e-2
    assert_same_logits(outputs["triton"], outputs["eager"], mask, tolerance)

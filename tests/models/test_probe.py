"""The probe of a model's attention runs once for a model, as long as nothing changed."""

import gc
import weakref

import pytest
import torch

from rtpurbo.models import probe as probing
from rtpurbo.models.sparsify import restore, sparsify
from rtpurbo.models.verification import logits_over_cache
from tests.tiny_models import any_model, make_sparse, sparse_config, tiny_model


@pytest.fixture
def forwards(monkeypatch):
    counted = []
    run = probing._run

    def counting(*arguments):
        counted.append(1)
        return run(*arguments)

    monkeypatch.setattr(probing, "_run", counting)
    return counted


def test_a_model_is_probed_once(forwards):
    model = tiny_model()
    config = sparse_config(model)
    sparsify(model, config)
    assert len(forwards) == 3
    sparsify(model, config)
    sparsify(restore(model), config)
    assert len(forwards) == 3


@pytest.mark.parametrize("change", ["dtype", "config", "module"])
def test_a_changed_model_is_probed_again(forwards, change):
    model = tiny_model()
    first = probing.probe(model)
    if change == "dtype":
        model.double()
    elif change == "config":
        model.config.rope_parameters = {**model.config.rope_parameters, "rope_theta": 1e5}
    else:
        layer = model.model.layers[0]
        layer.self_attn = type(layer.self_attn)(model.config, 0)
    forwards.clear()
    second = probing.probe(model)
    assert len(forwards) == 3
    assert (second[0].module is first[0].module) == (change != "module")


def test_a_probed_model_is_freed():
    model = tiny_model()
    make_sparse(model, sparse_config(model))
    model.generate(max_new_tokens=2, do_sample=False, pad_token_id=0)
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("run", [probing.probe, logits_over_cache])
def test_a_lack_of_memory_is_not_taken_for_an_unsupported_model(monkeypatch, run):
    model = any_model("llama")

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(model.model.layers[0].mlp, "forward", fail)
    with pytest.raises(torch.OutOfMemoryError):
        run(model)

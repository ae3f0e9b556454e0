"""The check that a sparse model of a type without tests of its own equals its dense self."""

import pytest
import torch
from transformers import AttentionInterface

from rtpurbo.errors import RTPurboError
from rtpurbo.models import attention, sparse_model
from rtpurbo.models.sparse_layers import is_sparse
from tests.models.zoo.configurations import EQUAL
from tests.tiny_models import (
    any_model,
    logits_of,
    make_sparse,
    padded_batch,
    sparse_config,
    tiny_model,
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_right_model_passes(dtype):
    model = any_model("gpt_oss", sliding_window=8).to(dtype)
    make_sparse(model, sparse_config(model))
    assert is_sparse(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_wrong_model_is_refused_and_stays_dense(monkeypatch, dtype):
    """As a model would whose learned sinks went unseen."""

    def without_sinks(*args, s_aux=None, **kwargs):
        return attention.sparse_attention(*args, **kwargs)

    model = any_model("gpt_oss", sliding_window=8).to(dtype)
    expected = logits_of(model, *padded_batch())
    AttentionInterface.register(attention.IMPLEMENTATION, without_sinks)
    try:
        with pytest.raises(RTPurboError, match="its logits differ from those of the dense model"):
            make_sparse(model, sparse_config(model))
    finally:
        AttentionInterface.register(attention.IMPLEMENTATION, attention.sparse_attention)
    assert not is_sparse(model)
    assert torch.equal(logits_of(model, *padded_batch()), expected)


def test_a_model_that_loses_its_mask_is_refused(monkeypatch):
    """OPT derives positions from the mask: its check needs padding."""
    model = any_model("opt", **EQUAL["OPT"][1])
    make_sparse(model, sparse_config(model))
    monkeypatch.setattr(sparse_model, "positions_follow_mask", lambda model: False)
    model = any_model("opt", **EQUAL["OPT"][1])
    with pytest.raises(RTPurboError, match="its logits differ"):
        make_sparse(model, sparse_config(model))


def test_tested_families_are_not_run_again(monkeypatch):
    model, calls = tiny_model(), []
    model.register_forward_pre_hook(lambda *_: calls.append(1))
    make_sparse(model, sparse_config(model))
    assert calls == []

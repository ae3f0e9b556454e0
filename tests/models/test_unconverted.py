"""Layers that are not converted: eager attention in blocks of queries."""

import pytest
import torch

from rtpurbo.models import unconverted
from rtpurbo.models.cache import HeadwiseCache
from tests.tiny_models import VOCABULARY, any_model, make_sparse, sparse_config


@pytest.mark.parametrize("padded", [False, True])
def test_blocks_of_queries_change_nothing(padded, monkeypatch):
    """Layers with learned sinks and a sliding window, in a prompt, a chunk after it and a decode step."""
    model = any_model("gpt_oss", sliding_window=8).to(torch.float64)
    make_sparse(model, sparse_config(model))
    ids = torch.randint(2, VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :5] = 0

    def logits():
        cache, found, start = HeadwiseCache(model), [], 0
        for end in (29, 39, 40):
            part = model(
                ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache
            ).logits
            found.append(part)
            start = end
        return torch.cat(found, 1)[mask.bool()]

    with torch.no_grad():
        whole = logits()
        monkeypatch.setattr(unconverted, "QUERIES_AT_ONCE", 6)
        torch.testing.assert_close(logits(), whole)

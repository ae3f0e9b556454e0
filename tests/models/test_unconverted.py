"""Layers that are not converted: eager attention in blocks of queries."""

import pytest
import torch

from rtpurbo.models import unconverted
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.ops.eager import visibility
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
        monkeypatch.setattr(visibility, "MAX_CHUNK_ELEMENTS", 2 * 6 * 5 * 13)
        torch.testing.assert_close(logits(), whole)


@pytest.mark.parametrize("window", [None, 8, 100])
@pytest.mark.parametrize(("batch", "heads", "q_len"), [(1, 6, 40), (3, 64, 40), (1, 6, 7)])
def test_the_weights_of_a_block_are_bounded(window, batch, heads, q_len, monkeypatch):
    limit, k_len = 40_000, 60
    monkeypatch.setattr(visibility, "MAX_CHUNK_ELEMENTS", limit)
    query, key = torch.empty(batch, heads, q_len, 4), torch.empty(batch, 2, k_len, 4)
    blocks = list(unconverted._blocks(query, key, window))
    assert [q for block, _ in blocks for q in range(q_len)[block]] == list(range(q_len))
    for block, keys in blocks:
        queries, read = range(q_len)[block], range(k_len)[keys]
        assert batch * heads * len(queries) * len(read) <= limit
        last = k_len - q_len + queries[-1]
        first = 0 if window is None else max(0, k_len - q_len + queries[0] + 1 - window)
        assert read == range(first, last + 1)

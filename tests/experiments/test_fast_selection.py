import pytest
import torch
from fast_selection import fast_selection

from rtpurbo.config import AttentionRule
from rtpurbo.ops.eager import selection

pytestmark = pytest.mark.kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def masses(rows=16, keys=83):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 2, rows, keys, generator=generator) * 3
    logits[..., 60:] = -torch.inf
    return logits.to(DEVICE)


@pytest.mark.parametrize(
    "changes",
    [
        {"prefill_mode": "row_share", "row_share": 0.2},
        {"prefill_mode": "row_peak", "row_share": 0.2, "row_stride": 2},
        {"prefill_mode": "top_p", "granularity": "block", "min_tokens": 5},
    ],
)
def test_rules_select_the_same(changes):
    rule = AttentionRule(
        num_sink_tokens=2, sliding_window=16, block_size=16, query_block_size=8, **changes
    )
    logits = masses()
    keys = torch.arange(logits.shape[-1], device=DEVICE)
    queries = torch.arange(44, 60, device=DEVICE)[:, None]
    near = ((keys > queries - 16) | (keys < 2)) & (keys <= queries)
    far = (keys <= queries) & ~near
    select = (
        selection.select_per_query
        if rule.prefill_mode == "top_p"
        else selection.select_per_query_block
    )
    arguments = (rule, logits.masked_fill(keys > queries, -torch.inf), near, far)
    expected = select(*arguments, keys[None])
    scattering = selection.sum_blocks
    with fast_selection(rule.block_size, torch.device("cuda")):
        assert selection.sum_blocks is not scattering
        actual = select(*arguments, keys[None])
    assert selection.sum_blocks is scattering
    assert torch.equal(actual, expected)
    assert 0 < actual.float().mean() < far.float().mean()

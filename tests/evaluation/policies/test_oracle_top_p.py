import torch

from rtpurbo.config import AttentionRule
from rtpurbo.evaluation.policies.selectors import oracle_top_p
from tests.evaluation.policies.support import SINKS, WINDOW, every_query, random_queries


def test_the_fewest_keys_that_reach_the_true_mass_are_read():
    rule = AttentionRule(
        num_sink_tokens=SINKS, sliding_window=WINDOW, block_size=8, top_p=0.9, min_tokens=0
    )
    rows = random_queries(31, 111)
    selected = oracle_top_p(rule)(rows)
    visible = (rows.near | rows.far).expand(rows.logits.shape)
    mass = rows.logits.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0)
    some = 0
    for batch, head, row in every_query(rows):
        read = rows.near[batch, 0, row] | selected[batch, head, row]
        if not visible[batch, head, row].any():
            continue
        kept = mass[batch, head, row][read].sum()
        assert kept >= rule.top_p - 1e-9
        of_selected = mass[batch, head, row][selected[batch, head, row]]
        if len(of_selected):
            some += 1
            assert kept - of_selected.min() < rule.top_p
    assert some > 100

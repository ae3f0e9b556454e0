import torch

from rtpurbo.evaluation.policies.selectors import top_k
from tests.evaluation.policies.support import every_query, random_queries


def test_the_highest_index_scores_are_read():
    rows = random_queries(31, 111)
    selected = top_k(9)(rows)
    scores = rows.score_index()
    for batch, head, row in every_query(rows):
        far = rows.far[batch, 0, row].nonzero()[:, 0].tolist()
        best = sorted(far, key=lambda key: -scores[batch, head, row, key])[:9]
        assert sorted(best) == selected[batch, head, row].nonzero()[:, 0].tolist()


def test_fewer_tokens_are_read_where_fewer_exist():
    rows = random_queries(1, 40)
    assert torch.equal(top_k(1000)(rows), rows.far.expand(rows.logits.shape))
    assert not top_k(0)(rows).any()

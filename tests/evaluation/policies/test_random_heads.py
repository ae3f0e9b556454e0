from rtpurbo.config import HeadMap
from rtpurbo.evaluation.policies import random_head_map


def test_random_heads_stay_in_the_layers_of_the_retrieval_heads():
    head_map = HeadMap((None, (0, 5), (), (2,)), 8, 4)
    drawn = [random_head_map(head_map, seed) for seed in range(20)]
    for each in drawn:
        assert each.num_retrieval_heads == 3
        assert each.retrieval_heads[0] is None
        assert each.retrieval_heads[2] == ()
    assert drawn[0] == random_head_map(head_map, 0)
    assert len(set(drawn)) > 10

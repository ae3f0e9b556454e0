"""Choosing retrieval heads from scores."""

import pytest
import torch

from rtpurbo.calibration.selection import choose_heads, in_turn, measure_stability
from rtpurbo.errors import RTPurboError
from rtpurbo.settings import CalibrationSettings

# Two converted layers of four heads (two KV heads), and a windowed layer between them.
SCORES = ((0.9, 0.1, 0.2, 0.0), None, (0.3, 0.3, 0.8, 0.05))


def chosen(**settings):
    return choose_heads(SCORES, 2, CalibrationSettings(**settings)).retrieval_heads


def test_ratio_ranks_all_layers_together():
    assert chosen(ratio=0.25) == ((0,), None, (2,))


def test_ratio_rounds_up():
    assert chosen(ratio=0.3) == ((0,), None, (0, 2))


def test_count_and_threshold():
    assert chosen(count=3) == ((0,), None, (0, 2))
    assert chosen(threshold=0.3) == ((0,), None, (0, 1, 2))


def test_groups_are_chosen_whole():
    assert chosen(count=2, granularity="kv_group") == ((0, 1), None, ())
    assert chosen(count=3, granularity="kv_group") == ((0, 1), None, (2, 3))


def test_groups_of_different_layers_have_different_sizes():
    scores = ((0.9, 0.1, 0.2, 0.0), None, (0.3, 0.8), (0.5, 0.4, 0.1))
    kv_heads = (2, None, 2, 1)

    def of(**settings):
        return choose_heads(scores, kv_heads, CalibrationSettings(**settings))

    assert of(count=4).retrieval_heads == ((0,), None, (1,), (0, 1))
    assert of(count=3, granularity="kv_group").retrieval_heads == ((0, 1), None, (1,), ())
    found = of(count=4, granularity="kv_group")
    assert found.retrieval_heads == ((0, 1), None, (1,), (0, 1, 2))
    assert (found.num_attention_heads, found.num_key_value_heads) == ((4, None, 2, 3), kv_heads)
    with pytest.raises(RTPurboError, match="9 query heads"):
        of(count=10)


def test_the_map_keeps_the_scores():
    head_map = choose_heads(SCORES, 2, CalibrationSettings(ratio=0.25))
    assert head_map.scores == SCORES
    assert head_map.num_retrieval_heads == 2
    assert head_map.num_full_key_value_heads == 2


def test_more_heads_than_there_are():
    with pytest.raises(RTPurboError, match="8 query heads"):
        chosen(count=9)


@pytest.mark.parametrize(
    "settings",
    [
        {"ratio": 1.5},
        {"ratio": -0.1},
        {"count": -1},
        {"threshold": 0.1, "count": 3},
        {"num_documents": 0},
    ],
)
def test_settings_out_of_range(settings):
    with pytest.raises(RTPurboError):
        CalibrationSettings(**settings)


def test_stability_of_equal_and_opposite_documents():
    scores = torch.arange(10.0)
    same = measure_stability(torch.stack([scores, scores]), 3)
    assert same.rank_correlation == pytest.approx(1)
    assert same.overlap == 1
    opposite = measure_stability(torch.stack([scores, -scores]), 3)
    assert opposite.rank_correlation == pytest.approx(-1)
    assert opposite.overlap == 0


def test_a_single_document_has_no_stability():
    assert measure_stability(torch.rand(1, 10), 3) is None


def test_two_rankings_take_turns():
    first = torch.tensor([[0.9, 0.5], [0.8, 0.1]])
    second = torch.tensor([[0.1, 0.2], [0.3, 0.9]])
    taken = in_turn(first, second)
    # The best of the first, the best of the second, the first's next that is not taken, and so on.
    assert taken.flatten().argsort(descending=True).tolist() == [0, 3, 2, 1]
    assert taken.max() == 1
    assert taken.min() > 0

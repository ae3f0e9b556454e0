import pytest
import torch

from rtpurbo.benchmarks.correctness import compare, near, sampled_queries
from rtpurbo.benchmarks.layer import LayerStates
from rtpurbo.ops.eager.attend import attend
from tests.benchmarks.support import CPU, SHAPE

LENGTH = 150


def mask(sequence, head, rows):
    return near(rows, LENGTH, 4, 32)


@pytest.fixture
def states():
    return LayerStates.random(SHAPE, LENGTH, LENGTH, torch.bfloat16, CPU, batch=2)


@pytest.fixture
def output(states):
    keys, values = (part.repeat_interleave(2, 1) for part in (states.keys, states.values))
    rows = torch.arange(LENGTH)
    return attend(states.queries, keys, values, mask(0, 0, rows), states.scaling)[0]


def test_correct_outputs_pass(output, states):
    found = compare(output, states, mask)
    assert found.complaint is None
    assert 0 < found.error < 0.02


@pytest.mark.parametrize("wrong", [1.1, -1.0, torch.nan, 0.0])
def test_one_wrong_query_is_found(output, states, wrong):
    output[1, 2, -3] *= wrong
    assert "relative error" in compare(output, states, mask).complaint


def test_a_window_of_one_key_too_many_is_found(states):
    keys, values = (part.repeat_interleave(2, 1) for part in (states.keys, states.values))
    wider = near(torch.arange(LENGTH), LENGTH, 4, 33)
    output, _ = attend(states.queries, keys, values, wider, states.scaling)
    assert compare(output, states, mask).complaint


def test_random_queries_and_all_of_the_last():
    rows = sampled_queries(10_000, CPU)
    assert rows[-64:].tolist() == list(range(9936, 10_000))
    assert 100 < len(rows) <= 128
    assert sampled_queries(20, CPU).tolist() == list(range(20))

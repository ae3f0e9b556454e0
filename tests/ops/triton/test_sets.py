"""Sets found by bisection are those that sorting finds."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rtpurbo.ops.eager.selection import smallest_set
from rtpurbo.ops.eager.selection import top_k as sorted_top_k
from rtpurbo.ops.triton import sets

pytestmark = pytest.mark.kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def masses(rows, entries, seed=0):
    """Softmaxes, a part of which has no mass."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, rows, entries, generator=generator) * 3
    logits[..., entries * 3 // 4 :] = -torch.inf
    return logits.softmax(-1).nan_to_num(0.0).to(DEVICE)


def targets(mass, seed=1):
    """From below 0 to above 1."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(mass.shape[:-1], generator=generator).to(DEVICE) * 1.6 - 0.3


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 200), st.integers(0, 99))
def test_smallest_sets(rows, entries, seed):
    mass = masses(rows, entries, seed)
    target = targets(mass, seed)
    assert torch.equal(sets.top_set(mass, target), smallest_set(mass, target))


@pytest.mark.parametrize("count", [0, 1, 7, 500])
def test_top_k(count):
    mass = masses(3, 90)
    assert torch.equal(sets.top_k(mass, count), sorted_top_k(mass, count))


def test_rows_longer_than_a_tile(monkeypatch):
    monkeypatch.setattr(sets, "MAX_TILE", 64)
    mass = masses(3, 1000)
    assert torch.equal(sets.top_set(mass, targets(mass)), smallest_set(mass, targets(mass)))
    assert torch.equal(sets.top_k(mass, 9), sorted_top_k(mass, 9))


def test_targets_out_of_reach_take_all_that_has_mass():
    mass = masses(2, 50)
    high, low = torch.full_like(mass[..., 0], 2.0), torch.zeros_like(mass[..., 0])
    assert torch.equal(sets.top_set(mass, high), mass > 0)
    assert not sets.top_set(mass, low).any()


def test_entries_of_equal_mass_are_selected_together():
    mass = torch.tensor([[0.3, 0.2, 0.2, 0.2, 0.1]], device=DEVICE)
    found = sets.top_set(mass, torch.tensor([0.45], device=DEVICE))
    assert found.tolist() == [[True, True, True, True, False]]


@pytest.mark.gpu
@pytest.mark.parametrize("entries", [513, 8192, 40000])
def test_on_a_gpu(entries):
    mass = masses(64, entries)
    found, expected = sets.top_set(mass, targets(mass)), smallest_set(mass, targets(mass))
    # Sums round otherwise: an entry at the edge may fall to either side.
    assert (found != expected).sum(-1).max() <= 1
    assert torch.equal(sets.top_k(mass, 128), sorted_top_k(mass, 128))

"""Quest's pages, by loops over its definition."""

import pytest
import torch

from rtpurbo.evaluation.policies.selectors import page_bounds, quest
from rtpurbo.ops.eager.selection import block_ids
from tests.evaluation.policies.support import every_query, random_queries

PAGE = 8


def bound(query, keys):
    """The most that any key within the elementwise bounds of these could score."""
    products = torch.stack([query * keys.amin(0), query * keys.amax(0)])
    return products.amax(0).sum()


@pytest.mark.parametrize(("q_len", "k_len"), [(1, 63), (1, 129), (31, 111)])
def test_the_pages_of_highest_bounds_are_read(q_len, k_len):
    rows = random_queries(q_len, k_len)
    selected = quest(20, PAGE)(rows)
    for batch, head, row in every_query(rows):
        positions, far = rows.key_positions[batch], rows.far[batch, 0, row]
        pages = {}
        for page in sorted(set((positions[far] // PAGE).tolist())):
            of_page = (positions >= 0) & (positions // PAGE == page)
            pages[page] = bound(
                rows.query_states[batch, head, row], rows.key_states[batch, head, of_page]
            )
        best = sorted(pages, key=lambda page: -pages[page])[:3]  # 20 tokens are 3 pages
        expected = far & torch.isin(positions // PAGE, torch.tensor(best or [-9]))
        assert torch.equal(selected[batch, head, row], expected)


def test_no_budget_reads_nothing():
    assert not quest(0)(random_queries(1, 100)).any()


def test_bounds_hold_every_key_and_leave_padding_out():
    rows = random_queries(1, 61)
    pages = block_ids(rows.key_positions, PAGE)
    least, greatest = page_bounds(rows.key_states, rows.key_positions, pages)
    real = (rows.key_positions >= 0)[:, None, :, None]
    ids = pages[:, None, :, None].expand(rows.key_states.shape)
    assert (rows.key_states >= least.gather(2, ids))[real.expand(ids.shape)].all()
    assert (rows.key_states <= greatest.gather(2, ids))[real.expand(ids.shape)].all()
    # Padding is labelled with page 0, and of another kind than all keys.
    rows.key_states.masked_fill_(~real, 1e6)
    assert torch.equal(page_bounds(rows.key_states, rows.key_positions, pages)[1], greatest)

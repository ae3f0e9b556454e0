"""The loss of stage 1 over packed documents, in plain PyTorch: the specification."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.ops.eager import divergence, visibility
from rtpurbo.ops.eager.divergence import near_and_far
from rtpurbo.ops.packed import document_starts, indexer_divergence
from tests.ops.divergence_support import RULE, SCALING, indexer_problem
from tests.ops.triton.support import DEVICE

pytestmark = pytest.mark.kernels


def by_hand(problem, rule):
    """The sum over a row's keys, key by key, as the paper writes it: [heads, rows]."""
    losses = torch.zeros(problem.query_states.shape[:2], dtype=torch.float64)
    for head, reader in enumerate(problem.key_value_heads.tolist()):
        for row, place in enumerate(problem.rows.tolist()):
            start = int(problem.starts[place])
            keys = range(start, place + 1)
            exact = torch.stack(
                [
                    SCALING * problem.query_states[head, row] @ problem.key_states[reader, key]
                    for key in keys
                ]
            )
            estimate = torch.stack(
                [
                    exact[key - start]
                    if rule.reading != "paper"
                    and (key > place - rule.sliding_window or key < start + rule.num_sink_tokens)
                    else problem.index_queries[head, row] @ problem.index_keys[head, key]
                    for key in keys
                ]
            )
            p, q = exact.softmax(-1), estimate.softmax(-1)
            losses[head, row] = (p * (p / q).log()).sum()
    return losses


@pytest.mark.parametrize("reading", ["paper", "residual", "far"])
def test_loss_is_the_textbook_sum_within_each_document(reading):
    rule = replace(RULE, reading=reading, sliding_window=16)
    problem = indexer_problem((30, 1, 27), heads=2, key_value_heads=1)
    # What retrieval heads find by their index lies before their own window.
    losses, *_ = problem.run(
        indexer_divergence, replace(rule, sliding_window=20, retrieval_window=16)
    )
    torch.testing.assert_close(losses, by_hand(problem, rule))
    if reading != "paper":
        positions = problem.rows - problem.starts
        without_far = positions < rule.sliding_window + rule.num_sink_tokens
        assert losses[:, without_far].abs().max() < 1e-12
        assert (losses[:, ~without_far] > 0).all()


@pytest.mark.parametrize("reading", ["paper", "residual"])
def test_gradients_by_finite_differences(reading):
    rule = replace(RULE, reading=reading, sliding_window=16)
    problem = indexer_problem((24, 9), index_dim=3, rows=[0, 20, 23, 24, 30], heads=2)

    def losses(queries, keys):
        arguments = vars(replace(problem, index_queries=queries, index_keys=keys)).copy()
        del arguments["upstream"]
        return indexer_divergence(*arguments.values(), rule, scaling=SCALING)

    inputs = (problem.index_queries.requires_grad_(), problem.index_keys.requires_grad_())
    assert torch.autograd.gradcheck(losses, inputs)


def test_chunks_change_nothing(monkeypatch):
    problem = indexer_problem((50, 14))
    expected = problem.run(indexer_divergence, RULE)
    chunks = []

    def watched(*arguments):
        chunks.extend(visibility.query_chunks(*arguments))
        return chunks

    monkeypatch.setattr(visibility, "MAX_CHUNK_ELEMENTS", 2000)
    monkeypatch.setattr(divergence, "query_chunks", watched)
    torch.testing.assert_close(problem.run(indexer_divergence, RULE), expected)
    assert len(chunks) > 5


def test_a_query_sees_its_own_document_only():
    near, far = near_and_far(torch.tensor([2, 9, 15]), document_starts([3, 13], "cpu"), 4, 2)
    assert near.nonzero().tolist() == [
        *([0, key] for key in (0, 1, 2)),
        *([1, key] for key in (3, 4, 6, 7, 8, 9)),
        *([2, key] for key in (3, 4, 12, 13, 14, 15)),
    ]
    assert far.nonzero().tolist() == [[1, 5], *([2, key] for key in range(5, 12))]


def test_misfits_are_explained():
    problem = indexer_problem((20,))
    with pytest.raises(ValueError, match=r"index_keys are \(3, 19, 8\), but must be \(3, 20, 8\)"):
        replace(problem, index_keys=problem.index_keys[:, 1:]).run(indexer_divergence, RULE)
    with pytest.raises(ValueError, match="'magic' has no operator 'indexer_divergence'"):
        problem.run(indexer_divergence, RULE, backend="magic")
    problem = problem.to(DEVICE, torch.float64, torch.float64)
    with pytest.raises(ValueError, match=r"states are in torch\.float64\. Choose backend 'eager'"):
        problem.run(indexer_divergence, RULE, backend="triton")

"""The fused loss of stage 1 and its gradients are as exact as plain PyTorch's in the same precision."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.ops.packed import indexer_divergence
from tests.ops.divergence_support import RULE, indexer_problem
from tests.ops.triton.support import DEVICE, DTYPES, EPSILON

pytestmark = pytest.mark.kernels

SIZES = [(64, 4), (96, 16), (128, 16), (128, 32)]
INDEX_EPSILON = {**EPSILON, torch.bfloat16: EPSILON[torch.float16]}


def assert_as_exact_as_eager(problem, rule, dtype):
    exactly = problem.to(DEVICE, torch.float64, torch.float64)
    expected = exactly.run(indexer_divergence, rule, backend="eager")
    given = problem.to(DEVICE, dtype, torch.float32)
    actual = given.run(indexer_divergence, rule, backend="triton")
    plain = given.run(indexer_divergence, rule, backend="eager")
    assert actual[0].dtype == torch.float32
    for name, exact, ours, theirs in zip(
        ("loss", "query gradient", "key gradient"), expected, actual, plain, strict=True
    ):
        scale = exact.abs().max().clamp(min=1e-2)
        error, allowed = ((part.double() - exact).abs().max() / scale for part in (ours, theirs))
        # Index states and gradients are multiplied in the half precision that has more bits.
        floor = 16 * (EPSILON[torch.float32] if name == "loss" else INDEX_EPSILON[dtype])
        assert error <= 2 * allowed + floor, (name, float(error), float(allowed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reading", ["paper", "residual"])
@pytest.mark.parametrize(
    ("documents", "rows"),
    [
        ((1,), None),
        ((300,), None),
        ((100, 3, 130, 30), None),
        ((170, 90), [0, 1, 50, 99, 169, 170, 173, 174, 240, 259]),
    ],
    ids=str,
)
def test_loss_and_gradients(dtype, reading, documents, rows):
    problem = indexer_problem(documents, rows=rows)
    assert_as_exact_as_eager(problem, replace(RULE, reading=reading), dtype)


@pytest.mark.parametrize(
    ("head_dim", "index_dim", "heads", "key_value_heads"), [(24, 4, 4, 1), (16, 20, 2, 2)]
)
def test_sizes_that_fill_no_tile(head_dim, index_dim, heads, key_value_heads):
    problem = indexer_problem(
        (150,), head_dim, index_dim, heads=heads, key_value_heads=key_value_heads
    )
    assert_as_exact_as_eager(problem, RULE, torch.float16)


def test_queries_with_small_weights_keep_their_gradient():
    problem = indexer_problem((200,))
    faint = replace(problem, upstream=problem.upstream.abs() * 1e-9)
    assert_as_exact_as_eager(faint, RULE, torch.float16)
    _, queries, keys = (
        replace(problem, upstream=0 * problem.upstream)
        .to(DEVICE, torch.float16, torch.float32)
        .run(indexer_divergence, RULE, backend="triton")
    )
    assert not queries.any()
    assert not keys.any()


def test_queries_with_small_weights_count_next_to_one_with_a_large_weight():
    problem = indexer_problem((260,))
    weights = torch.full_like(problem.upstream, 1e-6)
    weights[:, 60] = 1.0
    problem = replace(problem, upstream=weights)
    _, _, expected = problem.run(indexer_divergence, RULE, backend="eager")
    given = problem.to(DEVICE, torch.float16, torch.float32)
    _, _, found = given.run(indexer_divergence, RULE, backend="triton")
    # These keys come after the one row.
    found, expected = found[:, 70:210].double().cpu(), expected[:, 70:210]
    assert (found - expected).norm() < 2e-3 * expected.norm()


def test_sharp_distributions_stay_exact():
    problem = indexer_problem((260,))
    sharp = replace(problem, query_states=8 * problem.query_states)
    assert_as_exact_as_eager(sharp, RULE, torch.float16)


def test_no_queries_and_no_gradient():
    problem = indexer_problem((60,), rows=[]).to(DEVICE, torch.float16, torch.float32)
    losses, queries, keys = problem.run(indexer_divergence, RULE, backend="triton")
    assert losses.shape == (3, 0)
    assert queries.shape == (3, 0, 8)
    assert not keys.any()
    problem = indexer_problem((60,)).to(DEVICE, torch.float16, torch.float32)
    arguments = [value for name, value in vars(problem).items() if name != "upstream"]
    losses = indexer_divergence(*arguments, RULE, scaling=0.4, backend="triton")
    assert not losses.requires_grad
    torch.testing.assert_close(losses, problem.run(indexer_divergence, RULE, backend="triton")[0])


def test_learnable_queries_are_refused():
    problem = indexer_problem((20,)).to(DEVICE, torch.float16, torch.float32)
    problem.query_states.requires_grad_()
    with pytest.raises(ValueError, match="no gradients of the model's own queries and keys"):
        problem.run(indexer_divergence, RULE, backend="triton")


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_dim", "index_dim", "dtype"),
    [
        *((*sizes, dtype) for sizes in SIZES for dtype in (torch.float16, torch.bfloat16)),
        (64, 4, torch.float32),
        (128, 16, torch.float32),
    ],
    ids=str,
)
def test_real_sizes_on_a_gpu(head_dim, index_dim, dtype):
    problem = indexer_problem((1200, 130, 700), head_dim, index_dim)
    problem = replace(problem, query_states=problem.query_states * 4 / head_dim**0.5)
    for reading in ("paper", "residual"):
        rule = replace(RULE, reading=reading, sliding_window=256)
        assert_as_exact_as_eager(problem, rule, dtype)


@pytest.mark.gpu
def test_loss_and_gradient_of_single_queries_of_a_long_sequence():
    """Offsets at 131,072 tokens: rows taken out have the loss and the gradient that they have among all."""
    length, heads = 131072, 20
    generator = torch.Generator(DEVICE).manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE)

    queries, keys = (draw(heads, length, 128).bfloat16() for _ in range(2))
    index_queries, index_keys = (draw(heads, length, 16) for _ in range(2))
    starts = torch.zeros(length, dtype=torch.int64, device=DEVICE)
    readers = torch.arange(heads, device=DEVICE)
    rule = replace(RULE, sliding_window=8192)

    def run(rows, taught, operator_backend):
        """Losses and gradients of the rows whose numbers are given, and the gradients of keys."""
        part, every_key = index_queries[:, rows], index_keys.clone()
        part.requires_grad_()
        every_key.requires_grad_()
        losses = indexer_divergence(
            queries[:, rows], keys, readers, part, every_key, rows, starts, rule,
            scaling=0.02, backend=operator_backend,
        )[:, taught]  # fmt: skip
        losses.sum().backward()
        return losses.detach(), part.grad[:, taught], every_key.grad

    every = torch.arange(length, device=DEVICE)
    some = torch.tensor([9000, 70000, 131071], device=DEVICE)
    expected = run(some, every[:3], "eager")
    for found in (run(every, some, "triton"), run(some, every[:3], "triton")):
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours - theirs).norm() < 1e-2 * theirs.norm()

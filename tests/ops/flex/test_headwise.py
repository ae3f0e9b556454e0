"""A whole layer by FlexAttention equals the specification, forward and backward."""

from dataclasses import replace

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as pytorch
from torch.utils.checkpoint import checkpoint

from rtpurbo.ops import SelectionStatistics, headwise_attention
from rtpurbo.ops.flex import headwise
from tests import oracles
from tests.ops.flex.support import HEAD_SETS, RULE, arguments, eager, flex, output_and_gradients
from tests.oracles import random_problem


@pytest.fixture
def gradients_on_a_cpu(monkeypatch):
    """PyTorch refuses them there, but its plain implementation computes them."""
    monkeypatch.setattr(pytorch, "_validate_device", lambda *tensors: None)


@pytest.mark.parametrize("retrieval_heads", HEAD_SETS, ids=str)
@pytest.mark.parametrize("num_selecting", [0, 1, 50])
@pytest.mark.parametrize("length", [63, 150])
@pytest.mark.parametrize("shared_index", [False, True])
def test_equals_the_specification(retrieval_heads, num_selecting, length, shared_index):
    problem = random_problem(length, length, shared_index=shared_index)
    call = arguments(problem, retrieval_heads, num_selecting)
    expected = eager(*call, RULE, scaling=0.3, return_log_sum_exp=True)
    found = flex(*call, RULE, scaling=0.3, return_log_sum_exp=True)
    torch.testing.assert_close(found, expected)
    output, nothing = flex(*call, RULE, scaling=0.3)
    torch.testing.assert_close(output, expected[0])
    assert nothing is None


def test_equals_the_oracle():
    problem = random_problem(70, 70)
    rule = replace(RULE, retrieval_window=20)
    mask = oracles.headwise_keys(problem, rule, (0, 3), 20)
    found = flex(*arguments(problem, (0, 3), 20), rule, scaling=problem.scaling)
    torch.testing.assert_close(found[0], oracles.attend(problem, mask)[0])


@pytest.mark.parametrize(
    "changes",
    [
        {"retrieval_window": 11},
        {"granularity": "block"},
        {"top_p": 1.0},
        {"reading": "paper"},
        {"reading": "far"},
        {"num_sink_tokens": 0},
    ],
    ids=str,
)
def test_follows_every_rule(changes):
    rule = replace(RULE, **changes)
    call = arguments(random_problem(130, 130, padding=(0, 0)), (0, 2), 30)
    found, expected = (operator(*call, rule, scaling=0.3)[0] for operator in (flex, eager))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("retrieval_heads", HEAD_SETS, ids=str)
@pytest.mark.parametrize("num_selecting", [0, 40])
def test_gradients_equal_the_specifications(retrieval_heads, num_selecting, gradients_on_a_cpu):
    problem = random_problem(140, 140)
    found, expected = (
        output_and_gradients(operator, problem, retrieval_heads, num_selecting)
        for operator in (flex, eager)
    )
    torch.testing.assert_close(found, expected)


def test_small_chunks_of_queries_select_the_same(monkeypatch):
    call = arguments(random_problem(100, 100), (0, 3), 50)
    expected, _ = flex(*call, RULE, scaling=0.3)
    monkeypatch.setattr("rtpurbo.ops.flex.selection.MAX_PAIRS", 7 * 2 * 100)
    assert torch.equal(flex(*call, RULE, scaling=0.3)[0], expected)


def test_counts_as_the_specification_does():
    call = arguments(random_problem(100, 100), (0, 3), 50)
    counted, expected = SelectionStatistics(), SelectionStatistics()
    flex(*call, RULE, scaling=0.3, statistics=counted)
    eager(*call, RULE, scaling=0.3, statistics=expected)
    assert counted == expected
    assert counted.queries


def test_states_of_several_dtypes_are_cast_to_that_of_autocast():
    problem = random_problem(60, 60)
    mixed = replace(problem.to(torch.float32), values=problem.values.to(torch.bfloat16))
    call = arguments(mixed, (0,), 5)
    with torch.autocast("cpu", torch.bfloat16):
        output, _ = headwise_attention(*call, RULE, scaling=0.3, backend="flex")
    assert output.dtype == torch.bfloat16
    expected, _ = eager(*arguments(problem, (0,), 5), RULE, scaling=0.3)
    assert (output - expected).abs().mean() < 0.02
    with pytest.raises(ValueError, match="differ in dtype"):
        headwise_attention(*call, RULE, scaling=0.3, backend="flex")


def test_layers_of_a_length_share_a_compiled_kernel(monkeypatch, gradients_on_a_cpu):
    """Whatever their heads, whatever the rows that select: one graph, and one backward."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(headwise._attend, backend=counter, dynamic=False, fullgraph=True)
    cases = [
        ((0, 3), 7, RULE),
        ((1,), 60, RULE),
        ((), 0, RULE),
        ((2,), 0, RULE),
        ((0,), 9, replace(RULE, sliding_window=64, retrieval_window=16)),
    ]
    for number, (heads, num_selecting, rule) in enumerate(cases):
        problem = random_problem(200 + number, 200 + number).to(torch.float32)
        monkeypatch.undo()
        monkeypatch.setattr(pytorch, "_validate_device", lambda *tensors: None)
        expected = output_and_gradients(flex, problem, heads, num_selecting, rule)
        monkeypatch.setattr(headwise, "_attend", compiled)

        def again(*call, **options):
            # As it is met in training: run twice, the second time for the backward.
            return checkpoint(flex, *call, use_reentrant=False, **options)

        found = output_and_gradients(again, problem, heads, num_selecting, rule)
        torch.testing.assert_close(found, expected)
    assert counter.frame_count == 1


@pytest.mark.slow
def test_compiled_for_a_cpu_it_follows_the_block_tables(monkeypatch):
    compiled = torch.compile(headwise._attend, dynamic=False, fullgraph=True)
    monkeypatch.setattr(headwise, "_attend", compiled)
    for length in (600, 700):
        problem = random_problem(length, length, head_dim=16).to(torch.float32)
        for heads, num_selecting in (((0, 3), 30), ((1,), 200), ((), 0)):
            call = arguments(problem, heads, num_selecting)
            found, expected = (operator(*call, RULE, scaling=0.3)[0] for operator in (flex, eager))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


REFUSED = {
    "without padding": lambda call: [*call[:2], replace(call[2], in_order=False), *call[3:]],
    "only the last ones may": lambda call: call,
    "differ in dtype": lambda call: [call[0].float(), *call[1:]],
    "no gradients on a CPU": lambda call: [call[0].requires_grad_(), *call[1:]],
}


@pytest.mark.parametrize("complaint", REFUSED)
def test_unsupported_calls_are_rejected(complaint):
    call = REFUSED[complaint](arguments(random_problem(40, 40), (0, 3), 40))
    mode = "top_p" if complaint == "only the last ones may" else "dense"
    with pytest.raises(ValueError, match=f"{complaint}.* Choose backend 'eager'"):
        headwise_attention(*call, replace(RULE, prefill_mode=mode), scaling=0.3, backend="flex")


def test_masks_are_boolean():
    """The compiler for GPUs rejects integer masks."""
    retrieves, windows = torch.tensor([True, False]), torch.tensor([3, 3], dtype=torch.int32)
    start, bits = torch.tensor(5, dtype=torch.int32), torch.zeros(1, 2, 8, 1, dtype=torch.int32)
    entry = [torch.tensor(number, dtype=torch.int32) for number in (0, 1, 7, 3)]
    assert headwise._mask_mod(retrieves, windows, 2, start, bits)(*entry).dtype == torch.bool

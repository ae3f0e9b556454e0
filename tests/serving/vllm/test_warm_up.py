"""Steps before the first request change neither pages nor the histogram workspace."""

from dataclasses import replace

import pytest
import torch

from rtpurbo.ops.triton.decode.workspace import zero_histograms
from rtpurbo.serving.vllm import cuda
from rtpurbo.serving.vllm.warm_up import warm_up_steps
from tests.ops.triton.support import DEVICE, DTYPES
from tests.serving.vllm.test_cuda import HEADS, KEY_VALUE_HEADS, WINDOW, Step, rule_of

pytestmark = pytest.mark.kernels

LONGEST = 40


def launched(step, warm_up):
    """Appends the tokens of a warm-up step to the pages, and attends."""
    count = len(warm_up.requests)
    caches = {}
    for name, cache in step.caches.items():
        num_blocks = -(-LONGEST // cache.pages.block_size)
        caches[name] = replace(cache, batch=warm_up.batch(num_blocks, DEVICE))
    workspace = zero_histograms(count * HEADS, DEVICE)
    caches["full"] = replace(caches["full"], histograms=workspace)
    states = torch.ones(count, HEADS + 2 * KEY_VALUE_HEADS, step.head_dim, device=DEVICE)
    queries, keys, values = states.to(step.dtype).split(
        [HEADS, KEY_VALUE_HEADS, KEY_VALUE_HEADS], 1
    )
    table = torch.ones(LONGEST, step.head_dim, device=DEVICE, dtype=step.dtype)
    positions = torch.zeros(count, dtype=torch.int64, device=DEVICE)
    arguments = (caches["full"], caches["windowed"], step.layout, step.rule)
    queries, _ = cuda.append(queries, keys, values, (table, positions), None, None, *arguments)
    index_queries = step.index_queries[:count]
    cuda.attend(queries, index_queries, *arguments, step.scaling, torch.empty_like(queries))
    return workspace


@pytest.mark.parametrize("dense", [0, 4])
def test_memory_stays_as_it_is(dense):
    rule = rule_of(dense_prompt_queries=dense)
    step = Step([(60, 1, 30), (41, 3, 41)], DTYPES[0], rule)
    parts = [
        part
        for cache in step.caches.values()
        for part in (cache.pages.keys, cache.pages.values, cache.pages.index_keys)
        if part is not None
    ]
    before = [part.contiguous().view(torch.uint8).clone() for part in parts]
    steps = list(warm_up_steps(rule, LONGEST, uniform=True, exceeds_workspace=True))
    assert [step.uniform for step in steps] == [False, True, False]
    for warm_up in steps:
        assert (launched(step, warm_up) == 0).all()
    for part, bytes_before in zip(parts, before, strict=True):
        assert torch.equal(part.contiguous().view(torch.uint8), bytes_before)


def test_prompts_that_fit_in_the_context():
    for longest, expected in ((WINDOW, WINDOW), (1000, WINDOW + 1)):
        step, *_ = warm_up_steps(
            rule_of(dense_prompt_queries=4), longest, uniform=False, exceeds_workspace=False
        )
        batch = step.batch(8, DEVICE)
        assert batch.lengths.tolist() == [2, expected]
        assert batch.dense_queries(rule_of(dense_prompt_queries=4))[1].tolist() == [
            0, int(expected > WINDOW)
        ]  # fmt: skip

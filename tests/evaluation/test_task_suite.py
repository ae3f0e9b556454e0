from types import SimpleNamespace

import pytest
import torch

from rtpurbo.evaluation.task_suite import batches_by_length, questions_at_once


def model(device, sparse):
    rule = object() if sparse else None
    return SimpleNamespace(device=torch.device(device), rtpurbo_config=rule)


@pytest.mark.parametrize(
    ("context_length", "dense", "sparse"),
    [(512, 32, 32), (8192, 16, 32), (16384, 4, 16), (32768, 1, 8), (131072, 1, 2), (2**20, 1, 1)],
)
def test_a_gpu_batches_as_many_questions_as_fit(context_length, dense, sparse):
    assert questions_at_once(model("cuda", False), context_length) == dense
    assert questions_at_once(model("cuda", True), context_length) == sparse


def test_a_cpu_answers_one_question_at_a_time():
    assert questions_at_once(model("cpu", True), 512) == 1


def test_short_questions_share_large_batches_by_length():
    lengths = [100, 900, 500] * 100
    batches = batches_by_length(model("cuda", True), lengths)
    assert sorted(place for batch in batches for place in batch) == list(range(300))
    assert [len(batch) for batch in batches] == [128, 128, 44]
    assert [lengths[batch[0]] for batch in batches] == [900, 500, 100]
    # The longest decides how many fit.
    assert [len(batch) for batch in batches_by_length(model("cuda", False), [30000, 50, 50])] == [
        1,
        2,
    ]
    assert batches_by_length(model("cpu", True), [1, 3, 2]) == [[1], [2], [0]]

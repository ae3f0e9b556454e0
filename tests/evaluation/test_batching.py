from types import SimpleNamespace

import pytest
import torch

from rtpurbo.evaluation.batching import questions_at_once


def model(device, sparse):
    rule = object() if sparse else None
    return SimpleNamespace(device=torch.device(device), rtpurbo_config=rule)


@pytest.mark.parametrize(
    ("context_length", "dense", "sparse"),
    [(512, 32, 32), (8192, 16, 32), (16384, 4, 16), (32768, 1, 8), (131072, 1, 2), (2**20, 1, 1)],
)
def test_a_gpu_answers_as_many_as_fit(context_length, dense, sparse):
    assert questions_at_once(model("cuda", False), context_length) == dense
    assert questions_at_once(model("cuda", True), context_length) == sparse


def test_a_cpu_answers_one_by_one():
    assert questions_at_once(model("cpu", True), 512) == 1

"""Training loop: the update, and batches that are not finite."""

import json
import math
import signal

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from rtpurbo.errors import RTPurboError
from rtpurbo.interruption import StoppedBySignalError, stopping_cleanly
from rtpurbo.settings import IndexerTrainingSettings
from rtpurbo.training.checkpoint import Checkpoint
from rtpurbo.training.failure import SequenceResult
from rtpurbo.training.log import TrainingLog
from rtpurbo.training.loop import StageLoop

SETTINGS = IndexerTrainingSettings(steps=10, warmup_steps=0, learning_rate=0.1)


def make_loop(folder=None, **options):
    weight = nn.Parameter(torch.ones(3))
    if folder is not None:
        options |= {
            "log": TrainingLog(folder / "log.jsonl"),
            "checkpoint": Checkpoint(folder / "stage1.checkpoint", every=4),
        }
    return weight, StageLoop("stage1", {"w": weight}, SETTINGS, **options)


def result(weight, number, factor, **figures):
    loss = factor * weight.sum()
    loss.backward()
    figures = {name: torch.tensor(value) for name, value in figures.items()}
    return SequenceResult(number, [number] * 5, loss.detach(), figures)


def test_gradients_and_figures_are_means_over_sequences():
    weight, loop = make_loop(figures=("answer_loss",))
    norms = []
    loop.optimizer.register_step_pre_hook(lambda *_: norms.append(weight.grad.tolist()))
    means = loop.update(0, [result(weight, 0, 1.0), result(weight, 1, 3.0, answer_loss=0.5)])
    assert means == {"loss": 6.0, "answer_loss": 0.5}
    assert norms == [[2.0, 2.0, 2.0]]
    assert weight.grad is None


def test_gradients_are_clipped():
    weight, loop = make_loop(max_norm=0.5)
    seen = []
    loop.optimizer.register_step_pre_hook(lambda *_: seen.append(float(weight.grad.norm())))
    loop.update(0, [result(weight, 0, 100.0)])
    assert seen == pytest.approx([0.5])


def test_a_loss_that_is_not_finite_saves_its_batch(tmp_path):
    weight, loop = make_loop(tmp_path)
    before = weight.detach().clone()
    results = [result(weight, 6, 1.0), result(weight, 7, math.nan)]
    with pytest.raises(
        RTPurboError, match=r"stage1 stopped at step 4, .* loss \(nan\) of sequence 7 is not finite"
    ) as caught:
        loop.update(3, results)
    path = tmp_path / "stage1-step-000004-not-finite.safetensors"
    assert str(path) in str(caught.value)
    assert {name: ids.tolist() for name, ids in load_file(path).items()} == {"input_ids.7": [7] * 5}
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["losses"] == {"6": "3.0", "7": "nan"}
    assert facts["weights_with_a_gradient_not_finite"] == ["w"]
    assert torch.equal(weight, before)


def test_a_gradient_that_is_not_finite_saves_the_batch(tmp_path):
    weight, loop = make_loop(tmp_path)
    results = [result(weight, 2, 1.0)]
    weight.grad[1] = math.inf
    with pytest.raises(RTPurboError, match=r"gradient \(norm inf, 1 weights\) of sequence 2"):
        loop.update(0, results)
    assert list(load_file(tmp_path / "stage1-step-000001-not-finite.safetensors")) == [
        "input_ids.2"
    ]
    _, loop = make_loop()
    with pytest.raises(RTPurboError, match=r"is not finite; lower the learning rate"):
        loop.update(0, [SequenceResult(0, [1], torch.tensor(math.inf))])


def test_a_signal_saves_a_checkpoint_at_the_end_of_its_step(tmp_path):
    weight, loop = make_loop(tmp_path)
    stopped = pytest.raises(StoppedBySignalError, match="stopped by SIGTERM after step 3 of stage1")
    with stopped, stopping_cleanly(), loop.steps(loop.restore()) as steps:
        for step in steps:
            if step == 2:
                signal.raise_signal(signal.SIGTERM)
            loop.report(step, loop.update(step, [result(weight, step, 1.0)]))
    assert loop.checkpoint.steps_done() == 3
    resumed, second = make_loop(tmp_path)
    assert second.restore() == 3
    assert torch.equal(resumed, weight)


def test_the_last_step_is_always_saved(tmp_path):
    weight, loop = make_loop(tmp_path)
    shown = []
    loop.progress = lambda stage, done, total, figures: shown.append(figures)
    with loop.steps(0) as steps:
        for step in steps:
            loop.report(step, loop.update(step, [result(weight, step, 1.0)]))
    assert loop.checkpoint.steps_done() == SETTINGS.steps
    assert len(list(loop.log.entries())) == SETTINGS.steps
    assert all(figures["tokens_per_second"] > 0 for figures in shown)
    assert "tokens_per_second" not in next(loop.log.entries())

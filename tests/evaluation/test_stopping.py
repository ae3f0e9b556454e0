"""A signal during a test: the question under way is answered, and what was kept is kept."""

import os
import signal

import pytest
import torch

from rtpurbo.evaluation.runner import questions_undisturbed
from rtpurbo.interruption import StoppedBySignalError, stopping_cleanly
from tests.tiny_models import tiny_model


def send():
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture(scope="module")
def model():
    return tiny_model("llama")


def ask(model, tokens):
    model(torch.ones(1, tokens, dtype=torch.long))


def test_a_signal_lets_the_current_answer_finish(model):
    answered = []
    stopped = pytest.raises(StoppedBySignalError, match="SIGTERM in the test vt of full: pass")
    with stopped, stopping_cleanly(), questions_undisturbed(model, "vt of full"):
        ask(model, 5)
        send()
        ask(model, 1)
        answered.append(1)
        ask(model, 5)
        answered.append(2)
    assert answered == [1]
    ask(model, 5)  # nothing stays behind


def test_after_the_last_question_the_test_is_finished(model):
    kept = []
    stopped = pytest.raises(StoppedBySignalError, match="SIGTERM after the test vt of full")
    with stopped, stopping_cleanly(), questions_undisturbed(model, "vt of full"):
        ask(model, 5)
        send()
        kept.append(1)
    assert kept == [1]


def test_without_a_signal_nothing_happens(model):
    with stopping_cleanly(), questions_undisturbed(model, "vt of full"):
        ask(model, 5)

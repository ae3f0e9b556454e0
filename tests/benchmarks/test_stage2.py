import pytest
import torch

from rtpurbo.benchmarks import geometries, stage2
from rtpurbo.benchmarks.stage2 import Stage2Case, bench_stage2
from rtpurbo.errors import RTPurboError
from tests.benchmarks.support import CPU, RULE, FakeClock, session
from tests.benchmarks.test_model import SIZES


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(geometries.GEOMETRIES, "tiny", ("qwen3", {**SIZES, "num_hidden_layers": 4}))
    monkeypatch.setattr(stage2, "CHECKED_TOKENS", 20)


def run(length=150, **options):
    made = session(repeats=2, **options)
    bench_stage2(made, "tiny", RULE, [length], torch.float32)
    return made


def test_a_step_of_both():
    made = run()
    assert not made.results.errors
    ours, eager = made.results.records
    assert (ours.implementation, eager.implementation) == ("rtpurbo", "eager")
    assert (ours.phase, ours.context_length, ours.density) == ("stage2", 150, 1)
    assert ours.model == "tiny, 4 layers"
    assert ours.num_retrieval_heads == 2
    assert ours.note == "LoRA of rank 16"
    assert ours.tokens_per_second == pytest.approx(1000 * 150 / ours.milliseconds, rel=1e-3)


def test_steps_move_the_lora_alone():
    case = Stage2Case("tiny", RULE, torch.float32, CPU, None)
    before = {name: weight.clone() for name, weight in case.student.named_parameters()}
    case.step(*case.sequence(100), "auto")
    for name, weight in case.student.named_parameters():
        assert torch.equal(before[name], weight) != ("lora_" in name)
    _, gradient = case.loss_and_gradient(*case.sequence(100), "auto")
    assert (gradient != 0).all()


def test_sequences_without_a_selection_are_rejected():
    with pytest.raises(RTPurboError, match="sequences of 30 tokens are not longer than sinks"):
        run(30)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (lambda loss, gradient: (2 * loss, gradient), "error of the loss is 100"),
        (lambda loss, gradient: (loss, 1.2 * gradient), "error of the gradient is 20"),
        (lambda loss, gradient: (loss, gradient * torch.nan), "not finite"),
    ],
)
def test_a_wrong_step_gets_no_figure(monkeypatch, changed, complaint):
    real = Stage2Case.loss_and_gradient

    def wrong(self, sequence, targets, backend):
        found = real(self, sequence, targets, backend)
        return found if backend == "eager" else changed(*found)

    monkeypatch.setattr(Stage2Case, "loss_and_gradient", wrong)
    made = run(wanted=("rtpurbo",))
    assert not made.results.records
    assert complaint in made.results.errors[0]


def test_memory_is_stated_where_it_is_counted():
    [record] = run(wanted=("eager",), clock=FakeClock(peak=3 * 2**30)).results.records
    assert record.peak_memory_gib == 3

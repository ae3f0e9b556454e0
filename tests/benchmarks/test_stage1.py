import pytest
import torch

from rtpurbo.benchmarks import geometries, stage1
from rtpurbo.benchmarks.stage1 import Stage1Case, bench_stage1
from rtpurbo.errors import RTPurboError
from tests.benchmarks.support import RULE, FakeClock, session
from tests.benchmarks.test_model import SIZES


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setitem(geometries.GEOMETRIES, "tiny", ("qwen3", {**SIZES, "num_hidden_layers": 4}))
    monkeypatch.setattr(stage1, "WARM_UP_TOKENS", 20)


def run(length=150, documents=1, **options):
    made = session(repeats=2, **options)
    bench_stage1(made, "tiny", RULE, [length], documents, torch.float32)
    return made


def test_a_step_by_kernels_and_by_chunks():
    lines = []
    made = run(log=lines.append)
    assert not made.results.errors
    ours, eager = made.results.records
    assert (ours.implementation, eager.implementation) == ("rtpurbo", "eager")
    assert (ours.phase, ours.context_length, ours.density) == ("stage1", 150, 1)
    assert ours.model == "tiny, 4 layers"
    assert ours.num_retrieval_heads == 2
    assert 0 < ours.loss_share < 1
    assert ours.tokens_per_second == pytest.approx(1000 * 150 / ours.milliseconds, rel=1e-3)
    assert any("of which the loss" in line for line in lines)


def test_packed_documents_are_noted():
    made = run(150, 3, wanted=("rtpurbo",))
    [record] = made.results.records
    assert record.note == "3 documents"


def test_documents_must_have_something_far():
    with pytest.raises(RTPurboError, match="documents of 30 tokens are not longer than sinks"):
        run(150, 5)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (lambda losses, gradient: (2 * losses, gradient), "error of the loss is 100"),
        (lambda losses, gradient: (losses, 1.1 * gradient), "error of the gradient is 10"),
        (lambda losses, gradient: (losses, gradient * torch.nan), "not finite"),
    ],
)
def test_a_wrong_step_gets_no_figure(monkeypatch, changed, complaint):
    real = Stage1Case.loss_and_gradient

    def wrong(self, sequences, backend, rows):
        found = real(self, sequences, backend, rows)
        return found if backend == "eager" else changed(*found)

    monkeypatch.setattr(Stage1Case, "loss_and_gradient", wrong)
    made = run(wanted=("rtpurbo",))
    assert not made.results.records
    assert complaint in made.results.errors[0]


def test_memory_is_stated_where_it_is_counted():
    [record] = run(wanted=("eager",), clock=FakeClock(peak=3 * 2**30)).results.records
    assert record.peak_memory_gib == 3

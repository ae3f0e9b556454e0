import pytest
import torch

from rtpurbo.benchmarks import sparse_prefill
from rtpurbo.benchmarks.prefill import IMPLEMENTATIONS, bench_prefill
from rtpurbo.ops.triton.prefill import portable
from tests.benchmarks.support import RULE, SHAPE, found, session

LENGTH = 150


def run(**options):
    made = session(**options)
    bench_prefill(made, SHAPE, [RULE], [LENGTH], [0.75], torch.float16)
    return made


def test_everything_that_runs_here_is_measured():
    made = run()
    assert not made.results.errors
    records = found(made)
    # The one that needs a GPU is skipped with a note.
    assert set(records) == set(IMPLEMENTATIONS) - {"sdpa-cudnn"}
    assert all("sdpa-cudnn" in note for note in made.results.notes)
    ours = records["rtpurbo"]
    assert ours.density == pytest.approx(0.75, abs=0.05)
    assert (ours.phase, ours.context_length, ours.num_retrieval_heads) == ("prefill", LENGTH, 1)
    assert (ours.sliding_window, ours.retrieval_window) == (32, 16)
    assert records["duo-attention-shape"].num_retrieval_heads == 2
    assert records["sdpa-flash"].density == 1


@pytest.mark.parametrize("step", ["block_sparse_attention", "block_lists"])
def test_a_kernel_that_leaves_something_out_gets_no_figure(monkeypatch, step):
    replacement = (
        (lambda *args: None) if step == "block_sparse_attention" else (lambda *args: iter(()))
    )
    made = session(wanted=("rtpurbo",))
    real = sparse_prefill.SparsePrefill.force

    def force(self, *args):
        reached = real(self, *args)
        place = portable if step == "block_sparse_attention" else sparse_prefill
        monkeypatch.setattr(place, step, replacement)
        return reached

    monkeypatch.setattr(sparse_prefill.SparsePrefill, "force", force)
    bench_prefill(made, SHAPE, [RULE], [LENGTH], [0.75], torch.float16)
    assert not made.results.records
    [error] = made.results.errors
    assert error.startswith("prefill rtpurbo at 150 tokens")
    assert "is not recorded: the relative error of its output is" in error


def test_a_length_that_fails_does_not_end_the_run(monkeypatch):
    def fail(*args, **kwargs):
        raise RuntimeError("no memory for that")

    monkeypatch.setattr("rtpurbo.benchmarks.layer.LayerStates.random", fail)
    assert run().results.errors == [
        "prefill at 150 tokens skipped: RuntimeError: no memory for that."
    ]

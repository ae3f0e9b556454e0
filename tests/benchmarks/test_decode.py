from dataclasses import replace

import pytest
import torch

from rtpurbo.benchmarks import decode
from rtpurbo.benchmarks.decode import bench_decode, num_sets
from rtpurbo.benchmarks.layer import LayerShape
from rtpurbo.config import AttentionRule
from tests.benchmarks.support import RULE, SHAPE, found, session

LENGTH = 150


@pytest.fixture(autouse=True)
def two_sets(monkeypatch):
    monkeypatch.setattr(decode, "MAX_SETS", 2)


def run(**options):
    made = session(**options)
    bench_decode(made, SHAPE, [RULE], [LENGTH], [0.2], [1], torch.float16)
    return made


def test_everything_that_runs_here_is_measured():
    made = run()
    assert not made.results.errors
    records = found(made)
    assert set(records) == {"rtpurbo", "rtpurbo-float8-index", "rtpurbo-token", "sdpa-flash"}
    # Selections are rounded up, to whole blocks and to whole bins of scores.
    assert 0.15 < records["rtpurbo"].density < 0.35
    assert 0.2 <= records["rtpurbo-token"].density < 0.3
    assert records["sdpa-flash"].density == 1
    # Two sets of inputs a call.
    assert records["rtpurbo"].milliseconds == pytest.approx(10.5 / 2)


def test_a_batch_and_two_windows():
    made = session(wanted=("rtpurbo-token", "sdpa-flash"))
    rules = [RULE, replace(RULE, sliding_window=48)]
    bench_decode(made, SHAPE, rules, [LENGTH], [0.2], [2], torch.float16)
    assert [
        (record.implementation, record.sliding_window, record.batch_size)
        for record in made.results.records
    ] == [("rtpurbo-token", 32, 2), ("rtpurbo-token", 48, 2), ("sdpa-flash", 32, 2)]


def test_a_step_that_reads_the_wrong_keys_gets_no_figure(monkeypatch):
    real = decode.decode_step

    def shifted(queries, full, windowed, *args):
        output, sums, selection = real(queries, full, windowed, *args)
        return output.roll(1, 1), sums, selection

    monkeypatch.setattr(decode, "decode_step", shifted)
    made = run(wanted=("rtpurbo",))
    assert not made.results.records
    assert "is not recorded: the relative error of its output is" in made.results.errors[0]


def test_a_step_that_selects_too_little_gets_no_figure(monkeypatch):
    real = decode.forced

    def lazy(rule, density, *args):
        return real(rule, density / 4, *args)

    monkeypatch.setattr(decode, "forced", lazy)
    made = run(wanted=("rtpurbo-token",))
    assert not made.results.records
    assert "of the keys instead of at least 0.2" in made.results.errors[0]


def test_sets_are_as_many_as_the_cache_of_a_gpu_makes_necessary(monkeypatch):
    monkeypatch.undo()
    shape, rule = LayerShape.spread(32, 4, 128, 5), AttentionRule(sliding_window=8192)
    counts = [num_sets(shape, rule, length, 1, torch.bfloat16, 0.03) for length in (2**15, 2**20)]
    assert counts[0] > counts[1] >= 2
    # 24 GiB of keys and values at the most, but one set in any case.
    assert num_sets(shape, rule, 2**20, 64, torch.bfloat16, 0.03) == 1

"""Resumed evaluations: no result is lost, measured twice or mixed with others."""

import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.paths import log_path, samples_path
from rtpurbo.evaluation.policies import Source
from rtpurbo.evaluation.records import read_results
from rtpurbo.evaluation.results_log import ResultsLog
from rtpurbo.evaluation.run import evaluate
from rtpurbo.evaluation.samples import Outcome, Sample, read_samples
from rtpurbo.interruption import StoppedBySignalError, stopping_cleanly
from rtpurbo.models.artifact_config import INDEXER_FILE

# Both needles together set the budget of each.
SUITES = ("needle:single,multikey@512", "perplexity@128")
POLICIES = ("full", "rtpurbo", "top-k")
SAMPLES = 2
A_POLICY = 3 * SAMPLES


def run(artifact, path, *, resume=True, **options):
    options = {
        "suites": SUITES, "policies": POLICIES, "samples": SAMPLES, "device": "cpu",
    } | options  # fmt: skip
    with ResultsLog(path, str(artifact), "cpu", "rtpurbo eval", resume=resume) as results:
        return evaluate(artifact, results=results, **options)


class Stop:
    """A `progress` that does something when so many samples were answered."""

    def __init__(self, after, action):
        self.after, self.action, self.answered = after, action, 0
        self.seen = {}

    def __call__(self, stage, done, total, figures):
        if stage == "prompts":
            return
        # The first call reports the samples of earlier runs.
        self.answered += done - self.seen.get(stage, done)
        is_new = done > self.seen.get(stage, done)
        self.seen[stage] = done
        if is_new and self.answered == self.after:
            self.action()


def be_killed():
    raise MemoryError


def be_asked_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)


def contents(path):
    return read_results(path).records, read_samples(samples_path(path))


@pytest.fixture(scope="module", autouse=True)
def _fine_budgets():
    """Such that every row of every test counts: the tiny model reads a far token or two."""
    with pytest.MonkeyPatch.context() as patch:
        fine = SimpleNamespace(ceil=lambda mean: round(100 * mean))
        patch.setattr("rtpurbo.evaluation.budgets.math", fine)
        yield


@pytest.fixture(scope="module")
def whole(tiny_artifact, tmp_path_factory):
    """The file of a run that nobody interrupted."""
    path = tmp_path_factory.mktemp("whole") / "results.json"
    records = run(tiny_artifact, path, resume=False)
    assert read_results(path).records == records
    assert len(records) == 9
    return path


@pytest.fixture
def copy(whole, tmp_path):
    for path in (whole, samples_path(whole), log_path(whole)):
        shutil.copy(path, tmp_path)
    return tmp_path / whole.name


@pytest.fixture
def nothing_loaded(monkeypatch):
    for name in ("dense", "sparse"):
        monkeypatch.setattr(Source, name, lambda *_, **__: pytest.fail("a model was loaded"))


# In the first test, within the second, after the first needle of the policy that sets budgets,
# and within each of the tests that have one.
@pytest.mark.parametrize(
    "after",
    [1, SAMPLES + 1, A_POLICY + SAMPLES + 1, 2 * A_POLICY + 1, 2 * A_POLICY + SAMPLES + 1],
)
def test_a_run_interrupted_anywhere_and_resumed_equals_an_uninterrupted_one(
    tiny_artifact, whole, tmp_path, after
):
    path = tmp_path / "results.json"
    with pytest.raises(MemoryError):
        run(tiny_artifact, path, progress=Stop(after, be_killed))
    there = len(read_results(path).records) if path.exists() else 0
    assert there == (after - 1) // SAMPLES
    expected = contents(whole)
    assert run(tiny_artifact, path) == expected[0]
    assert contents(path) == expected


@pytest.mark.parametrize("after", [A_POLICY + 1, A_POLICY + SAMPLES])
def test_a_signal_ends_a_run_with_all_complete_results_written(
    tiny_artifact, whole, tmp_path, after
):
    path = tmp_path / "results.json"
    stop = Stop(after, be_asked_to_stop)
    with pytest.raises(StoppedBySignalError) as stopped, stopping_cleanly():
        run(tiny_artifact, path, progress=stop)
    assert stop.answered == after
    # A test whose last question was being answered is finished.
    assert len(read_results(path).records) == after // SAMPLES
    where = "in" if after % SAMPLES else "after"
    assert f"{where} the test needle single 512 of rtpurbo: pass --resume" in str(stopped.value)
    run(tiny_artifact, path)
    assert contents(path) == contents(whole)


def test_a_complete_run_loads_and_writes_nothing(tiny_artifact, whole, copy, nothing_loaded):
    before, calls = copy.read_bytes(), []
    records = run(tiny_artifact, copy, progress=lambda *call: calls.append(call))
    assert records == contents(whole)[0]
    assert copy.read_bytes() == before
    assert calls == [(policy, A_POLICY, A_POLICY, {}) for policy in POLICIES]
    # The budget is still that of all tests.
    some = run(tiny_artifact, copy, suites=["needle:multikey@512"], policies=["top-k"])
    assert some == [record for record in records[3:] if record.task == "multikey"]


def test_only_policies_with_something_missing_are_loaded(tiny_artifact, copy, monkeypatch):
    monkeypatch.setattr(Source, "dense", lambda *_: pytest.fail("full is done"))
    calls = []
    records = run(
        tiny_artifact,
        copy,
        policies=["full", "local-only"],
        progress=lambda *call: calls.append(call),
    )
    assert [record.policy for record in records] == 3 * ["full"] + 3 * ["local-only"]
    assert [record.policy for record in contents(copy)[0]] == [
        policy for policy in (*POLICIES, "local-only") for _ in range(3)
    ]
    assert calls[0] == ("full", A_POLICY, A_POLICY, {})


def test_bars_include_samples_of_earlier_runs(tiny_artifact, tmp_path):
    path, calls = tmp_path / "results.json", []
    with pytest.raises(MemoryError):
        run(tiny_artifact, path, progress=Stop(SAMPLES + 1, be_killed))
    run(tiny_artifact, path, progress=lambda *call: calls.append(call))
    assert calls[0] == ("full", SAMPLES, A_POLICY, {})
    assert calls[1][:3] == ("full", SAMPLES + 1, A_POLICY)
    of_full = [done for policy, done, *_ in calls if policy == "full"]
    assert of_full == sorted(of_full)
    assert of_full[-1] == A_POLICY


def test_more_tests_of_a_suite_change_its_budget(tiny_artifact, whole, tmp_path):
    path = tmp_path / "results.json"
    first = run(tiny_artifact, path, suites=["needle:single@512"])
    expected = {(item.policy, item.task): item for item in contents(whole)[0]}
    assert first[-1].far_token_budget != expected["top-k", "single"].far_token_budget
    records = run(tiny_artifact, path)
    assert {(item.policy, item.task): item for item in records} == expected
    assert sorted(map(str, contents(path)[1])) == sorted(map(str, contents(whole)[1]))


def other_text(folder):
    path = folder / "other.txt"
    path.write_text(
        "\n\n".join(f"Paragraph {number} of another text. " * 9 for number in range(99))
    )
    return [str(path)]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"seed": 1}, "measured with --seed 0, not 1: repeat its command, or name another file"),
        ({"dtype": torch.bfloat16}, "measured with --dtype float32, not bfloat16"),
        ({"max_new_tokens": 4}, "measured with --max-new-tokens left out, not 4"),
        (
            {"cache_length": 1024},
            "measured with cache sizes computed at the length left out, not 1024",
        ),
        ({"data": other_text}, r"measured with other prose \(--data\): repeat"),
        ({"samples": 3}, "has 2 samples of needle single 512, not 3: ask for as many"),
    ],
)
def test_resuming_with_other_arguments_is_refused(
    tiny_artifact, copy, tmp_path, nothing_loaded, options, sentence
):
    before = copy.read_bytes()
    options = {name: give(tmp_path) if callable(give) else give for name, give in options.items()}
    with pytest.raises(RTPurboError, match=sentence):
        run(tiny_artifact, copy, **options)
    assert copy.read_bytes() == before


def test_another_artifact_is_refused(tiny_artifact, copy, tmp_path, nothing_loaded):
    other = shutil.copytree(tiny_artifact, tmp_path / "other")
    run(other, copy)  # its place is of no consequence
    with (other / INDEXER_FILE).open("ab") as file:
        file.write(b" ")
    with pytest.raises(RTPurboError, match="measured with another artifact: repeat"):
        run(other, copy)


class Harness:
    """Stands in for lm-eval: a group of two tasks of two metrics, asked with one forward each."""

    makes_prompts = True

    def __init__(self, task_data, max_new_tokens, seed):
        pass

    def prepare(self, tokenizer, case, context_length):
        return [Case("lm-eval", name, context_length, case.samples) for name in ("one", "two")]

    def run(self, model, tokenizer, case, after_sample, questions):
        model(torch.ones(1, 200, dtype=torch.long), use_cache=False)
        after_sample()
        sample = Sample.of([1], ["a"], "a", 100.0)
        return [Outcome.of([sample], metric) for metric in ("strict", "flexible")]


def test_groups_of_tasks_with_several_metrics(tiny_artifact, tmp_path, monkeypatch):
    monkeypatch.setattr("rtpurbo.evaluation.harness.suite.Harness", Harness)
    options = {"suites": ["lm-eval:both"], "samples": None}
    whole, path = tmp_path / "whole.json", tmp_path / "results.json"
    records = run(tiny_artifact, whole, **options)
    assert [(item.policy, item.task, item.metric) for item in records] == [
        (policy, task, metric)
        for policy in POLICIES
        for task in ("one", "two")
        for metric in ("strict", "flexible")
    ]
    for after in (4, 6):  # within the second task of rtpurbo, then of top-k
        done = len(read_results(path).records) // 2 if path.exists() else 0
        with pytest.raises(MemoryError):
            run(tiny_artifact, path, progress=Stop(after - done, be_killed), **options)
        assert len(read_results(path).records) == 2 * (after - 1)
    assert run(tiny_artifact, path, **options) == records
    assert contents(path) == contents(whole)

    for name in ("dense", "sparse"):
        monkeypatch.setattr(Source, name, lambda *_, **__: pytest.fail("a model was loaded"))
    calls = []
    options["progress"] = lambda *call: calls.append(call)
    assert run(tiny_artifact, path, **options) == records
    assert calls == [(policy, 2, 2, {}) for policy in POLICIES]
    with pytest.raises(RTPurboError, match="has all samples of lm-eval one 1024, not 5"):
        run(tiny_artifact, path, **(options | {"samples": 5}))

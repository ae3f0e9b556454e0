"""Several processes make the same results as one, and none of them outlives its run."""

import multiprocessing
import os
import signal
from concurrent.futures import Future

import pytest
import torch

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation import workers
from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.policies import Source
from rtpurbo.evaluation.results_log import ResultsLog
from rtpurbo.evaluation.run import evaluate
from rtpurbo.interruption import StoppedBySignalError, stopping_cleanly
from rtpurbo.models.artifact import load


def examine(artifact, processes, **options):
    options = {"suites": ["perplexity@96,128"], "samples": 1, "device": "cpu"} | options
    return evaluate(artifact, processes=processes, **options)


@pytest.fixture(autouse=True)
def nobody_stays():
    yield
    assert not multiprocessing.active_children()


def test_results_are_those_of_one_process(tiny_artifact, tmp_path):
    options = {
        "suites": ["perplexity@96,256", "ruler:niah_single_1,fwe@600", "needle:single@512"],
        "policies": ["full", "top-k"],
        "samples": 2,
    }
    found = []
    for processes in (1, 3):
        calls = []
        file = tmp_path / f"{processes}.json"
        with ResultsLog(file, "tiny", "cpu", "evaluate") as results:
            records = examine(
                tiny_artifact,
                processes,
                results=results,
                progress=lambda *call, calls=calls: calls.append(call[:3]),
                **options,
            )
        found.append((records, {repr(sample) for sample in results.samples}))
        # Each test is counted once on the bar of its policy.
        assert calls[-1] == ("top-k", 10, 10)
        assert ("full", 10, 10) in calls
    assert found[0] == found[1]

    # What is there is not measured again, by however many processes.
    calls = []
    with ResultsLog(file, "tiny", "cpu", "evaluate", resume=True) as results:
        again = examine(
            tiny_artifact,
            2,
            results=results,
            progress=lambda *call: calls.append(call),
            **options,
        )
    assert again == records
    assert all(done == total for _, done, total, _ in calls)


def test_questions_of_ruler_are_made_once(tiny_artifact, tmp_path):
    manifest = workers.RunManifest(Source(tiny_artifact))
    left = [manifest.runner(tmp_path).suites["ruler"] for _ in range(2)]
    _, tokenizer = load(tiny_artifact)
    made = left[0].examples(tokenizer, "niah_multivalue", 1000, 2)
    [file] = tmp_path.iterdir()
    before = file.stat().st_mtime_ns
    assert left[1].examples(tokenizer, "niah_multivalue", 1000, 2) == made
    assert file.stat().st_mtime_ns == before
    assert list(tmp_path.iterdir()) == [file]


def test_errors_of_a_process_are_reported(tiny_artifact):
    with pytest.raises(RTPurboError, match=r"vt does not fit into 600 tokens: .* at least 2,"):
        examine(tiny_artifact, 2, suites=["ruler:vt@600"], policies=["full"])
    with pytest.raises(RTPurboError, match="processes is 0"):
        examine(tiny_artifact, 0)


def test_a_killed_process_ends_the_run_in_one_sentence(tiny_artifact):
    def kill(stage, done, total, figures):
        if done:
            for process in multiprocessing.active_children():
                process.kill()

    with pytest.raises(RTPurboError, match="was killed, perhaps for lack of memory"):
        examine(tiny_artifact, 2, suites=["perplexity@96,128,160,192,224"], progress=kill)


def test_a_signal_ends_all_processes_and_keeps_what_was_measured(tiny_artifact, tmp_path):
    def stop(stage, done, total, figures):
        if done:
            os.kill(os.getpid(), signal.SIGTERM)

    results = ResultsLog(tmp_path / "results.json", "tiny", "cpu", "evaluate")
    with pytest.raises(StoppedBySignalError), stopping_cleanly(), results:
        examine(tiny_artifact, 2, results=results, progress=stop)
    assert len(results.records) == 1
    assert (tmp_path / "results.json").exists()


class Memory:
    """A runner on a GPU that is too full so many times."""

    def __init__(self, times, error):
        self.times = times
        self.error = error

    def run(self, jobs, listener):
        if self.times:
            self.times -= 1
            raise self.error
        for job in jobs:
            listener.answered(job.policy)

    def release(self):
        pass


class Pool:
    """A pool of processes that runs each job at once in this one."""

    def submit(self, function, job):
        future = Future()
        future.set_result(function(job))
        return future


class Answers(list):
    """A listener that keeps the policies of answers."""

    def answered(self, policy, count=1):
        self.extend(count * [policy])


JOBS = [workers.Job(policy, Case("ruler", "vt", 32768, 25)) for policy in ("full", "rtpurbo")]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    ],
)
def test_jobs_out_of_memory_are_repeated_at_the_end(monkeypatch, error):
    def done(times):
        memory = Memory(times, error)
        monkeypatch.setattr(workers, "_worker", workers._Worker(lambda: memory), raising=False)
        answers = Answers()
        workers.WorkerPool(Pool()).run(JOBS, answers)
        return answers

    assert set(done(0)) == set(done(2)) == {"full", "rtpurbo"}
    assert done(1) == ["rtpurbo", "full"]
    said = f"at ruler vt 32768 while other processes run: ask for fewer .* \\({error}\\)"
    with pytest.raises(RTPurboError, match=said):
        done(3)


def test_other_failures_are_not_repeated(monkeypatch):
    memory = Memory(1, RuntimeError("shapes do not match"))
    monkeypatch.setattr(workers, "_worker", workers._Worker(lambda: memory), raising=False)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        workers.WorkerPool(Pool()).run(JOBS[:1], Answers())


def test_the_longest_jobs_of_a_policy_start_first(monkeypatch):
    started = []
    monkeypatch.setattr(workers, "_run", lambda job: started.append(job) or workers.Report(job))
    cases = [Case("ruler", "vt", length, 9) for length in (4096, 8192)]
    cases.append(Case("gsm8k", "all", 0, 9))
    jobs = [workers.Job(policy, case) for policy in ("full", "rtpurbo") for case in cases]
    workers.WorkerPool(Pool()).run(jobs, Answers())
    assert started == [jobs[place] for place in (2, 1, 0, 5, 4, 3)]


def test_processes_take_the_gpus_in_turn(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    places = [workers._device(torch.device("cuda"), index) for index in range(3)]
    assert [place.index for place in places] == [0, 1, 0]
    assert workers._device(torch.device("cuda:1"), 2).index == 1
    assert workers._device(torch.device("cpu"), 2).type == "cpu"

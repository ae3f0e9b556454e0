import json
import os
import signal

import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation import results_file
from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.records import Record, read_results
from rtpurbo.evaluation.results_file import ResultsFile
from rtpurbo.evaluation.samples import Sample, SampleRecord, read_samples, samples_path
from rtpurbo.interruption import StoppedBySignalError, stopping_cleanly
from tests.evaluation.support import conditions

TEST = Case("needle", "single", 4096, 1)
RECORD = Record("needle", "single", 4096, "full", 1, 100.0)
SAMPLE = SampleRecord("needle", "single", 4096, "full", 0, 0, Sample.of([1], ["a"], "a", 100.0))


def opened(path, device="cpu", command="rtpurbo eval model", resume=False):
    return ResultsFile(path, "model", device, command, {"note": "by hand"}, resume=resume)


@pytest.fixture
def path(tmp_path):
    """A file that can be resumed."""
    path = tmp_path / "results.json"
    with opened(path) as results:
        results.begin(conditions())
        results.ask(TEST)
        results.add([RECORD], [SAMPLE])
    return path


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_was_there_when_it_was_cut_is_written(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt), opened(path) as results:
        results.add([RECORD], [SAMPLE])
        assert not path.exists()  # not that often
        raise KeyboardInterrupt
    written = read_results(path)
    assert written.records == [RECORD]
    assert written.origin["note"] == "by hand"
    assert "ruler_words" not in written.origin
    assert written.resumption is None
    assert read_samples(samples_path(path)) == [SAMPLE]


def test_averages_come_in_the_end(monkeypatch, tmp_path):
    monkeypatch.setattr(results_file, "SECONDS_BETWEEN", -1)
    path = tmp_path / "results.json"
    with opened(path) as results:
        for policy, score in (("full", 100.0), ("rtpurbo", 90.0)):
            sample = SampleRecord("ruler", "vt", 4096, policy, 0, 0, Sample.of([1], [], "", score))
            results.add([Record("ruler", "vt", 4096, policy, 1, score)], [sample])
        written = read_results(path)
        assert len(written.records) == 2
        assert written.averages == []
    dense, sparse = read_results(path).averages
    assert (dense.score, dense.difference) == (100.0, None)
    assert (sparse.score, sparse.difference, sparse.difference_ci95) == (
        90.0,
        -10.0,
        (-10.0, -10.0),
    )
    assert results.averages == [dense, sparse]


def test_it_grows_while_the_run_goes_on(monkeypatch, tmp_path):
    monkeypatch.setattr(results_file, "SECONDS_BETWEEN", -1)
    path, ruler = tmp_path / "results.json", Record("ruler", "vt", 4096, "full", 1, 20.0)
    results = opened(path)
    for number, record in enumerate((RECORD, ruler)):
        results.add([record])
        assert len(read_results(path).records) == number + 1
    assert "ruler_words" in read_results(path).origin
    assert not samples_path(path).exists()


def test_nothing_is_written_without_a_path_or_records(tmp_path):
    with opened(None) as results:
        results.add([RECORD])
    assert results.records == [RECORD]
    with opened(tmp_path / "results.json"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_signal_waits_until_both_files_are_written(monkeypatch, tmp_path):
    path, write = tmp_path / "results.json", results_file.write_samples

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        write(*arguments)

    monkeypatch.setattr(results_file, "write_samples", interrupted)
    with pytest.raises(StoppedBySignalError), stopping_cleanly(), opened(path) as results:
        results.add([RECORD], [SAMPLE])
    assert read_results(path).records == [RECORD]
    assert read_samples(samples_path(path)) == [SAMPLE]


def test_what_is_resumed_is_kept_and_what_is_new_comes_after(path):
    other = Record("needle", "multikey", 4096, "full", 1, 50.0)
    with opened(path, resume=True) as results:
        results.begin(conditions())
        assert results.of(TEST, "full") == [RECORD]
        assert results.of(TEST, "rtpurbo") == []
        assert results.tests(TEST) == [TEST]
        results.add([other])
    assert read_results(path).records == [RECORD, other]
    assert read_samples(samples_path(path)) == [SAMPLE]


def test_without_resume_nothing_is_kept(path):
    with opened(path) as results:
        results.begin(conditions(seed=1))
        assert results.records == []


def test_where_there_is_nothing_it_begins(tmp_path):
    with opened(tmp_path / "results.json", resume=True) as results:
        results.begin(conditions())
    assert results.records == []


def test_a_test_taken_again_takes_its_place(path):
    again = Record("needle", "single", 4096, "full", 1, 0.0)
    with opened(path, resume=True) as results:
        results.begin(conditions())
        results.add([again])
    assert read_results(path).records == [again]
    assert results.samples == []


def test_samples_of_a_test_that_was_interrupted_are_left(path):
    line = samples_path(path).read_text()
    samples_path(path).write_text(line + line.replace("single", "multikey"))
    results = opened(path, resume=True)
    results.begin(conditions())
    assert results.samples == [SAMPLE]


def test_the_origin_tells_of_all_runs(path):
    change(path, commit="first")
    commands = "rtpurbo eval model --resume", "rtpurbo eval model --length 9 --resume"
    for number, command in enumerate(commands):
        with opened(path, f"gpu {number}", command, resume=True) as results:
            results.begin(conditions())
            results.add([Record("needle", "single", number, "full", 1, 0.0)])
    origin = read_results(path).origin
    assert origin["device"] == "cpu, gpu 0, gpu 1"
    assert origin["command"] == "rtpurbo eval model && rtpurbo eval model --length 9 --resume"
    assert origin["commit"].startswith("first, ")


def test_groups_are_known_again(path):
    group = Case("lm-eval", "mmlu_pro", 0, 0)
    tests = [Case("lm-eval", name, 1024, 0) for name in ("mmlu_pro_math", "mmlu_pro_law")]
    with opened(path, resume=True) as results:
        results.begin(conditions())
        results.ask(group)
        assert results.tests(group) == []
        results.set_tests(group, tests)
        results.add([Record("lm-eval", "mmlu_pro_law", 1024, "full", 9, 0.0)])
    results = opened(path, resume=True)
    results.begin(conditions())
    results.ask(group)
    assert results.tests(group) == tests
    with pytest.raises(RTPurboError, match="has all samples of lm-eval mmlu_pro_math 1024, not 5:"):
        results.ask(Case("lm-eval", "mmlu_pro", 0, 5))
    with pytest.raises(RTPurboError, match="has 1 samples of needle single 4096, not 2: ask for"):
        results.ask(Case("needle", "single", 4096, 2))


def test_what_was_measured_otherwise_is_refused_and_left_alone(path):
    before = path.read_bytes()
    sentence = r"results.json cannot be resumed, because it was measured with --seed 0, not 1 and "
    sentence += r"with --dtype float32, not float16: repeat its command, or name another file"
    with (
        pytest.raises(RTPurboError, match=sentence),
        opened(path, resume=True) as results,
    ):
        results.begin(conditions(seed=1, dtype="float16"))
    assert path.read_bytes() == before


def test_what_does_not_tell_its_conditions_is_refused(tmp_path):
    path = tmp_path / "results.json"
    with opened(path) as results:
        results.add([RECORD])
    with pytest.raises(RTPurboError, match="does not tell under what conditions it was measured"):
        opened(path, resume=True).begin(conditions())


@pytest.mark.parametrize("content", ["", "line lost"])
def test_lost_samples_are_told(path, content):
    samples_path(path).write_text(content and samples_path(path).read_text().replace("single", "x"))
    with pytest.raises(
        RTPurboError, match=r"samples.jsonl has 0 of its samples and not 1: put the"
    ):
        opened(path, resume=True).begin(conditions())
    samples_path(path).unlink()
    with pytest.raises(RTPurboError, match="there is no file of samples"):
        opened(path, resume=True).begin(conditions())


def test_a_broken_file_is_told(path):
    change(path, resumption={"a": 1})
    with pytest.raises(RTPurboError, match="holds no results or is corrupt"):
        opened(path, resume=True).begin(conditions())

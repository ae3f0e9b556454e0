import json
import os
import signal
from dataclasses import asdict, replace

import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation import results_log
from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.paths import log_path, samples_path
from rtpurbo.evaluation.records import CaseResult, Record, read_results
from rtpurbo.evaluation.results_log import ResultsLog
from rtpurbo.evaluation.samples import Sample, SampleRecord, read_samples
from rtpurbo.interruption import StoppedBySignalError, stopping_cleanly
from tests.evaluation.support import conditions

TEST = Case("needle", "single", 4096, 1)
RECORD = Record("needle", "single", 4096, "full", 1, 100.0)
SAMPLE = SampleRecord("needle", "single", 4096, "full", 0, 0, Sample.of([1], ["a"], "a", 100.0))


def opened(path, device="cpu", command="rtpurbo eval model", resume=False):
    return ResultsLog(path, "model", device, command, {"note": "by hand"}, resume=resume)


@pytest.fixture
def path(tmp_path):
    """A file that can be resumed."""
    path = tmp_path / "results.json"
    with opened(path) as results:
        results.begin(conditions(), [TEST])
        results.add(CaseResult([RECORD], [SAMPLE]))
    return path


def resumed(path, cases=(), **changes):
    results = opened(path, resume=True)
    results.begin(conditions(**changes), cases)
    return results


def change(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_complete_results_of_an_interrupted_run_are_written(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt), opened(path) as results:
        results.begin()
        results.add(CaseResult([RECORD], [SAMPLE]))
        assert not path.exists()
        raise KeyboardInterrupt
    written = read_results(path)
    assert written.records == [RECORD]
    assert written.origin["note"] == "by hand"
    assert "ruler_words" not in written.origin
    assert "conditions" not in written.origin
    assert read_samples(samples_path(path)) == [SAMPLE]


def test_averages_and_the_words_of_ruler(tmp_path):
    path = tmp_path / "results.json"
    with opened(path) as results:
        results.begin()
        for policy, score in (("full", 100.0), ("rtpurbo", 90.0)):
            sample = SampleRecord("ruler", "vt", 4096, policy, 0, 0, Sample.of([1], [], "", score))
            record = Record("ruler", "vt", 4096, policy, 1, score)
            results.add(CaseResult([record], [sample]))
    dense, sparse = read_results(path).averages
    assert (dense.score, dense.difference) == (100.0, None)
    assert (sparse.score, sparse.difference, sparse.difference_ci95) == (
        90.0,
        -10.0,
        (-10.0, -10.0),
    )
    assert results.averages == [dense, sparse]
    assert "ruler_words" in read_results(path).origin


def test_the_log_grows_with_each_result(tmp_path):
    path = tmp_path / "results.json"
    results = opened(path)
    results.begin(conditions(), [TEST])
    assert list(tmp_path.iterdir()) == []
    for number, policy in enumerate(("full", "rtpurbo")):
        results.add(CaseResult([replace(RECORD, policy=policy)], [replace(SAMPLE, policy=policy)]))
        lines = log_path(path).read_text().splitlines()
        assert [next(iter(json.loads(line))) for line in lines] == [
            "run",
            "case",
            *((number + 1) * ["records"]),
        ]
    assert list(tmp_path.iterdir()) == [log_path(path)]
    assert resumed(path).records == results.records
    assert resumed(path).samples == results.samples


def test_nothing_is_written_without_a_path_or_records(tmp_path):
    with opened(None) as results:
        results.begin()
        results.add(CaseResult([RECORD], []))
    assert results.records == [RECORD]
    with opened(tmp_path / "results.json") as results:
        results.begin(conditions(), [TEST])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["write_samples", "append_text"])
def test_a_signal_waits_until_all_files_are_written(monkeypatch, tmp_path, name):
    path, write = tmp_path / "results.json", getattr(results_log, name)

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGTERM)
        return write(*arguments)

    monkeypatch.setattr(results_log, name, interrupted)
    with pytest.raises(StoppedBySignalError), stopping_cleanly(), opened(path) as results:
        results.begin(conditions())
        results.add(CaseResult([RECORD], [SAMPLE]))
    assert read_results(path).records == [RECORD]
    assert read_samples(samples_path(path)) == [SAMPLE]
    assert resumed(path).records == [RECORD]


def test_a_killed_run_is_resumed_from_whole_lines_and_its_files_are_written(path):
    other = replace(RECORD, task="multikey", score=50.0)
    # After the last file was written, a result was logged and another one only in part.
    results = resumed(path)
    results.add(CaseResult([other], []))
    whole = log_path(path).read_bytes()
    log_path(path).write_bytes(whole + b'{"records": [{"suite": "needle", "ta')
    with resumed(path) as results:
        assert results.records == [RECORD, other]
    assert read_results(path).records == [RECORD, other]
    assert log_path(path).read_bytes().startswith(whole)

    third = replace(RECORD, task="multivalue")
    with resumed(path) as results:
        results.add(CaseResult([third], []))
    assert log_path(path).read_bytes().startswith(whole + b'{"run"')
    assert resumed(path).records == [RECORD, other, third]

    for lost in (path, samples_path(path)):
        before = lost.read_bytes()
        lost.unlink()
        with resumed(path):
            pass
        assert lost == path or lost.read_bytes() == before
    assert read_results(path).records == [RECORD, other, third]


def test_a_temporarily_full_disk_loses_nothing(path, monkeypatch):
    other = replace(RECORD, task="multikey")
    with resumed(path) as results:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "full")))
            with pytest.raises(
                RTPurboError, match=r"no space left on the disk to write .*log.jsonl"
            ):
                results.add(CaseResult([other], []))
        results.add(CaseResult([replace(other, score=1.0)], []))
    assert resumed(path).records == [RECORD, replace(other, score=1.0)]


def test_resumed_results_come_before_new_ones(path):
    other = Record("needle", "multikey", 4096, "full", 1, 50.0)
    with resumed(path) as results:
        assert results.of(TEST, "full") == [RECORD]
        assert results.of(TEST, "rtpurbo") == []
        assert results.tests(TEST) == [TEST]
        results.add(CaseResult([other], []))
    assert read_results(path).records == [RECORD, other]
    assert read_samples(samples_path(path)) == [SAMPLE]


@pytest.mark.parametrize("content", [None, "", '{"run": {"dev'])
def test_results_without_a_log_are_refused_and_unchanged(path, content):
    before = path.read_bytes()
    log_path(path).unlink()
    if content is not None:
        log_path(path).write_text(content)
    with pytest.raises(
        RTPurboError, match=r"because its log .*log.jsonl is missing or empty: restore"
    ):
        resumed(path)
    assert path.read_bytes() == before


def test_a_log_with_only_an_incomplete_line_starts_from_the_beginning(path):
    for file in (path, samples_path(path)):
        file.unlink()
    log_path(path).write_text('{"run": {"dev')
    with resumed(path) as results:
        assert results.records == []
        results.add(CaseResult([RECORD], [SAMPLE]))
    assert resumed(path).records == [RECORD]


def test_the_conditions_of_a_run_are_in_the_results(path):
    assert read_results(path).origin["conditions"] == conditions()
    before = json.loads(path.read_text())
    run = {"conditions": before.pop("conditions"), "tests": {}, "samples": 1}
    path.write_text(json.dumps(before | {"resumption": run}))  # as written before there were logs
    assert read_results(path).origin["conditions"] == conditions()


def test_without_resume_nothing_is_kept(path):
    other = replace(RECORD, task="multikey")
    with opened(path) as results:
        results.begin(conditions(seed=1))
        assert results.records == []
    assert read_results(path).records == [RECORD]
    results = opened(path)
    results.begin(conditions(seed=1))
    results.add(CaseResult([other], []))
    # A kill here must not leave the files of the run that is replaced.
    assert not path.exists()
    assert not samples_path(path).exists()
    assert resumed(path, seed=1).records == [other]


def test_resuming_without_results_starts_from_the_beginning(tmp_path):
    with resumed(tmp_path / "results.json") as results:
        pass
    assert results.records == []


def test_a_test_taken_again_takes_its_place(path):
    again = Record("needle", "single", 4096, "full", 1, 0.0)
    with resumed(path) as results:
        results.add(CaseResult([again], []))
    assert read_results(path).records == [again]
    assert results.samples == []
    assert resumed(path).records == [again]


def test_the_origin_names_all_runs(path, monkeypatch):
    monkeypatch.setattr(results_log, "library_commit", lambda: "second")
    commands = "rtpurbo eval model --resume", "rtpurbo eval model --length 9 --resume"
    for number, command in enumerate(commands):
        with opened(path, f"gpu {number}", command, resume=True) as results:
            results.begin(conditions())
            results.add(CaseResult([Record("needle", "single", number, "full", 1, 0.0)], []))
    origin = read_results(path).origin
    assert origin["device"] == "cpu, gpu 0, gpu 1"
    assert origin["command"] == "rtpurbo eval model && rtpurbo eval model --length 9 --resume"
    assert origin["commit"].split(", ")[-1] == "second"
    assert origin["commit"].count("second") == 1


def test_groups_of_tasks_are_resumed(path):
    group = Case("lm-eval", "mmlu_pro", 0, 0)
    tests = [Case("lm-eval", name, 1024, 0) for name in ("mmlu_pro_math", "mmlu_pro_law")]
    with resumed(path, [group]) as results:
        assert results.tests(group) == []
        results.set_tests(group, tests)
        results.add(CaseResult([Record("lm-eval", "mmlu_pro_law", 1024, "full", 9, 0.0)], []))
    assert resumed(path, [group]).tests(group) == tests
    with pytest.raises(RTPurboError, match="has all samples of lm-eval mmlu_pro_math 1024, not 5:"):
        resumed(path, [Case("lm-eval", "mmlu_pro", 0, 5)])
    with pytest.raises(RTPurboError, match="has 1 samples of needle single 4096, not 2: ask for"):
        resumed(path, [Case("needle", "single", 4096, 2)])


def test_results_under_other_conditions_are_refused_and_unchanged(path):
    before = path.read_bytes(), log_path(path).read_bytes()
    sentence = r"results.json cannot be resumed, because it was measured with --seed 0, not 1 and "
    sentence += r"with --dtype float32, not float16: repeat its command, or name another file"
    with (
        pytest.raises(RTPurboError, match=sentence),
        opened(path, resume=True) as results,
    ):
        results.begin(conditions(seed=1, dtype="float16"))
    assert (path.read_bytes(), log_path(path).read_bytes()) == before


def test_a_log_without_results_of_the_file_is_refused(path):
    change(path, records=[asdict(RECORD), asdict(replace(RECORD, task="multikey"))])
    with pytest.raises(RTPurboError, match=r"has results that .*results.log.jsonl lacks: remove"):
        resumed(path)


def test_results_without_conditions_are_refused(tmp_path):
    path = tmp_path / "results.json"
    with opened(path) as results:
        results.begin()
        results.add(CaseResult([RECORD], []))
    with pytest.raises(RTPurboError, match="does not record under what conditions it was measured"):
        resumed(path)


@pytest.mark.parametrize(
    "line", ["{}", '{"records": [], "samples": []}', '{"run": {}}', "[]", "{", '{"a": 1, "a": 1}']
)
def test_a_broken_file_is_reported(path, line):
    with log_path(path).open("a") as log:
        log.write(line + "\n")
    with pytest.raises(RTPurboError, match=r"log.jsonl holds no results or is corrupt"):
        resumed(path)


def test_broken_results_with_a_log_are_reported(path):
    change(path, resumption={"a": 1})
    with pytest.raises(RTPurboError, match=r"results.json holds no results or is corrupt"):
        resumed(path)

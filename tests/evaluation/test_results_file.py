import pytest

from rtpurbo.evaluation import results_file
from rtpurbo.evaluation.records import Record, read_results
from rtpurbo.evaluation.results_file import ResultsFile
from rtpurbo.evaluation.samples import Sample, SampleRecord, read_samples, samples_path

RECORD = Record("needle", "single", 4096, "full", 1, 100.0)
SAMPLE = SampleRecord("needle", "single", 4096, "full", 0, 0, Sample.of([1], ["a"], "a", 100.0))


def opened(path):
    return ResultsFile(path, "model", "cpu", "rtpurbo eval model", {"note": "by hand"})


def test_what_was_there_when_it_was_cut_is_written(tmp_path):
    path = tmp_path / "results.json"
    with pytest.raises(KeyboardInterrupt), opened(path) as results:
        results.add_sample(SAMPLE)
        results.add_record(RECORD)
        assert not path.exists()  # not that often
        raise KeyboardInterrupt
    written = read_results(path)
    assert written.records == [RECORD]
    assert written.origin["note"] == "by hand"
    assert "ruler_words" not in written.origin
    assert read_samples(samples_path(path)) == [SAMPLE]


def test_it_grows_while_the_run_goes_on(monkeypatch, tmp_path):
    monkeypatch.setattr(results_file, "SECONDS_BETWEEN", -1)
    path, ruler = tmp_path / "results.json", Record("ruler", "vt", 4096, "full", 1, 20.0)
    results = opened(path)
    for number, record in enumerate((RECORD, ruler)):
        results.add_record(record)
        assert len(read_results(path).records) == number + 1
    assert "ruler_words" in read_results(path).origin
    assert not samples_path(path).exists()


def test_nothing_is_written_without_a_path_or_records(tmp_path):
    with opened(None) as results:
        results.add_record(RECORD)
    assert results.records == [RECORD]
    with opened(tmp_path / "results.json"):
        pass
    assert list(tmp_path.iterdir()) == []

import json
import re

import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.averages import Average
from rtpurbo.evaluation.records import Record, write_results
from rtpurbo.reporting.html.sources import read_sources
from tests.reporting.html.example_results import LENGTHS, POLICIES, write_examples


def error_of(*places):
    with pytest.raises(RTPurboError) as caught:
        read_sources(places)
    message = str(caught.value)
    assert re.search(r"[.]$", message)
    return message


@pytest.fixture
def examples(tmp_path):
    return write_examples(tmp_path)


def test_files_of_one_model_are_merged(examples, tiny_artifact):
    sources = read_sources([*examples.values(), tiny_artifact])
    (quality,) = sources.quality
    assert quality.model == "some/model"
    assert len(quality.records) == len(LENGTHS) * len(POLICIES) * 2 + 4
    assert sources.artifact is not None
    assert sources.curves == []
    assert [origin.file for origin in sources.origins] == ["quality.json", "old.json", "speed.json"]
    assert sources.origins[0].facts["command"] == "rtpurbo eval"
    assert "date" in sources.origins[0].facts
    assert sources.remarks == []


def test_the_later_file_counts_for_tests_measured_twice(examples, tmp_path):
    later = tmp_path / "later.json"
    record = Record("needle", "single", 2048, "rtpurbo", 20, 1.0)
    write_results(later, "some/model", "cpu", "rtpurbo eval", [record])
    sources = read_sources([examples["old"], later])
    (quality,) = sources.quality
    assert len(quality.records) == 4
    assert record in quality.records
    assert "later.json counts" in sources.remarks[0]


def test_averages_of_replaced_records_are_dropped(tmp_path):
    def average(length, policy):
        return Average("ruler", length, policy, 1, 25, 80.0, (75.0, 85.0))

    def written(name, records, averages):
        path = tmp_path / name
        write_results(path, "some/model", "cpu", "rtpurbo eval", records, averages=averages)
        return path

    both = [Record("ruler", "vt", length, "full", 25, 80.0) for length in (4096, 8192)]
    first = written("first.json", both, [average(4096, "full"), average(8192, "full")])
    again = Record("ruler", "vt", 8192, "full", 25, 70.0)
    new = Record("ruler", "vt", 16384, "full", 25, 60.0)
    second = written("second.json", [again, new], [average(16384, "full")])
    (quality,) = read_sources([first, second]).quality
    assert quality.averages == [average(4096, "full"), average(16384, "full")]


def test_cache_sizes_at_a_fixed_length_are_not_mixed_with_others(examples, tmp_path):
    other = tmp_path / "other.json"
    record = Record("needle", "single", 4096, "full", 1, 1.0)
    write_results(other, "some/model", "cpu", "demo", [record], {"kv_bytes_at": 8192})
    assert [each.cache_length for each in read_sources([examples["old"], other]).quality] == [
        None,
        8192,
    ]


def test_the_dtype_of_a_run_that_can_be_resumed_is_known(tmp_path):
    record = Record("needle", "single", 4096, "full", 1, 1.0)
    run = {"conditions": {"dtype": "bfloat16"}}
    write_results(tmp_path / "run.json", "m", "a GPU", "eval", [record], run)
    [quality] = read_sources([tmp_path / "run.json"]).quality
    assert quality.where([record]) == "1 samples per test; a GPU, bfloat16"


def test_unusable_sources_are_refused(examples, tiny_artifact, tmp_path):
    assert "nothing to report" in error_of()
    assert "no file of results" in error_of(tmp_path / "missing.json")
    assert "not an rtpurbo artifact" in error_of(tmp_path)
    assert "is a second one" in error_of(tiny_artifact, tiny_artifact)
    text = tmp_path / "notes.txt"
    text.write_text("hello")
    assert "neither an artifact's folder nor a file of results" in error_of(text)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "not JSON or is truncated"),
        ("[]", "neither of `rtpurbo eval` nor of `rtpurbo bench`"),
        ('{"records": []}', "neither of `rtpurbo eval` nor of `rtpurbo bench`"),
        ('{"records": [{"rule": "dense"}]}', "neither of `rtpurbo eval` nor of `rtpurbo bench`"),
        ('{"records": [{"phase": "x", "milliseconds": 1}]}', "holds no benchmarks or is corrupt"),
        ('{"format_version": 2, "records": [{"a": 1}]}', "holds no results or is corrupt"),
        ('{"format_version": 99, "records": []}', "upgrade rtpurbo"),
    ],
)
def test_files_of_something_else(tmp_path, content, sentence):
    path = tmp_path / "other.json"
    path.write_text(content)
    assert sentence in error_of(path)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("quality", "score", "high"),
        ("quality", "score", None),
        ("old", "context_length", 0),
        ("speed", "milliseconds", 0.0),
        ("speed", "milliseconds", float("nan")),
    ],
)
def test_invalid_numbers_are_refused(examples, name, field, value):
    data = json.loads(examples[name].read_text())
    data["records"][0][field] = value
    examples[name].write_text(json.dumps(data))
    assert f"is corrupt: a record's {field} is" in error_of(examples[name])

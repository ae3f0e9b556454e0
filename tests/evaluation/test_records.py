import json
from pathlib import Path

import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.averages import Average
from rtpurbo.evaluation.records import Record, read_results, write_results

PUBLISHED = Path(__file__).parent.parent.parent / "benchmarks" / "results"

RECORDS = [
    Record("needle", "single", 4096, "full", 10, 90.0, 1.0, 1000),
    Record("perplexity", "prose", 4096, "rtpurbo", 10, 28.4, None, None),
    Record(
        "ruler",
        "vt",
        4096,
        "quest",
        25,
        90.0,
        0.1,
        1000,
        (80.5, 98.0),
        612.4,
        600,
        900,
        0.93,
        410,
        (0, 1, 5),
        128,
    ),
]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "results.json"
    write_results(path, "model", "cpu", "rtpurbo eval model", RECORDS, {"note": "by hand"})
    return path


def test_round_trip(path):
    results = read_results(path)
    assert results.records == RECORDS
    assert results.origin["command"] == "rtpurbo eval model"
    assert results.origin["note"] == "by hand"
    assert {"model", "device", "library_version", "torch", "transformers", "commit"} <= set(
        results.origin
    )


def test_averages_are_read_as_written(path):
    assert read_results(path).averages == []
    assert "averages" not in json.loads(path.read_text())
    averages = [
        Average("ruler", 4096, "full", 2, 50, 80.0, (75.0, 85.0)),
        Average("ruler", 4096, "rtpurbo", 2, 50, 79.0, (74.0, 84.0), -1.0, (-2.5, 0.5)),
    ]
    write_results(path, "model", "cpu", "rtpurbo eval model", RECORDS, averages=averages)
    results = read_results(path)
    assert results.averages == averages
    assert "averages" not in results.origin


def test_a_newer_format_asks_for_an_upgrade(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 4}))
    with pytest.raises(RTPurboError, match=r"format 4, .* upgrade"):
        read_results(path)


def test_format_1_is_read(path):
    old = {
        "suite": "needle", "task": "single", "context_length": 2048, "policy": "full",
        "samples": 20, "score": 100.0, "far_tokens_read": 1.0, "kv_bytes": 94371840,
    }  # fmt: skip
    path.write_text(json.dumps({"format_version": 1, "model": "m", "records": [old]}))
    [record] = read_results(path).records
    assert record == Record(*old.values())
    assert record.ci95 is None
    assert record.tokens_read_mean is None


def test_the_published_results_are_read():
    files = list(PUBLISHED.glob("quality-*.json"))
    assert files
    for file in files:
        assert read_results(file).records


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "3",
        "{}",
        '{"format_version": 0, "records": []}',
        '{"format_version": 1}',
        '{"format_version": 1, "records": [{"a": 1}]}',
    ],
)
def test_corrupt_results_are_refused(path, content):
    path.write_text(content)
    with pytest.raises(RTPurboError, match="corrupt"):
        read_results(path)


def test_missing_results_are_refused(tmp_path):
    with pytest.raises(RTPurboError, match="there is no file"):
        read_results(tmp_path / "nothing.json")

import json

import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.records import Record, read_results, write_results

RECORDS = [
    Record("needle", "single", 4096, "full", 10, 90.0, 1.0, 1000),
    Record("perplexity", "prose", 4096, "rtpurbo", 10, 28.4, None, None),
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


def test_a_newer_format_asks_for_an_upgrade(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 2}))
    with pytest.raises(RTPurboError, match=r"format 2, .* upgrade"):
        read_results(path)


@pytest.mark.parametrize(
    "content",
    ["", "[]", "3", "{}", '{"format_version": 1}', '{"format_version": 1, "records": [{"a": 1}]}'],
)
def test_corrupt_results_are_refused(path, content):
    path.write_text(content)
    with pytest.raises(RTPurboError, match="corrupt"):
        read_results(path)


def test_missing_results_are_refused(tmp_path):
    with pytest.raises(RTPurboError, match="there is no file"):
        read_results(tmp_path / "nothing.json")

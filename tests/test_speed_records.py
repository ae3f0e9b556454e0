import json
from dataclasses import MISSING, fields, replace

import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.speed_records import (
    SpeedRecord,
    SpeedResults,
    read_speed,
    stated_density,
    usual_times,
    write_speed,
)

RECORD = SpeedRecord(
    phase="prefill",
    context_length=131072,
    batch_size=1,
    num_attention_heads=32,
    num_key_value_heads=4,
    num_retrieval_heads=5,
    head_dim=128,
    sliding_window=8192,
    density=0.1,
    implementation="rtpurbo",
    milliseconds=30.0,
    milliseconds_p10=29.0,
    milliseconds_p90=31.0,
    retrieval_window=512,
)


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "speed.json"
    results = SpeedResults([RECORD], ["flex left out."], ["eager is refused."])
    write_speed(path, "NVIDIA H100", "rtpurbo bench prefill", results)
    return path


def test_round_trip(path):
    results = read_speed(path)
    assert results.records == [replace(RECORD, device="NVIDIA H100")]
    assert results.notes == ["eager is refused.", "flex left out."]
    assert results.origin["command"] == "rtpurbo bench prefill"


def test_the_file_has_the_documented_fields(path):
    data = json.loads(path.read_text())
    assert {"device", "torch", "triton", "commit", "command", "records"} <= set(data)
    [record] = data["records"]
    assert record["phase"] == "prefill"
    required = {item.name for item in fields(SpeedRecord) if item.default is MISSING}
    assert set(record) >= required == {
        "phase", "context_length", "batch_size", "num_attention_heads", "num_key_value_heads",
        "num_retrieval_heads", "head_dim", "sliding_window", "density", "implementation",
        "milliseconds", "milliseconds_p10", "milliseconds_p90",
    }  # fmt: skip
    assert "peak_memory_bytes" not in record


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"records": [{"a": 1}]}', '{"records": [{"phase": "x"}]}']
)
def test_other_files_are_refused(path, content):
    path.write_text(content)
    with pytest.raises(RTPurboError, match="holds no benchmarks"):
        read_speed(path)


def test_an_unknown_phase_is_refused(path):
    path.write_text(path.read_text().replace('"prefill",', '"training",'))
    with pytest.raises(RTPurboError, match="holds no benchmarks"):
        read_speed(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RTPurboError, match="there is no file"):
        read_speed(tmp_path / "nothing.json")


@pytest.mark.parametrize(("reached", "stated"), [(0.104, 0.1), (0.106, 0.106), (0.09, 0.09)])
def test_a_density_nearly_reached_is_recorded_as_requested(reached, stated):
    assert stated_density(0.1, reached, 0.05) == stated


def test_usual_times_are_medians_of_earlier_results(tmp_path):
    for number, milliseconds in enumerate([100.0, 120.0, 900.0]):
        record = replace(RECORD, implementation="sdpa-cudnn", milliseconds=milliseconds)
        if milliseconds == 900.0:
            record = replace(record, usual_milliseconds=110.0)
        results = SpeedResults([record, RECORD])
        write_speed(tmp_path / f"{number}.json", "NVIDIA H200", "rtpurbo bench", results)
    (tmp_path / "quality.json").write_text('{"records": [{"suite": "ruler"}]}')
    task = replace(RECORD, device="NVIDIA H200", dtype="bfloat16").task
    assert usual_times(tmp_path) == {("sdpa-cudnn", *task): 110.0, ("rtpurbo", *task): 30.0}
    assert usual_times(tmp_path / "nowhere") == {}

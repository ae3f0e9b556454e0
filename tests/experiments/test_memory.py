import json
import sys

import memory
import pytest

from rtpurbo.conversion.defaults import default_rule


@pytest.mark.parametrize(
    ("effort", "stages"),
    [
        ("standard", ["calibrate", "stage1", "top-p"]),
        ("thorough", ["calibrate", "stage1", "stage2", "refresh", "top-p"]),
    ],
)
def test_a_tiny_shape_is_measured_in_a_process_of_its_own(
    monkeypatch, tmp_path, capsys, effort, stages
):
    output = tmp_path / "memory.json"
    command = ["tiny", "--effort", effort, "--length", "512", "--context", "1024"]
    command += ["--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["memory.py", *command, "--output", str(output)])
    memory.main()
    written = json.loads(output.read_text())
    assert written["device"] == "cpu"
    assert written["command"].startswith(f"python experiments/memory.py tiny --effort {effort}")
    assert [record["stage"] for record in written["records"]] == stages
    for record in written["records"]:
        assert record["parameters"] > 300_000
        assert record["weights_gib"] * memory.GIB == pytest.approx(2 * record["parameters"])
        assert record["measured_seconds"] > 0
        assert record["seconds_per_step"] > 0
        # Stage 1 only initialises the indexers by default.
        assert record["minutes"] * 60 >= min(record["steps"], 1) * record["seconds_per_step"]
        assert record["peak_allocated_gib"] is None
    assert f"| tiny | 0.0 |{' - |' * len(stages)}" in capsys.readouterr().out


def test_lengths_are_those_of_a_long_context():
    settings = memory.settings_without_answers("thorough", 40960, 32768)
    assert settings.attention == default_rule("thorough", 40960)
    assert settings.calibration.length == 16384
    assert settings.stage1.lengths == (8192, 16384, 32768)
    assert settings.stage2.lengths == (8192, 32768, 16384, 32768)


def test_minutes_are_those_of_all_steps(monkeypatch):
    meter = memory.Meter("tiny", memory.torch.device("cpu"))
    # The first turn of two steps took 10 s, the second 4 s; what comes after them took 3 s.
    times = iter([0, 6, 10, 11, 14, 17, 18])
    monkeypatch.setattr(memory.time, "perf_counter", lambda: next(times))
    meter.start()
    for _ in range(4):
        meter.step("stage2", 0, 0, {})
    meter.step("share", 0, 0, {})
    meter.finish("stage2", 2, 20, (8, 16))
    [record] = meter.records
    assert record["seconds_per_step"] == 2
    assert record["minutes"] * 60 == 10 + 18 * 2 + 3
    assert record["measured_seconds"] == 18


def test_stages_before_a_failure_are_kept(monkeypatch, tmp_path, capsys):
    output = tmp_path / "memory.json"

    def run(command, check):
        part = next(word.removeprefix("--output=") for word in command if "--output=" in word)
        meter = memory.Meter("tiny", memory.torch.device("cpu"), memory.Path(part), weights_gib=1.0)
        meter.start()
        meter.step("calibrate", 1, 2, {})
        meter.step("calibrate", 2, 2, {})
        meter.finish("calibrate", 1, 150, (8,))
        return memory.subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(memory, "library_commit", lambda: None)
    monkeypatch.setattr(memory.subprocess, "run", run)
    options = ["tiny", "--device", "cpu", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["memory.py", *options])
    with pytest.raises(SystemExit):
        memory.main()
    assert [record["stage"] for record in json.loads(output.read_text())["records"]] == [
        "calibrate"
    ]
    assert "tiny failed" in capsys.readouterr().err

"""Trackers, by way of accelerate's."""

import pytest
from accelerate import tracking

from rtpurbo.errors import RTPurboError
from rtpurbo.training.log import TrainingLog
from rtpurbo.training.trackers import Trackers, check_trackers


class Recorder(tracking.GeneralTracker):
    name = "recorder"
    requires_logging_directory = True

    def __init__(self, run_name, logging_dir=None):
        super().__init__()
        self.calls = [run_name, logging_dir]
        Recorder.last = self

    @property
    def tracker(self):
        return self

    def start(self):
        self.calls.append("start")

    def store_init_configuration(self, values):
        self.calls.append(values)

    def log(self, values, step=None, **kwargs):
        self.calls.append((step, values))

    def finish(self):
        self.calls.append("finish")


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)


def test_trackers_receive_log_entries_and_transient_figures(recorder, tmp_path):
    configuration = {"seed": 0, "stage1": {"lengths": (1, 2), "start": None}}
    trackers = Trackers(["recorder", "recorder"], tmp_path / "runs", "artifact", configuration)
    log = TrainingLog(tmp_path / "log.jsonl", trackers)
    log.write({"stage": "stage1", "step": 1, "loss": 2.0}, tokens_per_second=7.0)
    log.write({"stage": "stage1", "step": 2, "loss": 1.0})
    log.write({"stage": "stage2", "step": 1, "loss": 0.5})
    trackers.finish()
    assert Recorder.last.calls == [
        "artifact",
        str(tmp_path / "runs"),
        "start",
        {"seed": 0, "stage1.lengths": "(1, 2)", "stage1.start": None},
        (1, {"stage1/loss": 2.0, "stage1/tokens_per_second": 7.0}),
        (2, {"stage1/loss": 1.0}),
        # Trackers want steps to grow.
        (3, {"stage2/loss": 0.5}),
        "finish",
    ]
    assert next(log.entries()) == {"stage": "stage1", "step": 1, "loss": 2.0}


def test_missing_trackers_are_refused(recorder, monkeypatch, tmp_path):
    with pytest.raises(RTPurboError, match=r"no tracker 'x': choose one of .*tensorboard"):
        check_trackers(["recorder", "x"])
    monkeypatch.setattr(tracking, "get_available_trackers", list)
    with pytest.raises(RTPurboError, match="pip install wandb"):
        check_trackers(["wandb"])

    def fail(self):
        raise ConnectionError("no key.\nMore.")

    monkeypatch.setattr(Recorder, "start", fail)
    with pytest.raises(RTPurboError, match=r"'recorder' does not start \(no key\)"):
        Trackers(["recorder"], tmp_path)


def test_a_tracker_that_stops_working_is_left_out(recorder, monkeypatch, tmp_path, caplog):
    def fail(self, values, step=None):
        raise ConnectionError("no network")

    trackers = Trackers(["recorder"], tmp_path)
    monkeypatch.setattr(Recorder, "log", fail)
    for step in (1, 2):
        trackers.log("stage1", step, {"loss": 2.0})
    assert caplog.text.count("recorder stopped working (no network)") == 1


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    trackers = Trackers(["tensorboard"], tmp_path, "run", {"a": {"b": 1}, "c": (1, 2)})
    trackers.log("stage1", 1, {"loss": 2.0})
    trackers.finish()
    assert list((tmp_path / "run").rglob("events.out.tfevents.*"))

"""Files of the demo, with a conversion and an evaluation that take no time."""

import json

from rtpurbo import demo
from rtpurbo.evaluation.records import Record


def test_reports_name_device_and_dtype(tiny_artifact, tmp_path, monkeypatch):
    def evaluate(artifact, *, suites, policies, **options):
        return [
            Record(case.suite, case.task, case.context_length, policy, case.samples, 100.0)
            for policy in policies
            for case in suites
        ]

    monkeypatch.setattr(demo, "convert", lambda *_, **__: tiny_artifact)
    monkeypatch.setattr(demo, "evaluate", evaluate)
    records = demo.run_demo(tmp_path, device="cpu")
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert len(results["records"]) == len(records)
    assert {record.policy for record in records} == {*demo.POLICIES, "rtpurbo (shipped)"}
    assert (results["device"], results["dtype"]) == ("cpu", "float32")
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "cpu, float32" in report
    assert "dtype not recorded" not in report
    assert "single 1024: 3" in (tmp_path / "report.md").read_text()

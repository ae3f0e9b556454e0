"""Question suites through `evaluate`: pairs, parts, resumption and errors."""

import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.results_log import ResultsLog
from rtpurbo.evaluation.run import evaluate
from tests.evaluation.questions.support import write_questions


@pytest.fixture
def task_data(tmp_path):
    return write_questions(tmp_path)


def quick(artifact, **options):
    given = {"suites": ["gsm8k"], "policies": ["full"], "device": "cpu", "max_new_tokens": 3}
    return evaluate(artifact, **(given | options))


def test_all_policies_answer_the_same_questions_in_one_file(tiny_artifact, task_data, tmp_path):
    options = {
        "suites": ["gsm8k", "humaneval", "babilong:qa4@1024"],
        "policies": ["full", "rtpurbo", "top-k"],
        "samples": 2,
        "task_data": task_data,
        "run_code": True,
    }
    file = tmp_path / "results.json"
    with ResultsLog(file, "tiny", "cpu", "evaluate") as results:
        records = quick(tiny_artifact, results=results, **options)
    places = [("gsm8k", "all", 0), ("humaneval", "all", 0), ("babilong", "qa4", 1024)]
    assert [(each.policy, each.suite, each.task, each.context_length) for each in records] == [
        (policy, *place) for policy in options["policies"] for place in places
    ]
    assert all(record.samples == 2 and record.measured_rows for record in records)
    assert [record.kv_bytes is None for record in records[:3]] == [True, True, False]
    prompts = {(item.suite, item.number, item.sample.prompt_hash) for item in results.samples}
    assert len(prompts) == 6
    pairs = {(each.suite, each.policy): each for each in results.averages}
    assert pairs["gsm8k", "top-k"].difference is not None
    assert pairs["babilong", "top-k"].difference_ci95 is not None
    assert pairs["humaneval", "full"].difference is None

    # What is there is not measured again; other suites are added.
    calls = []
    options["suites"] = [*options["suites"], "mmlu_pro"]
    with ResultsLog(file, "tiny", "cpu", "evaluate", resume=True) as results:
        again = quick(
            tiny_artifact,
            results=results,
            progress=lambda stage, done, total, figures: calls.append((stage, done, total)),
            **options,
        )
    assert [each for each in again if each.suite != "mmlu_pro"] == records
    assert calls[0] == ("full", 6, 8)
    task_data["gsm8k"].write_bytes(task_data["math"].read_bytes())
    with (
        ResultsLog(file, "tiny", "cpu", "evaluate", resume=True) as results,
        pytest.raises(RTPurboError),
    ):
        quick(tiny_artifact, results=results, **options)


def test_processes_share_a_suite(tiny_artifact, task_data, monkeypatch):
    monkeypatch.setattr("rtpurbo.evaluation.task_suite.QUESTIONS_OF_A_PART", 2)
    found = []
    for processes in (1, 2):
        results, calls = ResultsLog(), []
        records = quick(
            tiny_artifact,
            policies=["rtpurbo"],
            task_data=task_data,
            processes=processes,
            results=results,
            progress=lambda *call, calls=calls: calls.append(call[:3]),
        )
        found.append((records, results.samples, results.averages))
        assert calls[-1] == ("rtpurbo", 6, 6)
    assert found[0] == found[1]
    assert ("rtpurbo", 3, 6) in calls


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"task_data": {}}, "takes its questions from a file: name it with --task-data gsm8k=FILE"),
        ({"suites": ["gsm8k@4096"]}, "have their own length: write gsm8k, not gsm8k@4096"),
        ({"suites": ["gsm8k:hard"]}, "there is no gsm8k task 'hard'"),
        ({"suites": ["humaneval"]}, "executes code that the model writes.*: pass --run-code"),
        ({"suites": ["babilong:qa2@1024"]}, "there are 0 questions of babilong qa2"),
        ({"suites": ["babilong@9999"]}, "9,999 tokens do not fit the model's context of 1,024"),
        ({"suites": ["babilong@400"]}, "BABILong task qa1 does not fit into 400 tokens"),
        ({"max_new_tokens": 1000}, "do not fit the model's context of 1,024: lower --max-new"),
    ],
)
def test_mistakes_are_reported(tiny_artifact, task_data, options, sentence):
    with pytest.raises(RTPurboError, match=sentence):
        quick(tiny_artifact, **({"task_data": task_data} | options))


def test_all_questions_are_asked_if_there_are_fewer_than_samples(tiny_artifact, task_data):
    [record] = quick(tiny_artifact, task_data=task_data, samples=100)
    assert record.samples == 6


def test_lengths_beyond_the_context_are_refused_before_texts_and_weights(tiny_artifact, tmp_path):
    (tmp_path / "broken.txt").write_bytes(b"\xff")
    with pytest.raises(RTPurboError, match="do not fit the model's context"):
        quick(
            tiny_artifact, suites=["needle"], lengths=[99999], data=[str(tmp_path / "broken.txt")]
        )

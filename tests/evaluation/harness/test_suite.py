"""The bridge with lm-eval itself, where that is installed, and what is said where it is not."""

import importlib.util

import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.harness import suite as module
from rtpurbo.evaluation.harness.suite import Harness
from rtpurbo.evaluation.run import evaluate
from tests.evaluation.harness.support import aime24_file, mmlu_pro_folder
from tests.tiny_tokenizer import tiny_tokenizer

needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed"
)


@pytest.fixture(autouse=True)
def _without_the_hub(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def run(artifact, tasks, **options):
    options = {"policies": ["rtpurbo"], "device": "cpu", "max_new_tokens": 4} | options
    return evaluate(artifact, suites=[f"lm-eval:{tasks}"], **options)


def test_a_missing_lm_eval_is_explained(monkeypatch, tiny_artifact):
    def missing(name):
        raise ImportError("No module named 'lm_eval'")

    monkeypatch.setattr(module, "import_module", missing)
    with pytest.raises(RTPurboError, match=r"not installed .*: pip install 'rtpurbo\[lm-eval\]'"):
        run(tiny_artifact, "aime24")


def test_data_for_a_task_that_is_not_run_is_refused(tiny_artifact, tmp_path):
    with pytest.raises(RTPurboError, match="data for the task 'aime25' of lm-eval, which is not"):
        run(tiny_artifact, "aime24", task_data={"aime25": aime24_file(tmp_path)})


@needs_lm_eval
def test_local_files_replace_the_hub(tiny_artifact, tmp_path):
    kept, calls = [], []
    records = run(
        tiny_artifact,
        "aime24,mmlu_pro_math",
        task_data={"aime24": aime24_file(tmp_path), "mmlu_pro_math": mmlu_pro_folder(tmp_path)},
        policies=["full", "top-k"],
        keep_sample=kept.append,
        progress=lambda *call: calls.append(call),
    )
    assert [(record.policy, record.task, record.samples) for record in records] == [
        (policy, task, samples)
        for policy in ("full", "rtpurbo", "top-k")
        for task, samples in (("aime24", 3), ("mmlu_pro_math", 2))
    ]
    for record in records:
        assert record.suite == "lm-eval"
        assert record.context_length == 1024
        assert record.metric.startswith("exact_match")
        assert record.ci95[0] <= record.score <= record.ci95[1]
        assert record.measured_rows > 0
        assert record.kv_bytes > 0
    assert [sample.sample.answers for sample in kept[:3]] == [["5"], ["14"], ["8"]]
    # Five examples come before each question.
    assert kept[3].sample.prompt_tokens > 5 * kept[0].sample.prompt_tokens
    assert kept[0].sample.prompt_hash == kept[5].sample.prompt_hash
    assert calls[-1][:3] == ("top-k", 5, 5)


@needs_lm_eval
@pytest.mark.parametrize("task", ["niah_single_1", "ruler_fwe"])
def test_rulers_tasks_of_lm_eval_have_lengths(tiny_artifact, task):
    [record] = run(tiny_artifact, f"{task}@900", samples=1)
    assert (record.task, record.context_length, record.samples) == (task, 900, 1)
    assert record.metric == "string_match"
    assert 32 < record.tokens_read_mean < 900


@pytest.fixture(scope="module")
def managers():
    """To find all tasks of lm-eval takes seconds: once is enough."""
    return {}


@needs_lm_eval
@pytest.mark.parametrize(
    ("task", "data", "sentence"),
    [
        ("aime42", None, r"lm-eval has no task 'aime42': did you mean .*aime24"),
        ("aime24", None, r"cannot load the task aime24 \(.*--task-data aime24="),
        ("mmlu_pro", "", r"'mmlu_pro' is a group of tasks"),
        ("mmlu_pro_math", "test.jsonl", r"with test.jsonl and validation.jsonl, not one file"),
        ("mmlu_pro_math", "", r"may have 2,048 tokens, .* context of 1,024"),
    ],
)
def test_mistakes_are_reported(managers, tmp_path, task, data, sentence):
    folder = mmlu_pro_folder(tmp_path)
    harness = Harness({} if data is None else {task: folder / data})
    harness._managers = managers
    with pytest.raises(RTPurboError, match=sentence):
        harness.prepare(tiny_tokenizer(), Case("lm-eval", task, 0, 1), 1024)


@needs_lm_eval
def test_a_missing_file_is_reported_first():
    with pytest.raises(RTPurboError, match="there is no file nothing"):
        Harness({"aime24": "nothing.jsonl"})

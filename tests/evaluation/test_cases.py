import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.cases import Case, choose_cases
from rtpurbo.evaluation.ruler.tasks import TASKS


def test_suites_have_default_tasks():
    assert choose_cases(["needle", "needle:multivalue"], [512], 3) == [
        Case("needle", task, 512, 3) for task in ("single", "multikey", "multivalue")
    ]


def test_cases_can_be_combined_with_suites():
    cases = [Case("needle", "single", 300, 1), Case("perplexity", "prose", 128, 2)]
    assert choose_cases([*cases, "perplexity@256"], [512], 3) == [
        *cases,
        Case("perplexity", "prose", 256, 3),
    ]


def test_a_suite_may_have_lengths_of_its_own():
    assert choose_cases(["perplexity@64,128"], [512], 3) == [
        Case("perplexity", "prose", length, 3) for length in (64, 128)
    ]
    with pytest.raises(RTPurboError, match="perplexity@2048,8192"):
        choose_cases(["perplexity@long"], [512], 3)


def test_tasks_of_lm_eval_have_all_samples_by_default():
    assert choose_cases(["lm-eval:aime24,mmlu_pro_math"], [512]) == [
        Case("lm-eval", task, 0, 0) for task in ("aime24", "mmlu_pro_math")
    ]
    assert choose_cases(["lm-eval:ruler@4096", "needle:single"], {"needle": [512]}, 3) == [
        Case("lm-eval", "ruler", 4096, 3),
        Case("needle", "single", 512, 3),
    ]
    assert choose_cases(["lm-eval:ruler"], {"lm-eval": [8192]}) == [
        Case("lm-eval", "ruler", 8192, 0)
    ]
    for name in ("lm-eval", "lm-eval:aime24,"):
        with pytest.raises(RTPurboError, match="'lm-eval' needs tasks, as in lm-eval:aime24"):
            choose_cases([name], [512])


def test_ten_samples_by_default():
    assert choose_cases(["perplexity"], [512]) == [Case("perplexity", "prose", 512, 10)]


def test_ruler_has_thirteen_tasks_or_those_named():
    assert choose_cases(["ruler@4096,8192"], [512], 25) == [
        Case("ruler", task, length, 25) for task in TASKS for length in (4096, 8192)
    ]
    assert choose_cases(["ruler:niah_multikey_2,vt@4096", "ruler:vt@4096"], [512], 3) == [
        Case("ruler", task, 4096, 3) for task in ("niah_multikey_2", "vt")
    ]
    for name in ("ruler:niah_multikey_2,", "ruler:vt,,cwe"):
        with pytest.raises(RTPurboError, match="there is no ruler task ''"):
            choose_cases([name], [512], 3)


def test_questions_from_files_decide_tasks_and_the_most_samples():
    questions = {"gsm8k": {"all": 500}, "babilong": {"qa2": 100, "qa4": 4}}
    assert choose_cases(["gsm8k", "babilong@4096"], [512], None, questions) == [
        Case("gsm8k", "all", 0, 500),
        Case("babilong", "qa2", 4096, 10),
        Case("babilong", "qa4", 4096, 4),
    ]
    assert choose_cases(["gsm8k", "babilong:qa4"], [512], 3, questions) == [
        Case("gsm8k", "all", 0, 3),
        Case("babilong", "qa4", 512, 3),
    ]
    with pytest.raises(RTPurboError, match="there are 500 questions of gsm8k all, not 501"):
        choose_cases([Case("gsm8k", "all", 0, 501)], [512], None, questions)
    with pytest.raises(RTPurboError, match="there are 0 questions of babilong qa1"):
        choose_cases(["babilong:qa1"], [512], None, questions)

from rtpurbo.evaluation.budgets import far_token_budget
from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.records import Record


def read(suite, task, length, mean, rows):
    return Record(suite, task, length, "rtpurbo", 1, 0.0, far_tokens_mean=mean, far_rows=rows)


def test_the_mean_of_all_rows_of_the_suite_at_the_length_rounded_up():
    records = [
        read("ruler", "vt", 4096, 10.0, 30),
        read("ruler", "cwe", 4096, 2.0, 10),
        read("ruler", "cwe", 8192, 99.0, 1),
        read("needle", "single", 4096, 99.0, 1),
    ]
    assert far_token_budget(Case("ruler", "fwe", 4096, 5), records) == 8
    assert far_token_budget(Case("needle", "multikey", 4096, 5), records) == 99
    assert far_token_budget(Case("ruler", "vt", 4096, 5), records[:1]) == 10


def test_tasks_of_lm_eval_have_one_each():
    records = [read("lm-eval", "a", 1024, 3.5, 2), read("lm-eval", "b", 1024, 9.0, 2)]
    assert far_token_budget(Case("lm-eval", "a", 1024, 0), records) == 4


def test_no_selection_without_far_tokens():
    records = [read("ruler", "vt", 20, 0.0, 0), Record("ruler", "vt", 20, "rtpurbo", 1, 0.0)]
    assert far_token_budget(Case("ruler", "vt", 20, 5), records) == 0
    assert far_token_budget(Case("ruler", "vt", 20, 5), []) == 0

import pytest

from rtpurbo.evaluation.averages import Average, averages_of, find_average
from rtpurbo.evaluation.samples import Sample, SampleRecord


def samples(policy, scores, length=4096, suite="ruler", seed=0):
    """Questions of tasks, of which scores are given."""
    return [
        SampleRecord(
            suite, task, length, policy, seed, number, Sample.of([seed, number], [], "", score)
        )
        for task, own in scores.items()
        for number, score in enumerate(own)
    ]


FULL = samples("full", {"vt": [100.0, 0.0, 50.0, 50.0], "cwe": [20.0, 40.0]})


def test_every_task_has_the_same_weight_in_the_average():
    (average,) = averages_of(FULL)
    assert average.score == 40.0
    assert (average.context_length, average.policy) == (4096, "full")
    assert (average.tasks, average.samples) == (2, 6)
    assert average.difference is None
    assert average.ci95[0] < 40 < average.ci95[1]


def test_differences_are_those_of_each_question():
    # A point less everywhere: no doubt of that, though scores vary widely.
    lower = samples("rtpurbo", {"vt": [99.0, -1.0, 49.0, 49.0], "cwe": [19.0, 39.0]})
    _, average = averages_of([*FULL, *lower])
    assert average.difference == pytest.approx(-1)
    assert average.difference_ci95 == pytest.approx((-1, -1))
    # One answer of four is lost, which chance could make none or two.
    lost = samples("rtpurbo", {"vt": [0.0, 0.0, 50.0, 50.0], "cwe": [20.0, 40.0]})
    _, average = averages_of([*FULL, *lost])
    assert average.difference == pytest.approx(-12.5)
    assert average.difference_ci95 == pytest.approx((-37.5, 0))


def test_other_questions_are_not_compared():
    other = samples("rtpurbo", {"vt": [100.0] * 4, "cwe": [20.0, 40.0]}, seed=1)
    fewer = samples("rtpurbo", {"vt": [100.0] * 3, "cwe": [20.0, 40.0]})
    for given in (other, fewer):
        _, average = averages_of([*FULL, *given])
        assert average.difference is None
        assert average.difference_ci95 is None
    (alone,) = averages_of(other)
    assert alone.difference is None


def test_a_policy_without_all_tasks_has_no_average():
    part = samples("rtpurbo", {"vt": [100.0] * 4})
    assert [average.policy for average in averages_of([*FULL, *part])] == ["full"]
    assert [average.policy for average in averages_of([*part, *FULL])] == ["full"]


def test_averages_are_by_length_and_skip_other_suites():
    longer = samples("full", {"vt": [10.0]}, length=8192)
    found = averages_of([*FULL, *longer, *samples("full", {"single": [0.0]}, suite="needle")])
    assert [(one.context_length, one.score) for one in found] == [(4096, 40.0), (8192, 10.0)]
    assert averages_of([]) == []


def test_an_average_is_found_by_its_number_of_tasks():
    average = Average("ruler", 4096, "quest", 13, 325, 70.0, (68.0, 72.0))
    assert find_average([average], 4096, "quest", 13) is average
    assert find_average([average], 4096, "quest", 12) is None
    assert find_average([average], 4096, "full", 13) is None
    assert find_average([average], 8192, "quest", 13) is None


def test_suites_of_questions_have_averages_of_their_own():
    full = samples("full", {"all": [100.0, 0.0]}, length=0, suite="gsm8k")
    sparse = samples("rtpurbo", {"all": [0.0, 0.0]}, length=0, suite="gsm8k")
    other = samples("full", {"all": [100.0]}, length=0, suite="math")
    found = averages_of([*full, *sparse, *other, *FULL])
    assert find_average(found, 0, "rtpurbo", 1, "gsm8k").difference == -50
    assert find_average(found, 0, "full", 1, "math").score == 100
    assert find_average(found, 4096, "full", 2).score == 40
    assert find_average(found, 0, "full", 1) is None

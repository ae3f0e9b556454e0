import pytest
from ruler_crosscheck import PAIRS, comparison, difference_interval

from rtpurbo.evaluation.ruler.tasks import TASKS
from rtpurbo.evaluation.samples import Sample, SampleRecord


def answered(suite, task, scores):
    return [
        SampleRecord(suite, task, 1024, "full", 0, number, Sample.of([1], ["a"], "a", score))
        for number, score in enumerate(scores)
    ]


def test_equal_scores_give_an_interval_of_zero_width():
    assert difference_interval([100.0] * 9, [100.0] * 5) == (0.0, 0.0)


def test_the_interval_is_around_the_difference():
    low, high = difference_interval([0.0, 100.0] * 50, [0.0, 0.0, 0.0, 100.0] * 25)
    assert (low + high) / 2 == pytest.approx(25, abs=2)
    error = 1.96 * 100 * (0.25 / 100 + 0.1875 / 100) ** 0.5
    assert (high - low) / 2 == pytest.approx(error, rel=0.1)


def test_the_table_marks_disagreement():
    assert set(PAIRS) <= set(TASKS)
    samples = []
    for name, other in PAIRS.items():
        samples += answered("ruler", name, [100.0] * 8)
        wrong = 8 if name == "vt" else 1
        samples += answered("lm-eval", other, [0.0] * wrong + [100.0] * (8 - wrong))
    rows = comparison(samples, [1024]).splitlines()[2:]
    assert [row.endswith("| NO |") for row in rows] == [name == "vt" for name in PAIRS]
    assert rows[0].startswith("| niah_single_1 | 1,024 | 100.0 | 87.5 | +12.5 | +0.0 to +37.5 |")

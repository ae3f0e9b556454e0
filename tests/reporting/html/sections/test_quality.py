import pytest

from rtpurbo.evaluation.averages import Average
from rtpurbo.evaluation.records import Record
from rtpurbo.reporting.html.sections.quality import mean_cell, score_cell


def record(score, interval=None, policy="rtpurbo", suite="ruler"):
    return Record(suite, "vt", 4096, policy, 25, score, ci95=interval)


def read(cell):
    """The class of a cell, and its text."""
    return cell.tint or None, " ".join((cell.text, cell.delta, *cell.lines)).split()


@pytest.mark.parametrize(
    ("score", "interval", "expected"),
    [
        (98.0, None, (None, ["98", "±0"])),
        (97.5, None, (None, ["97.5", "▽", "-0.5"])),
        (90.0, None, ("slight", ["90", "▽", "-8.0"])),
        (60.0, None, ("heavy", ["60", "▼", "-38.0"])),
        (99.0, None, (None, ["99", "△", "+1.0"])),
        (97.0, (90.0, 99.0), (None, ["97", "▽", "-1.0", "[90,", "99]"])),
        (97.0, (96.0, 97.8), ("slight", ["97", "▼", "-1.0", "[96,", "98]"])),
        (92.0, (84.0, 99.0), ("slight", ["92", "▽", "-6.0", "[84,", "99]"])),
        (92.0, (84.0, 97.0), ("heavy", ["92", "▼", "-6.0", "[84,", "97]"])),
        (99.0, (97.0, 100.0), (None, ["99", "△", "+1.0", "[97,", "100]"])),
        (100.0, (99.0, 100.0), (None, ["100", "▲", "+2.0", "[99,", "100]"])),
    ],
)
def test_losses_have_a_number_a_sign_and_a_tint(score, interval, expected):
    assert read(score_cell(record(score, interval), record(98.0, policy="full"))) == expected


@pytest.mark.parametrize(
    ("score", "expected"),
    [
        (30.0, (None, ["30.00", "±0"])),
        (30.15, (None, ["30.15", "+0.5", "%"])),
        (30.6, ("slight", ["30.60", "+2.0", "%"])),
        (33.0, ("slight", ["33.00", "+10.0", "%"])),
        (29.0, (None, ["29.00", "-3.3", "%"])),
    ],
)
def test_more_perplexity_is_a_loss(score, expected):
    dense = record(30.0, policy="full", suite="perplexity")
    assert read(score_cell(record(score, suite="perplexity"), dense)) == expected


def test_a_record_without_a_baseline_has_no_ratio():
    assert read(score_cell(None, None)) == ("none", ["-"])
    assert read(score_cell(record(50.0), None)) == (None, ["50"])
    dense = record(98.0, (96.0, 100.0), "full")
    assert read(score_cell(dense, dense)) == (None, ["98", "[96,", "100]"])


def test_means():
    assert read(mean_cell(None, 98.0)) == ("none", ["-"])
    assert read(mean_cell(97.96, 98.0)) == (None, ["98.0", "±0"])
    assert read(mean_cell(90.0, 98.0)) == ("slight", ["90.0", "-8.0"])
    assert read(mean_cell(98.0, None)) == (None, ["98.0"])


@pytest.mark.parametrize(
    ("mean", "interval", "expected"),
    [
        (96.0, (-4.6, 0.1), (None, ["96.0", "▽", "-2.0", "[-4.6,", "+0.1]"])),
        (96.0, (-4.6, -0.1), ("slight", ["96.0", "▼", "-2.0", "[-4.6,", "-0.1]"])),
        (90.0, (-12.0, 1.0), ("slight", ["90.0", "▽", "-8.0", "[-12.0,", "+1.0]"])),
        (99.0, (0.2, 2.0), (None, ["99.0", "▲", "+1.0", "[+0.2,", "+2.0]"])),
    ],
)
def test_a_mean_is_judged_by_the_interval_of_its_difference(mean, interval, expected):
    average = Average("ruler", 4096, "rtpurbo", 13, 325, mean, (0.0, 100.0), mean - 98, interval)
    assert read(mean_cell(mean, 98.0, average)) == expected


def test_an_interval_of_zero_width_is_not_sufficient():
    dense = record(20.0, (0.0, 40.0), "full")
    assert read(score_cell(record(0.0, (0.0, 0.0)), dense))[1][1] == "▽"


@pytest.mark.parametrize(
    ("ci95", "expected"),
    [
        ((95.0, 99.0), (None, ["97.0", "▽", "-1.0"])),
        ((96.0, 97.5), ("slight", ["97.0", "▼", "-1.0"])),
    ],
)
def test_a_mean_of_another_run_is_compared_by_its_own_interval(ci95, expected):
    average = Average("ruler", 4096, "rtpurbo", 13, 325, 97.0, ci95)
    assert read(mean_cell(97.0, 98.0, average)) == expected


def test_one_wrong_answer_in_twenty_is_not_red():
    dense = Record("needle", "single", 4096, "full", 20, 100.0)
    cell = score_cell(Record("needle", "single", 4096, "rtpurbo", 20, 95.0), dense)
    assert read(cell) == ("slight", ["95", "▽", "-5.0"])
    cell = score_cell(Record("needle", "single", 4096, "rtpurbo", 20, 50.0), dense)
    assert read(cell) == ("heavy", ["50", "▼", "-50.0"])

import pytest

from rtpurbo.evaluation.questions.competition_math import SUITE, extract_boxed, is_equivalent


@pytest.mark.parametrize(
    ("generated", "boxed"),
    [
        ("It is \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"),
        ("\\boxed{1}, no, \\boxed{2}", "2"),
        ("\\boxed{\\{1, 2\\}", None),
        ("\\boxed{4}\nProblem: ... \\boxed{5}", "4"),
        ("It is 4.", None),
    ],
)
def test_the_last_box_is_found(generated, boxed):
    assert extract_boxed(generated) == boxed


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("\\frac12", "0.5"),
        ("\\dfrac{3}{4}", "\\frac{3}{4}"),
        ("3/4", "\\frac34"),
        ("-\\frac{1}{2}", "-0.5"),
        ("x = 5", "5"),
        ("1,234", "1234"),
        ("\\text{Evelyn}", "Evelyn"),
        ("(B)", "\\text{B}"),
        ("90^\\circ", "90"),
        ("(1, 2)", "(1,2)"),
        ("\\left(3,4\\right]", "(3,4]"),
        ("10\\text{ cm}", "10"),
        ("12 \\text{ square inches}", "12"),
        ("\\$5.00", "5"),
        ("50\\%", "50"),
        ("2\\sqrt3", "2 \\sqrt{3}"),
        ("4210_{5}", "4210_5"),
        ("x^{2}+1", "x^2 + 1"),
        ("\\frac{a}{b}", "\\frac ab"),
        ("\\{1,2\\}", "\\{1, 2\\}"),
    ],
)
def test_notations_of_one_answer_agree(given, expected):
    assert is_equivalent(given, expected)
    assert is_equivalent(expected, given)


@pytest.mark.parametrize(
    ("given", "expected"),
    [("1,2", "12"), ("(1,2)", "(2,1)"), ("\\frac{1}{0}", "1"), ("6", "60"), ("[1,2)", "(1,2)"),
     ("-5", "5"), ("\\pi/2", "\\pi"), ("", "0"), ("x+1", "x-1")],
)  # fmt: skip
def test_other_answers_differ(given, expected):
    assert not is_equivalent(given, expected)


def test_answers_outside_of_a_box_are_wrong():
    row = {"problem": "1 + 1?", "answer": "2"}
    assert SUITE.is_correct(row, "$\\boxed{2}$")
    assert not SUITE.is_correct(row, "2")

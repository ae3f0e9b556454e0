from decimal import Decimal

import pytest

from rtpurbo.evaluation.questions.gsm8k import SUITE, extract_number


@pytest.mark.parametrize(
    ("generated", "number"),
    [
        ("6 * 7 = 42\n#### 42", "42"),
        ("#### 1,234", "1234"),
        ("#### $18.50", "18.50"),
        ("#### **42**", "42"),
        ("#### The final answer is 12 apples", "12"),
        ("#### -3", "-3"),
        ("#### 5\n#### 7 eggs, of 20", "7"),
        ("so \\boxed{72} of 100", "72"),
        ("The answer is: $1,000. That is 2 times more.", "1000"),
        ("first 3, then 4, so 3+4=7.", "7"),
        ("in all 10,000.", "10000"),
        ("from 5-8", "8"),
        ("12%", "12"),
        ("#### 30\n\nQuestion: What is 5 times 6?\n#### 31", "30"),
        ("I do not know.", None),
        ("", None),
    ],
)
def test_answers_that_are_numbers_are_found(generated, number):
    assert extract_number(generated) == (None if number is None else Decimal(number))


def test_numbers_are_compared_by_value():
    row = {"question": "How much?", "answer": "It is 1200.\n#### 1,200"}
    assert SUITE.answers(row) == ("1,200",)
    assert SUITE.is_correct(row, "#### 1200.00")
    assert not SUITE.is_correct(row, "#### 120")
    assert not SUITE.is_correct(row, "")


def test_a_model_without_a_template_sees_four_solved_problems():
    prompt = SUITE.prompt({"question": "How much? ", "answer": "#### 1"})
    assert prompt.text.count("####") == 4
    assert prompt.text.endswith("Question: How much?\nAnswer:")
    assert prompt.message.endswith("\n\nHow much?")
    assert prompt.message.count("####") == 1

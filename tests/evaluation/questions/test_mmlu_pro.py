import pytest

from rtpurbo.evaluation.questions.mmlu_pro import SUITE, extract_letter


@pytest.mark.parametrize(
    ("generated", "letter"),
    [
        ("It is ohm.\nAnswer: C", "C"),
        ("The answer is (D).", "D"),
        ("**Answer: B**", "B"),
        ("**Answer:** J", "J"),
        ("Answer:\nD", "D"),
        ("answer is $\\boxed{E}$", "E"),
        ("\\boxed{\\text{F}}", "F"),
        ("C", "C"),
        ("C. ohm", "C"),
        ("(A)", "A"),
        ("Option A is wrong. Option B is right. Answer: B", "B"),
        ("the correct option is H.", "H"),
        ("Answer: C\n\nQuestion: next\nAnswer: D", "C"),
        ("Answer: Because", None),
        ("I like it because", None),
        ("", None),
    ],
)
def test_answer_letters_are_found(generated, letter):
    assert extract_letter(generated) == letter


def test_letters_without_an_option_are_wrong():
    row = {"question": "Which?", "options": ["a", "b", "c"], "answer": "B"}
    assert extract_letter("Answer: D", 3) is None
    assert SUITE.is_correct(row, "Answer: B")
    assert not SUITE.is_correct(row, "Answer: A")
    assert not SUITE.is_correct(row, "no idea")
    assert SUITE.prompt(row).message.endswith("Which?\nA. a\nB. b\nC. c")

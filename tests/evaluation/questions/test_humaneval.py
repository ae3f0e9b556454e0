import pytest

from rtpurbo.evaluation.questions.humaneval import SUITE, extract_code, program

ROW = {
    "prompt": "from math import sqrt\n\n\ndef root(x: float) -> float:\n    '''The square root.'''\n",
    "entry_point": "root",
    "test": "def check(candidate):\n    assert candidate(9.0) == 3.0\n",
}
WHOLE = "def root(x):\n    return sqrt(x)\n"


@pytest.mark.parametrize(
    "generated",
    [
        f"Here it is:\n```python\n{WHOLE}```\nThat is all.",
        f"```\n{WHOLE}```",
        f"```python\n{WHOLE}",  # cut at the limit of tokens
        f"Use a helper:\n```python\nx = 1\n```\nThen:\n```python\n{WHOLE}```",
        WHOLE,
        "    return sqrt(x)\n",
        "    return sqrt(x)\n\n\nprint(root(4)) or undefined\n",
        "```python\n    return sqrt(x)\n```",
    ],
)
def test_correct_functions_pass(generated):
    assert SUITE.is_correct(ROW, generated)


@pytest.mark.parametrize("generated", ["", "    return x\n", "No.", "```python\ndef root(:\n```"])
def test_wrong_functions_fail(generated):
    assert not SUITE.is_correct(ROW, generated)


def test_the_block_that_defines_the_function_counts():
    assert extract_code("```python\nroot(4)\n```\n```python\ndef root(x): ...\n```", "root") == (
        "def root(x): ..."
    )
    assert extract_code("    return 1", "root") is None
    assert program(ROW, WHOLE).endswith("\n\ncheck(root)\n")

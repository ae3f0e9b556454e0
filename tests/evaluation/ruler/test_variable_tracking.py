import re

from tests.data.test_variables import ASSIGNMENT
from tests.evaluation.ruler.support import prompts_of


def test_following_the_chain_finds_five_variables():
    for text, answers in prompts_of("vt"):
        example, asked = text.split("\n\n\n")
        held = [follow(part) for part in (example, asked)]
        # A worked example, solved, and the question, of other names and values.
        assert all(len(names) == 5 for names in held)
        assert not set(held[0]) & set(held[1])
        [value] = set(held[1].values())
        assert f"assigned the value {value} in the text above." in asked
        assert list(held[1]) == list(answers)
        [solved] = re.findall(r"they are: (.*)", example)
        assert solved.split() == list(held[0])
        assert "they are: " not in asked


def follow(text):
    """Value of every variable, in the order of the text."""
    held = {}
    for name, source in ASSIGNMENT.findall(text):
        assert source.isdigit() or source in held
        held[name] = held.get(source, source)
    return held

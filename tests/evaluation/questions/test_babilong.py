import pytest

from rtpurbo.data.texts import TextCorpus
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.questions.babilong import TASKS, babilong_tasks, rejected_candidates
from rtpurbo.evaluation.ruler.materials import Materials
from rtpurbo.evaluation.ruler.suite import RulerSuite
from rtpurbo.evaluation.ruler.vocabulary import own_vocabulary
from tests.evaluation.questions.support import ROWS
from tests.tiny_tokenizer import tiny_tokenizer

LENGTH = 3000
BOOK = " ".join(f"It was chapter {n}, and nobody spoke." for n in range(400))


@pytest.fixture
def suite():
    materials = Materials.of(TextCorpus("book", (BOOK,)), vocabulary=own_vocabulary())
    return RulerSuite(materials, tasks=babilong_tasks(ROWS["babilong"], seed=0))


def test_facts_are_in_order_in_a_book_of_the_requested_length(suite):
    tokenizer = tiny_tokenizer()
    rows = suite.tasks["qa1"].rows
    examples = suite.examples(tokenizer, "qa1", LENGTH, 6)
    depths = set()
    for row, example in zip(rows, examples, strict=True):
        text = tokenizer.decode(example.prompt_ids)
        places = [text.index(fact) for fact in row["facts"]]
        assert places == sorted(places)
        depths.update(round(place / len(text), 1) for place in places)
        # Room for the answer is kept, and the rest is used.
        room = suite.tasks["qa1"].tokens_to_generate
        assert LENGTH - 40 < len(example.prompt_ids) + room <= LENGTH
        assert text.index(row["question"]) > places[-1]
        assert example.answers == (row["answer"],)
    assert len(depths) > 3
    # A question stays the same at another length.
    longer = suite.examples(tokenizer, "qa1", LENGTH + 500, 2)
    assert [each.answers for each in longer] == [each.answers for each in examples[:2]]


def test_lengths_without_room_are_refused(suite):
    with pytest.raises(RTPurboError, match="BABILong task qa1 does not fit into 200 tokens"):
        suite.examples(tiny_tokenizer(), "qa1", 200, 1)


@pytest.mark.parametrize(
    ("generated", "score"),
    [
        ("kitchen", 1),
        (" The Kitchen.", 1),
        ("The kitchen is where Mary is.\nThe office was before.", 1),
        ("The kitchen. It was the office before.", 1),
        ("kitchen or office", 0),
        ("office", 0),
        ("kitchenette", 0),
        ("She is before the hallway, in the kitchen", 1),
        ("", 0),
    ],
)
def test_the_first_sentence_names_the_answer_alone(suite, generated, score):
    rejected = rejected_candidates("Where was Mary before the hallway?", "kitchen")
    assert "hallway" not in rejected
    assert "mary" not in rejected
    assert suite.tasks["qa1"].score(generated, ("kitchen",), rejected) == score


def test_invented_people_are_distinct():
    rejected = rejected_candidates("Who did Jeff give the football to?", "Mary")
    assert "fred" in rejected
    assert "jeff" not in rejected
    assert "apple" not in rejected


def test_the_file_decides_which_tasks_there_are():
    assert list(babilong_tasks(ROWS["babilong"], 0)) == ["qa1", "qa4"]
    assert set(babilong_tasks(ROWS["babilong"], 0)) < set(TASKS)
    orders = [
        [
            row["question"] + row["answer"]
            for row in babilong_tasks(ROWS["babilong"], seed)["qa1"].rows
        ]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    with pytest.raises(RTPurboError, match="must be one of qa1, qa2"):
        babilong_tasks([{**ROWS["babilong"][0], "task": "qa20"}], 0)

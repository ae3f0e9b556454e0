import json
import random
import re
from dataclasses import replace

import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.ruler.questions import built_in_questions, read_hotpotqa, read_squad
from tests.evaluation.ruler.support import draft_of, materials, prompts_of

DOCUMENT = re.compile(r"Document (\d+):\n(.+?)(?=\n\n)", re.DOTALL)

SQUAD = {
    "version": "2.0",
    "data": [
        {
            "title": title,
            "paragraphs": [
                {
                    "context": f"{title} {number} says {title}{number}.",
                    "qas": [
                        {
                            "question": f"What does {title} {number} say?",
                            "answers": [{"text": f"{title}{number}"}] * 2 + [{"text": "it"}],
                        },
                        {"question": "What not?", "answers": [], "is_impossible": True},
                    ],
                }
                for number in range(3)
            ],
        }
        for title in ("Ab", "Cd")
    ],
}
HOTPOTQA = [
    {
        "question": "Who?",
        "answer": "Ef",
        "context": [[title, [f"{title} is. ", "It was."]] for title in ("G", "H", "I")],
        "supporting_facts": [["G", 0], ["I", 1], ["I", 0]],
    }
]


def written(path, data):
    path.write_text(json.dumps(data))
    return path


@pytest.mark.parametrize(("task", "gold"), [("qa_1", 1), ("qa_2", 2)])
def test_the_documents_contain_the_answer(task, gold):
    questions = {"qa_1": materials().single_hop, "qa_2": materials().two_hop}[task]
    asked = set()
    for text, answers in prompts_of(task, samples=4):
        documents = DOCUMENT.findall(text)
        assert [int(number) for number, _ in documents] == list(range(1, len(documents) + 1))
        texts = [document for _, document in documents]
        assert len(set(texts)) == len(texts) > 10
        [question] = re.findall(r"\n\nQuestion: (.*\?)", text)
        asked.add(question)
        [item] = [item for item in questions.questions if item.question == question]
        assert item.answers == answers
        assert {questions.passages[number] for number in item.gold} <= set(texts)
        assert len(item.gold) == gold
        assert sum(answers[0] in document for document in texts) == 1
        assert sum(document.endswith(" ...") for document in texts) <= 1
    assert len(asked) == 4


def test_gold_passages_are_anywhere_and_prose_fills_the_rest():
    places = []
    for number in range(40):
        draft = draft_of("qa_1", number)
        documents = draft.text(9000).split("\n\nDocument ")[1:]
        assert len(documents) > 100
        [place] = [place for place, text in enumerate(documents) if draft.answers[0] in text]
        places.append(place / len(documents))
    assert min(places) < 0.2
    assert max(places) > 0.8


def test_no_question_repeats_before_all_were_asked():
    questions = [draft_of("qa_2", number).question for number in range(60)]
    assert len(set(questions[:30])) == 30
    assert questions[:30] == questions[30:]
    other = [draft_of("qa_2", number, seed=1).question for number in range(30)]
    assert set(other) == set(questions)
    assert other != questions[:30]


def test_a_built_in_answer_occurs_in_one_passage():
    for kind in ("single_hop", "two_hop"):
        questions = built_in_questions(kind)
        assert len(questions.passages) == len(set(questions.passages)) == 60
        for item in questions.questions:
            [answer] = item.answers
            texts = [text for text in questions.passages if answer.lower() in text.lower()]
            assert len(texts) == 1
            assert texts[0] in {questions.passages[number] for number in item.gold}
            assert answer.lower() not in item.question.lower()
    # The first passage of two names who the second is about, and the question does not.
    for item in questions.questions:
        place, person = (questions.passages[number] for number in item.gold)
        name = person.split("\n")[0].removeprefix("Captain ")
        assert name in place
        assert name not in item.question


def test_squad_is_read(tmp_path):
    questions = read_squad(written(tmp_path / "squad.json", SQUAD))
    assert len(questions.passages) == len(questions.questions) == 6
    first = questions.questions[0]
    assert first.answers == ("Ab0", "it")
    assert (first.gold, first.related) == ((0,), (1, 2))
    draft = draft_of("qa_1", materials=replace(materials(), single_hop=questions))
    # Passages of the same article come first.
    title = draft.question.split()[-3]
    documents = draft.text(8).split("\n\nDocument ")[1:]
    assert [document.count(f"{title} ") for document in documents] == [1] * len(documents)


def test_hotpotqa_is_read(tmp_path):
    questions = read_hotpotqa(written(tmp_path / "hotpot.json", HOTPOTQA))
    [item] = questions.questions
    assert questions.passages == ("G\nG is. It was.", "H\nH is. It was.", "I\nI is. It was.")
    assert (item.answers, item.gold, item.related) == (("Ef",), (0, 2), (1,))
    without = [{**HOTPOTQA[0], "supporting_facts": []}]
    [item] = read_hotpotqa(written(tmp_path / "hotpot.json", without)).questions
    assert (item.gold, item.related) == ((0, 1, 2), ())


@pytest.mark.parametrize("read", [read_squad, read_hotpotqa])
def test_bad_files_are_refused(tmp_path, read):
    with pytest.raises(RTPurboError, match="there is no file of questions"):
        read(tmp_path / "nothing.json")
    for content in ("", "{", "3", '{"data": [{}]}', '[{"question": "?"}]', '["a"]'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(RTPurboError, match="is not in"):
            read(tmp_path / "bad.json")
    (tmp_path / "empty.json").write_text('{"data": []}' if read is read_squad else "[]")
    with pytest.raises(RTPurboError, match="no question with an answer"):
        read(tmp_path / "empty.json")


def test_an_answer_that_occurs_everywhere_does_not_hang():
    everywhere = tuple(replace(item, answers=(" ",)) for item in materials().single_hop.questions)
    draft = draft_of(
        "qa_1",
        materials=replace(
            materials(), single_hop=replace(materials().single_hop, questions=everywhere)
        ),
        rng=random.Random(0),
    )
    assert draft.text(5000).count("Document ") > 60

import pytest

from rtpurbo.evaluation import task_suite
from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.ruler.draft import Task
from rtpurbo.evaluation.ruler.suite import RulerSuite
from rtpurbo.evaluation.ruler.tasks import TASKS
from tests.evaluation.ruler.support import LENGTH, materials
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.fixture
def suite():
    return RulerSuite(materials())


def answer_with(monkeypatch, write):
    """The model writes what `write(prompt, tokens to generate)` says."""

    def generate(model, tokenizer, prompts, max_new_tokens):
        return [write(bytes(prompt), max_new_tokens) for prompt in prompts]

    monkeypatch.setattr(task_suite, "continue_tokens", generate)


@pytest.mark.parametrize("task", TASKS)
def test_correct_answers_score_100_and_empty_ones_0(monkeypatch, suite, task):
    tokenizer = tiny_tokenizer()
    known = {
        bytes(example.prompt_ids): example.answers
        for example in suite.examples(tokenizer, task, LENGTH, 2)
    }
    rooms = set()

    def know(prompt, room):
        rooms.add(room)
        # A way to say it is enough for questions; the case does not matter.
        said = known[prompt][-1:] if TASKS[task].any_answer else known[prompt]
        return f" {' and '.join(said)}.".upper()

    calls = []
    answer_with(monkeypatch, know)
    case = Case("ruler", task, LENGTH, 2)
    [outcome] = suite.run(tiny_model(), tokenizer, case, lambda: calls.append(1))
    assert outcome.score == 100
    assert rooms == {TASKS[task].tokens_to_generate}
    assert len(calls) == len(outcome.samples) == 2
    assert len({sample.prompt_hash for sample in outcome.samples}) == 2

    answer_with(monkeypatch, lambda prompt, room: "")
    assert suite.run(tiny_model(), tokenizer, case)[0].score == 0


def test_scores_are_the_mean_of_parts(monkeypatch, suite):
    tokenizer = tiny_tokenizer()
    first, second = suite.examples(tokenizer, "niah_multivalue", LENGTH, 2)
    said = {bytes(first.prompt_ids): first.answers[1], bytes(second.prompt_ids): "no idea"}
    answer_with(monkeypatch, lambda prompt, room: said[prompt])
    case = Case("ruler", "niah_multivalue", LENGTH, 2)
    [outcome] = suite.run(tiny_model(), tokenizer, case)
    assert [sample.score for sample in outcome.samples] == [25, 0]
    assert outcome.score == 12.5


@pytest.mark.parametrize(
    ("generated", "answers", "any_answer", "score"),
    [
        ("One and\x07Two", ["one", "TWO", "three"], False, 2 / 3),
        ("no\x00thing", ["nothing"], False, 0),
        ("the blue one", ["red", "Blue"], True, 1),
        ("the green one", ["red", "Blue"], True, 0),
        ("", ["x"], False, 0),
    ],
)
def test_scores_of_answers(generated, answers, any_answer, score):
    task = Task("qa_1", "", 32, None, any_answer)
    assert task.score(generated, answers, ()) == pytest.approx(score)

from itertools import count

import pytest

from rtpurbo.data.texts import load_texts
from rtpurbo.evaluation import needle, task_suite
from rtpurbo.evaluation.cases import NEEDLE_TASKS, Case
from rtpurbo.evaluation.needle import NeedleSuite
from rtpurbo.models.text import continue_tokens
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

LENGTH = 512


@pytest.fixture(scope="module")
def corpus():
    return load_texts(None, "heldout")


def answers(model, corpus, task, samples, seed=0):
    case = Case("needle", task, LENGTH, samples)
    [outcome] = NeedleSuite(corpus, seed).run(model, tiny_tokenizer(), case)
    return outcome


@pytest.fixture
def asked(monkeypatch):
    """Every example that is made, with its depth."""
    examples = []
    make = needle.make_retrieval_example

    def spy(*args, **options):
        examples.append((make(*args, **options), options["depth"]))
        return examples[-1][0]

    monkeypatch.setattr(needle, "make_retrieval_example", spy)
    return examples


def answer_with(monkeypatch, asked, write):
    """The model writes what `write(number of the question, answers)` says."""
    numbers = count()

    def generate(model, tokenizer, prompts, max_new_tokens):
        answered = [(number, asked[number][0]) for _, number in zip(prompts, numbers, strict=False)]
        assert [list(example.prompt_ids) for _, example in answered] == list(prompts)
        return [write(number, example.answers) for number, example in answered]

    monkeypatch.setattr(task_suite, "continue_tokens", generate)


@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_accuracy_is_the_share_of_right_answers(monkeypatch, asked, corpus, task):
    answer_with(
        monkeypatch, asked, lambda number, answers: " and ".join(answers) if number else "1"
    )
    outcome = answers(tiny_model(), corpus, task, 4)
    assert outcome.score == 75
    assert [sample.score for sample in outcome.samples] == [0, 100, 100, 100]
    assert all(
        len(sample.answers) == NEEDLE_TASKS[task]["num_values"] for sample in outcome.samples
    )


def test_single_needles_are_at_evenly_spread_depths(monkeypatch, asked, corpus):
    answer_with(monkeypatch, asked, lambda number, answers: "")
    answers(tiny_model(), corpus, "single", 4)
    assert [depth for _, depth in asked] == [0.125, 0.375, 0.625, 0.875]


def test_questions_depend_on_the_seed_alone(asked, corpus):
    def questions(model, seed):
        asked.clear()
        answers(model, corpus, "multikey", 2, seed)
        return [example.prompt_ids for example, _ in asked]

    models = [
        tiny_model(seed=seed, vocab_size=512, max_position_embeddings=1024) for seed in (0, 1)
    ]
    first = questions(models[0], 0)
    assert first == questions(models[1], 0)
    assert first != questions(models[0], 1)


def test_prompts_of_a_batch_do_not_disturb_each_other():
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=512).double()
    prompts = [[5, 6, 7], list(range(20, 60)), [9]]
    together = continue_tokens(model, tokenizer, prompts, 20)
    assert together == [continue_tokens(model, tokenizer, [each], 20)[0] for each in prompts]


def test_generation_is_greedy_and_stops_at_the_end_of_the_turn():
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=512, max_position_embeddings=1024)
    model.generation_config.do_sample = True
    written = [continue_tokens(model, tokenizer, [[5, 6, 7]], 20)[0] for _ in range(2)]
    assert written[0] == written[1]

    first = tokenizer(written[0])["input_ids"][0]
    model.generation_config.eos_token_id = [first]
    assert len(continue_tokens(model, tokenizer, [[5, 6, 7]], 20)[0]) < len(written[0])

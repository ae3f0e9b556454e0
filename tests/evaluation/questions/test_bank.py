import pytest
import torch

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation import task_suite
from rtpurbo.evaluation.cases import Case
from rtpurbo.evaluation.questions.bank import QuestionBank, prompt_tokens
from rtpurbo.evaluation.questions.suite import Prompt
from rtpurbo.evaluation.questions.suites import SHORT, QuestionData
from rtpurbo.models.artifact import load
from rtpurbo.models.text import continue_tokens
from tests.evaluation.questions.support import write_questions
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.fixture
def data(tmp_path):
    return QuestionData.read(write_questions(tmp_path))


@pytest.fixture
def on_a_gpu(monkeypatch):
    """Batches of several questions, as on a GPU."""

    def batches(model, lengths):
        return [batch for batch in ([2, 0, 1], [*range(3, len(lengths))]) if batch]

    monkeypatch.setattr(task_suite, "batches_by_length", batches)


RIGHT = {
    "gsm8k": lambda row: row["answer"],
    "math": lambda row: "\\boxed{0.5}",
    "mmlu_pro": lambda row: "Answer: A",
    "humaneval": lambda row: f"    return x + {row['entry_point'].removeprefix('plus_')}\n",
}


@pytest.mark.parametrize("suite", SHORT)
def test_each_answer_is_scored_with_its_own_question(monkeypatch, on_a_gpu, data, suite):
    tokenizer, rows = tiny_tokenizer(), data.shuffled(suite)
    bank = QuestionBank(data)
    number_of = {
        tuple(prompt_tokens(tokenizer, SHORT[suite].prompt(row))): number
        for number, row in enumerate(rows)
    }
    limits = set()

    def generate(model, tokenizer, prompts, max_new_tokens):
        limits.add(max_new_tokens)
        numbers = [number_of[tuple(prompt)] for prompt in prompts]
        return ["" if number == 4 else RIGHT[suite](rows[number]) for number in numbers]

    monkeypatch.setattr(task_suite, "continue_tokens", generate)
    calls = []
    case = Case(suite, "all", 0, 6)
    [outcome] = bank.run(tiny_model(), tokenizer, case, lambda: calls.append(1))
    assert [sample.score for sample in outcome.samples] == [100, 100, 100, 100, 0, 100]
    assert outcome.score == pytest.approx(500 / 6)
    assert len(calls) == 6
    assert limits == {SHORT[suite].max_new_tokens}
    # A part has its own questions.
    [part] = bank.run(tiny_model(), tokenizer, case, questions=range(3, 6))
    assert part.samples == outcome.samples[3:]


@pytest.mark.parametrize(
    ("most", "sizes"), [(3, [3, 3]), (2, [3, 1, 1, 1, 1, 1, 1]), (1, [3, 1, 1, 1, 1, 1, 1])]
)
def test_batches_are_halved_where_they_do_not_fit_into_memory(
    monkeypatch, on_a_gpu, data, most, sizes
):
    tried = []

    def generate(model, tokenizer, prompts, max_new_tokens):
        tried.append(len(prompts))
        if len(prompts) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return ["Answer: A"] * len(prompts)

    monkeypatch.setattr(task_suite, "continue_tokens", generate)
    calls = []
    case = Case("mmlu_pro", "all", 0, 6)
    [outcome] = QuestionBank(data).run(
        tiny_model(), tiny_tokenizer(), case, lambda: calls.append(1)
    )
    assert tried == sizes
    assert len(outcome.samples) == len(calls) == 6
    assert outcome.score == 100


def test_one_question_that_does_not_fit_into_memory_is_an_error(monkeypatch, on_a_gpu, data):
    def generate(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(task_suite, "continue_tokens", generate)
    case = Case("mmlu_pro", "all", 0, 6)
    with pytest.raises(torch.OutOfMemoryError):
        QuestionBank(data).run(tiny_model(), tiny_tokenizer(), case)


def test_the_seed_shuffles_and_fewer_samples_are_the_first(tmp_path):
    paths = write_questions(tmp_path)
    orders = [QuestionData.read(paths, seed).shuffled("gsm8k") for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert QuestionData.read(paths).counts() == {
        **{suite: {"all": 6} for suite in SHORT},
        "babilong": {"qa1": 6, "qa4": 6},
    }


def test_answers_do_not_depend_on_the_batch(tiny_artifact, data):
    for model, tokenizer in (load(tiny_artifact), (tiny_model(vocab_size=512), tiny_tokenizer())):
        prompts = [prompt_tokens(tokenizer, Prompt("word " * n, "")) for n in (40, 3, 11)]
        together = continue_tokens(model, tokenizer, prompts, 12)
        alone = [continue_tokens(model, tokenizer, [prompt], 12)[0] for prompt in prompts]
        assert together == alone
        assert len(set(together)) > 1


def test_models_without_a_template_continue_text():
    plain = tiny_tokenizer(chat_template=None)
    assert plain.decode(prompt_tokens(plain, Prompt("asked", "continued"))) == "continued"
    chat = tiny_tokenizer()
    rendered = chat.decode(prompt_tokens(chat, Prompt("asked", "continued")))
    assert rendered == "<|im_start|>user\nasked<|im_end|>\n<|im_start|>assistant\n"


def test_questions_beyond_the_context_are_refused(data):
    bank = QuestionBank(data, max_new_tokens=100)
    case = Case("gsm8k", "all", 0, 6)
    bank.prepare(tiny_tokenizer(), case, 4096)
    with pytest.raises(RTPurboError, match=r"do not fit the model's context of 150: lower --max"):
        bank.prepare(tiny_tokenizer(), case, 150)

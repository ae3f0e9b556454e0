"""Training sequences: drawn by number, the same in every run."""

import hashlib
import random
from dataclasses import replace

import pytest

from rtpurbo.data.tasks import TASKS
from rtpurbo.data.texts import TextCorpus, load_texts
from rtpurbo.settings import DistillationSettings, IndexerTrainingSettings
from rtpurbo.training.sequences import Pools, TrainingMix, TrainingSequence
from tests.data.readers import filler, keys_and_values
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def mix():
    return TrainingMix(
        tiny_tokenizer(), load_texts(None), (800, 1000), {"needles": 0.25}, 0, "test"
    )


def invented_corpus():
    """Prose that does not depend on the Python version, unlike its documentation."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghij", k=rng.randint(2, 7))) for _ in range(400)]
    return TextCorpus(
        "made up",
        tuple(
            " ".join(" ".join(rng.choices(words, k=12)).capitalize() + "." for _ in range(900))
            for _ in range(3)
        ),
    )


MIXTURE = {
    "needles": 0.06, "variables": 0.08, "passage": 0.03, "haystack": 0.14, "counting": 0.08,
    "reading": 0.08, "documents": 0.12, "conversations": 0.31,
}  # fmt: skip


@pytest.mark.parametrize(
    ("mixture", "count", "expected"),
    [
        ({"needles": 1.0}, 10, "4d38c1369fbc9162"),
        ({"variables": 1.0}, 10, "d8e6c0ba6c31d906"),
        ({"passage": 1.0}, 10, "b02cc29f4473ca21"),
        ({"haystack": 1.0}, 10, "33e0a1a7d232910d"),
        ({"counting": 1.0}, 10, "8be64f56d74da5d6"),
        ({"reading": 1.0}, 10, "b057de303cff9275"),
        (dict(reversed(MIXTURE.items())), 40, "0198dd99a393546a"),
    ],
)
def test_sequences_stay_byte_identical(mixture, count, expected):
    """Hashes from before tasks had a registry: a conversion that is repeated must train on the same sequences."""
    pools = Pools(
        tuple(TrainingSequence([number, number], 1) for number in range(3)),
        tuple(TrainingSequence([number, number + 1], 1) for number in range(3)),
    )
    seed, purpose = (0, "test") if len(mixture) == 1 else (3, "stage2")
    drawn = TrainingMix(
        tiny_tokenizer(), invented_corpus(), (900, 3000), mixture, seed, purpose, pools
    )
    sequences = [drawn.sequence(number) for number in range(count)]
    text = repr([(each.input_ids, each.num_answer_tokens) for each in sequences])
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == expected


def test_the_same_number_gives_the_same_sequence(mix):
    assert mix.sequence(5) == replace(mix).sequence(5)
    assert mix.sequence(5) != mix.sequence(7)
    assert mix.sequence(5) != replace(mix, seed=1).sequence(5)
    assert mix.sequence(5) != replace(mix, purpose="other").sequence(5)


def test_sequences_cycle_through_the_lengths(mix):
    for number in range(6):
        expected = (800, 1000)[number % 2]
        assert 0.98 * expected <= len(mix.sequence(number).input_ids) <= expected


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_the_share_of_needles_is_kept(mix, share, expected):
    drawn = replace(mix, mixture={"needles": share})
    sequences = [drawn.sequence(number) for number in range(8)]
    assert sum(sequence.num_answer_tokens > 0 for sequence in sequences) == expected


def test_the_share_of_haystacks_is_kept_with_one_question_each(mix):
    drawn = replace(mix, lengths=(3000,), mixture={"haystack": 0.5})
    sequences = [drawn.sequence(number) for number in range(16)]
    asking = [sequence for sequence in sequences if sequence.num_answer_tokens]
    assert len(asking) == 8
    in_prose = listed = 0
    for sequence in asking:
        text = mix.tokenizer.decode(sequence.input_ids)
        assert text.count("<|im_start|>assistant") == 1
        needles, _, question = text.rpartition("\n\n")
        prose = len(keys_and_values(needles)) < 40 and filler(text) < 20
        listed += prose and len(keys_and_values(question.partition("<|im_end|>")[0])) > 1
        in_prose += prose
        assert len(sequence.input_ids) <= 3000
    # Prose holds one key in a few cases, of which several cannot be asked for.
    assert 0 < in_prose < len(asking)
    assert listed >= in_prose / 2


@pytest.mark.parametrize("task", ["counting", "reading"])
def test_other_tasks_have_their_share_and_training_wordings(mix, task):
    drawn = replace(mix, lengths=(3000,), mixture={task: 0.5})
    sequences = [drawn.sequence(number) for number in range(8)]
    asking = [sequence for sequence in sequences if sequence.num_answer_tokens]
    assert len(asking) == 4
    for sequence in asking:
        text = mix.tokenizer.decode(sequence.input_ids)
        sections = TASKS[task].wordings("train").values()
        introductions = [each for section in sections for each in section["introductions"]]
        assert any(f"{each}\n\n" in text for each in introductions)
        assert len(sequence.input_ids) <= 3000


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_training_and_evaluation_wordings_of_a_task_are_apart(task):
    training, evaluation = task.wordings("train"), task.wordings("test")
    assert set(training) == set(task.sections)
    assert set(evaluation) <= set(training)
    for section, worded in evaluation.items():
        for part in ("introductions", "questions"):
            assert str(training[section][part]) != str(worded[part])


def test_a_stage_gives_the_mix_its_mixture(mix):
    pools = Pools((TrainingSequence([1, 2]),), (TrainingSequence([3, 4]),))
    for stage, tasks in ((DistillationSettings, TASKS), (IndexerTrainingSettings, [*TASKS][:-1])):
        mixture = {name: 0.1 + 0.005 * place for place, name in enumerate(tasks)}
        settings = stage(lengths=(500, 700), mixture=mixture)
        drawn = TrainingMix.of(settings, mix.tokenizer, mix.corpus, 3, "test", pools)
        assert drawn.mixture == mixture
        assert (drawn.lengths, drawn.seed, drawn.purpose) == ((500, 700), 3, "test")
        assert drawn.kinds() == [*tasks, *["prose"] * (sum(mixture.values()) < 1)]

"""Training sequences: drawn by number, the same in every run."""

from dataclasses import replace

import pytest

from rtpurbo.data.texts import load_texts
from rtpurbo.data.wordings import templates
from rtpurbo.settings import DistillationSettings, IndexerTrainingSettings
from rtpurbo.training.pools import Pools
from rtpurbo.training.sequences import TrainingMix, TrainingSequence
from tests.data.readers import filler, keys_and_values
from tests.tiny_tokenizer import tiny_tokenizer


@pytest.fixture(scope="module")
def mix():
    return TrainingMix(tiny_tokenizer(), load_texts(None), (800, 1000), 0.25, 0, "test")


def test_the_same_number_gives_the_same_sequence(mix):
    assert mix.sequence(5) == replace(mix).sequence(5)
    assert mix.sequence(5) != mix.sequence(7)
    assert mix.sequence(5) != replace(mix, seed=1).sequence(5)
    assert mix.sequence(5) != replace(mix, purpose="other").sequence(5)


def test_lengths_take_turns(mix):
    for number in range(6):
        expected = (800, 1000)[number % 2]
        assert 0.98 * expected <= len(mix.sequence(number).input_ids) <= expected


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (0.25, 2), (0.5, 4), (1.0, 8)])
def test_needles_have_their_share(mix, share, expected):
    sequences = [replace(mix, needle_share=share).sequence(number) for number in range(8)]
    assert sum(sequence.num_answer_tokens > 0 for sequence in sequences) == expected


def test_haystacks_have_their_share_and_one_question(mix):
    drawn = replace(mix, lengths=(3000,), needle_share=0.0, haystack_share=0.5)
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


@pytest.mark.parametrize(
    ("share", "kinds"),
    [("counting_share", ("lists", "code_words")), ("reading_share", ("reading",))],
)
def test_other_kinds_have_their_share(mix, share, kinds):
    drawn = replace(mix, lengths=(3000,), needle_share=0.0, **{share: 0.5})
    sequences = [drawn.sequence(number) for number in range(8)]
    asking = [sequence for sequence in sequences if sequence.num_answer_tokens]
    assert len(asking) == 4
    for sequence in asking:
        text = mix.tokenizer.decode(sequence.input_ids)
        introductions = [
            each for kind in kinds for each in templates("train")[kind]["introductions"]
        ]
        assert any(f"{each}\n\n" in text for each in introductions)
        assert len(sequence.input_ids) <= 3000


def test_a_stage_gives_the_mix_its_shares(mix):
    shares = {
        "needle_share": 0.1, "variable_share": 0.11, "passage_share": 0.12, "haystack_share": 0.13,
        "counting_share": 0.14, "reading_share": 0.15, "document_share": 0.08,
    }  # fmt: skip
    pools = Pools((TrainingSequence([1, 2]),), (TrainingSequence([3, 4]),))
    for stage in (IndexerTrainingSettings, DistillationSettings):
        if stage is DistillationSettings:
            shares["conversation_share"] = 0.04
        settings = stage(lengths=(500, 700), **shares)
        assert settings.shares() == shares
        drawn = TrainingMix.of(settings, mix.tokenizer, mix.corpus, 3, "test", pools)
        assert {name: getattr(drawn, name) for name in shares} == shares
        assert (drawn.lengths, drawn.seed, drawn.purpose) == ((500, 700), 3, "test")

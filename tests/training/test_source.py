"""Distribution of sequences over steps and processes, and positions of a stream."""

import json

import pytest

from rtpurbo.data.stream import open_stream
from rtpurbo.data.texts import TextCorpus
from rtpurbo.errors import RTPurboError
from rtpurbo.processes import Processes
from rtpurbo.training.sequences import TrainingMix
from rtpurbo.training.source import SequenceSource, random_access
from tests.tiny_tokenizer import tiny_tokenizer


def document(number):
    return f"Document {number} tells of the magic number {number * number}. " * (5 + number % 7)


CORPUS = TextCorpus("x", tuple(document(number) * 10 for number in range(9)))


@pytest.fixture
def stream(tmp_path):
    pytest.importorskip("datasets")
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": document(n)}) + "\n" for n in range(40)))
    return open_stream([str(path)], buffer_size=8, held_out=3)


def mix_of(stream, **shares):
    return TrainingMix(
        tiny_tokenizer(), stream.opening, (700, 800), {"needles": 0.5, **shares}, 0, "test"
    )


def test_sequences_from_a_stream_resume_exactly_and_mix_all_tasks(stream):
    mix = mix_of(stream, variables=0.2, passage=0.2)
    source = SequenceSource(mix, stream, 2)
    groups = [source.take(group) for group in range(3)]
    assert source.take(2) is groups[2]
    again, onwards = source.position_of_all(2), source.position_of_all(3)
    groups += [source.take(group) for group in range(3, 8)]
    for position, first in ((again, 2), (onwards, 3)):
        resumed = SequenceSource(mix, stream, 2)
        resumed.seek(json.loads(json.dumps(position)))
        assert [resumed.take(group) for group in range(first, 8)] == groups[first:]
    sequences = [sequence for group in groups for sequence in group]
    assert {len(sequence.input_ids) > 705 for sequence in sequences} == {True, False}
    assert any(sequence.num_answer_tokens == 0 for sequence in sequences)
    assert source.position(8)["lanes"].keys() == {"0", "1"}


def test_texts_in_memory_have_no_position():
    source = SequenceSource(TrainingMix(tiny_tokenizer(), CORPUS, (420,), {}, 0, "test"), CORPUS, 2)
    assert source.take(5) == source.take(5)
    assert source.take(2) != source.take(5)
    assert source.position_of_all(3) is None
    source.seek(None)


def test_processes_divide_the_sequences_of_one(stream):
    for texts in (CORPUS, stream):
        mix = TrainingMix(tiny_tokenizer(), random_access(texts), (420, 500), {}, 0, "test")
        alone = SequenceSource(mix, texts, 4)
        shares = [SequenceSource(mix, texts, 4, Processes(index, 2)) for index in (0, 1)]
        assert [share.numbers(1) for share in shares] == [[4, 6], [5, 7]]
        for group in range(3):
            parts = [share.take(group) for share in shares]
            dealt = [sequence for pair in zip(*parts, strict=True) for sequence in pair]
            assert dealt == alone.take(group)


def test_a_position_with_fewer_lanes_is_refused(stream):
    mix = mix_of(stream)
    position = SequenceSource(mix, stream, 1).position_of_all(0)
    with pytest.raises(RTPurboError, match="--force"):
        SequenceSource(mix, stream, 2).seek(position)

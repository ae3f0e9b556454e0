"""Sequences that a model wrote, on disk and in the mix."""

from dataclasses import replace

import pytest

from rtpurbo.data.texts import load_texts
from rtpurbo.errors import RTPurboError
from rtpurbo.training.pools import cached_sequences, read_sequences, save_sequences
from rtpurbo.training.sequences import Pools, TrainingMix, TrainingSequence
from tests.tiny_tokenizer import tiny_tokenizer


def sequences(count, length=5):
    return tuple(TrainingSequence([number] * length, 1 + number % 3) for number in range(count))


def test_sequences_are_read_as_written(tmp_path):
    written = (*sequences(4), TrainingSequence([1, 2, 3]))
    save_sequences(tmp_path / "pool", written)
    assert read_sequences(tmp_path / "pool") == written


def test_sequences_are_written_once(tmp_path):
    calls = []

    def write():
        calls.append(1)
        return sequences(3)

    path = tmp_path / "pool"
    assert cached_sequences(path, write) == cached_sequences(path, write) == sequences(3)
    assert len(calls) == 1
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(RTPurboError, match="cannot be read: remove it"):
        cached_sequences(path, write)


@pytest.mark.parametrize(("count", "held_out"), [(0, 0), (1, 0), (7, 3), (100, 16)])
def test_some_are_held_out(count, held_out):
    pools = Pools(sequences(count), sequences(4))
    trained, unseen = pools.split()
    assert trained.conversations + unseen.conversations == pools.conversations
    assert len(unseen.conversations) == held_out
    assert (len(trained.documents), len(unseen.documents)) == (2, 2)


@pytest.fixture(scope="module")
def mix():
    pools = Pools(sequences(6), sequences(3, length=9))
    return TrainingMix(
        tiny_tokenizer(), load_texts(None), (800,), {"needles": 0.2}, 0, "test", pools
    )


def with_shares(mix, **shares):
    return replace(mix, mixture={**mix.mixture, **shares})


def test_the_shares_of_pools_are_kept_and_pools_repeat_only_when_exhausted(mix):
    drawn = with_shares(mix, conversations=0.5, documents=0.25)
    found = [drawn.sequence(number) for number in range(24)]
    talks = [each for each in found if len(each.input_ids) == 5]
    documents = [each for each in found if len(each.input_ids) == 9]
    assert abs(len(talks) - 12) <= 1
    assert abs(len(documents) - 6) <= 1
    for part, pool in ((talks, mix.pools.conversations), (documents, mix.pools.documents)):
        for first in range(0, len(part), len(pool)):
            met = part[first : first + len(pool)]
            assert met == list(pool[: len(met)])


def test_other_kinds_stay_as_they_are_without_pools(mix):
    drawn = with_shares(mix, conversations=0.5)
    same = [drawn.sequence(n) == mix.sequence(n) for n in range(10)]
    needles = [mix.sequence(n).num_answer_tokens > 0 for n in range(10)]
    assert all(kept for kept, is_needle in zip(same, needles, strict=True) if is_needle)


def test_a_share_without_a_pool_is_refused(mix):
    with pytest.raises(RTPurboError, match=r"conversations .* mixture.conversations to 0"):
        with_shares(replace(mix, pools=None), conversations=0.1)
    with pytest.raises(RTPurboError, match=r"documents .* mixture.documents to 0"):
        with_shares(replace(mix, pools=Pools(sequences(2))), documents=0.1)

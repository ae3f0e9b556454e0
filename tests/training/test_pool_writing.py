"""Pools written before a conversion."""

from dataclasses import replace

import pytest

from rtpurbo.data.texts import load_texts
from rtpurbo.settings import DistillationSettings, IndexerTrainingSettings
from rtpurbo.training import pools as module
from rtpurbo.training.pools import read_pools, write_pools
from rtpurbo.training.sequences import HELD_OUT
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

STAGE1 = IndexerTrainingSettings(steps=8, steps_per_sequence=4, lengths=(700,), mixture={})
STAGE2 = DistillationSettings(steps=4, lengths=(600, 800), mixture={})


def pools_of(tmp_path, *stages):
    tokenizer = tiny_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), max_position_embeddings=1024)
    write_pools(model, tokenizer, load_texts(None), stages, tmp_path)
    return read_pools(tmp_path)


def test_without_a_share_nothing_is_written(tmp_path):
    pools = pools_of(tmp_path, STAGE1, STAGE2)
    assert pools.documents == pools.conversations == ()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("stage1", "stage2", "length", "count"),
    [(1.0, 0.0, 700, 2), (0.5, 0.5, 600, 2), (0, 1.0, 600, 4)],
)
def test_the_number_of_documents_is_what_the_stages_need(tmp_path, stage1, stage2, length, count):
    pools = pools_of(
        tmp_path,
        replace(STAGE1, mixture={"documents": stage1}),
        replace(STAGE2, mixture={"documents": stage2}),
    )
    assert len(pools.documents) == count + HELD_OUT
    first = pools.documents[0]
    assert len(first.input_ids) - first.num_answer_tokens == length - 128
    assert pools.conversations == ()


def test_a_long_training_repeats_conversations(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_CONVERSATIONS", 4)
    pools = pools_of(
        tmp_path, replace(STAGE2, mixture={"conversations": 0.5}, sequences_per_step=8)
    )
    assert len(pools.conversations) == 4

"""Number of retrieval heads by the divergence of answers."""

from dataclasses import replace

import pytest

from rtpurbo.calibration.budget import choose_budget
from rtpurbo.calibration.calibrate import calibrate, read_calibration
from rtpurbo.calibration.selection import choose_heads
from rtpurbo.data.texts import load_texts
from rtpurbo.errors import RTPurboError
from rtpurbo.files import write_json_atomically
from rtpurbo.models.sparse_layers import is_sparse
from rtpurbo.settings import CalibrationSettings
from tests.calibration.copying import LENGTH, RULE, Copies, copying_model
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

SETTINGS = CalibrationSettings(
    length=LENGTH, ratio=0.1, ranking="gates", granularity="kv_group", max_divergence=1e-3
)


def choice(model, *best):
    """Function that chooses a share of the heads, first those of the KV heads given by layer and head."""
    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads
    scores = [[0.0] * config.num_attention_heads for _ in range(config.num_hidden_layers)]
    for place, (layer, head) in enumerate(best):
        scores[layer][head * group : (head + 1) * group] = [1 - 0.1 * place] * group
    return lambda share: choose_heads(
        scores, config.num_key_value_heads, replace(SETTINGS, ratio=share)
    )


@pytest.mark.parametrize("dense_prompt_queries", [0, LENGTH])
def test_heads_are_added_until_answers_agree(dense_prompt_queries):
    model = copying_model()
    rule = replace(RULE, dense_prompt_queries=dense_prompt_queries)
    # The KV head that answers need comes third.
    choose = choice(model, (0, 0), (0, 1), (1, 1))
    reports = []
    found = choose_budget(
        model, choose, Copies(), rule, SETTINGS, progress=lambda *each: reports.append(each)
    )
    assert found.head_map.num_full_key_value_heads == 3
    # 2, 4 and 6 of the 12 query heads; shares that bring no whole KV head are not tried.
    assert list(found.divergences) == [0.1, 0.18, 0.34]
    first, second, last = found.divergences.values()
    assert last <= 1e-3 < 0.1 < min(first, second)
    assert [figures["share"] for _, _, _, figures in reports] == [0.1, 0.18, 0.34]
    assert [(done, total) for _, done, total, _ in reports] == [(1, 6), (2, 6), (3, 3)]
    assert not is_sparse(model)


def test_all_heads_where_windows_always_change_answers():
    model = tiny_model(vocab_size=512)
    settings = replace(SETTINGS, max_divergence=1e-9)
    found = choose_budget(model, choice(model), Copies(), RULE, settings)
    assert found.head_map.num_retrieval_heads == found.head_map.num_heads
    assert abs(list(found.divergences.values())[-1]) < 1e-6


def test_a_calibration_that_looks_for_the_number(tmp_path):
    corpus = load_texts(None, "train")
    model = tiny_model(vocab_size=512, max_position_embeddings=1024)
    settings = replace(SETTINGS, length=512, num_documents=2, ratio=0.5)

    def found(**changes):
        changed = replace(settings, **changes)
        return calibrate(model, tiny_tokenizer(), corpus, changed, rule=RULE)

    enough = found(max_divergence=100.0)
    assert list(enough.divergences) == ["0.5"]
    assert enough.head_map == found(max_divergence=None).head_map
    assert found(max_divergence=1e-9).head_map.num_retrieval_heads == 12
    for exact in ({"count": 4}, {"threshold": 0.0}):
        assert found(**exact).divergences is None
    write_json_atomically(tmp_path / "map.json", enough.to_dict())
    assert read_calibration(tmp_path / "map.json") == enough


@pytest.mark.parametrize("value", [0.0, -1.0])
def test_a_divergence_that_windows_cannot_reach_is_refused(value):
    with pytest.raises(RTPurboError, match="it must be above 0"):
        CalibrationSettings(max_divergence=value)

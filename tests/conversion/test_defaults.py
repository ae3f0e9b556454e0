import math
from dataclasses import replace
from pathlib import Path

import pytest

from rtpurbo.calibration.budget import STEP
from rtpurbo.calibration.selection import choose_heads
from rtpurbo.config import AttentionRule, RTPurboConfig
from rtpurbo.conversion.defaults import EFFORTS, default_settings, resolve_effort
from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.memory import cache_bytes
from rtpurbo.lengths import STAGES, check_lengths, lengths_of
from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.models.sparsify import sparsify
from tests.tiny_models import tiny_model

CONTEXTS = [2048, 4096, 8192, 16384, 32768, 40960, 131072, 262144, 1048576]


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("context", CONTEXTS)
def test_every_stage_learns_at_every_context(context, effort):
    settings = default_settings(effort, context)
    check_lengths(settings, context)
    window = settings.attention.sliding_window
    lengths = lengths_of(settings)
    assert set(lengths) == set(STAGES) - ({"stage2"} if effort == "standard" else set())
    for each in lengths.values():
        assert min(each) >= 2 * window > window + settings.attention.num_sink_tokens
        assert max(each) <= context
    longest = max(settings.stage1.lengths)
    assert longest == max(settings.stage2.lengths) >= settings.calibration.length
    assert settings.attention.retrieval_window is None


@pytest.mark.parametrize(
    ("effort", "context", "longest"),
    [
        ("quick", 8192, 2048),
        ("quick", 131072, 16384),
        ("standard", 8192, 8192),
        ("standard", 131072, 32768),
        ("thorough", 40960, 40960),
        ("thorough", 1048576, 65536),
    ],
)
def test_the_longest_sequence_follows_effort_and_context(effort, context, longest):
    assert max(default_settings(effort, context).stage2.lengths) == longest


def test_a_longer_window_makes_longer_sequences():
    rule = AttentionRule(sliding_window=16384)
    settings = default_settings("standard", 262144, rule=rule)
    assert settings.attention == rule
    assert settings.stage1.lengths == (32768, 65536)


def test_lengths_are_spread_up_to_the_longest():
    settings = default_settings("quick", 32768, max_length=32768)
    assert settings.stage1.lengths == (8192, 16384, 32768)
    assert settings.stage2.lengths == (8192, 32768, 16384, 32768)
    assert settings.calibration.length == 16384
    # Between one and two windows, all sequences are as long as may be.
    short = default_settings("thorough", 32768, max_length=6000)
    assert short.stage1.lengths == short.stage2.lengths == (6000,)
    assert short.calibration.length == 6000


def test_quick_stays_cheap_for_a_short_context():
    settings = default_settings("quick", 8192)
    assert settings.attention.sliding_window == 1024
    calibration, stage1, stage2 = settings.calibration, settings.stage1, settings.stage2
    assert calibration.length * calibration.num_documents <= 3 * 2048
    assert stage1.steps / stage1.steps_per_sequence * max(stage1.lengths) <= 4 * 2048
    assert stage2.steps * max(stage2.lengths) <= 1.1 * 10 * 1536


@pytest.mark.parametrize("effort", EFFORTS)
def test_index_keys_are_shared_where_whole_groups_retrieve(effort):
    settings = default_settings(effort, 32768)
    assert settings.indexer.shared_keys == (settings.calibration.granularity == "kv_group")


def test_more_effort_is_more_work():
    work = [
        s.calibration.num_documents * s.calibration.length + s.stage1.steps * max(s.stage1.lengths)
        for s in (default_settings(effort, 131072) for effort in EFFORTS)
    ]
    assert work == sorted(work)
    assert len(set(work)) == len(work)


@pytest.mark.parametrize("context", [64, 300, 388])
def test_a_context_without_room_is_refused(context):
    with pytest.raises(RTPurboError, match=f"context of {context} tokens leaves nothing to select"):
        default_settings("standard", context)


@pytest.mark.parametrize(
    ("max_length", "sentence"),
    [
        (65536, "--max-length is 65,536 tokens, but the model's context is 32,768"),
        (
            4100,
            r"longer than sinks and window \(4,224 tokens\): raise it or choose a smaller --win",
        ),
        (-1, "--max-length is -1 tokens"),
    ],
)
def test_a_longest_sequence_out_of_range_is_refused(max_length, sentence):
    with pytest.raises(RTPurboError, match=sentence):
        default_settings("standard", 32768, max_length=max_length)


@pytest.mark.parametrize(
    ("effort", "context", "sinks", "heavy_hitters", "window"),
    [
        ("standard", 32768, 128, 1024, 3072),
        ("thorough", 131072, 256, 2048, 6144),
        ("standard", 2048, 8, 64, 192),
        ("quick", 32768, 4, 0, 4096),
    ],
)
def test_heavy_hitters_take_a_quarter_of_the_window(effort, context, sinks, heavy_hitters, window):
    rule = default_settings(effort, context).attention
    assert (rule.num_fixed_sinks, rule.num_heavy_hitters) == (sinks, heavy_hitters)
    assert rule.sliding_window == window


@pytest.mark.parametrize(
    ("effort", "context", "min_tokens"),
    [
        ("standard", 2048, 128),
        ("standard", 8192, 128),
        ("standard", 32768, 512),
        ("thorough", 131072, 1024),
        ("quick", 32768, 128),
    ],
)
def test_the_minimum_of_selected_tokens_grows_with_the_window(effort, context, min_tokens):
    assert default_settings(effort, context).attention.min_tokens == min_tokens


def test_auto_is_by_device():
    assert resolve_effort("auto", "cpu") == "quick"
    assert resolve_effort("auto", "cuda") == "standard"
    assert resolve_effort("thorough", "cpu") == "thorough"
    with pytest.raises(RTPurboError, match="no effort 'slow': choose auto, quick, standard, thor"):
        resolve_effort("slow", "cpu")


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(12, 2, 128), (14, 2, 64), (32, 8, 128), (4, 1, 256)]
)
def test_the_cache_has_about_half_of_the_dense_one(heads, kv_heads, head_dim):
    context, layers = 32768, 10
    model = tiny_model(
        "qwen2",
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
    ).bfloat16()
    settings = default_settings("standard", context, head_dim=head_dim)
    # Distinct scores of all KV heads.
    group = heads // kv_heads
    scores = [
        [float(layer * kv_heads + head // group) for head in range(heads)]
        for layer in range(layers)
    ]
    head_map = choose_heads(scores, kv_heads, settings.calibration)
    dense = cache_bytes(model, context)
    sparsify(model, RTPurboConfig(head_map, settings.attention, settings.indexer))
    assert head_map.num_full_key_value_heads == settings.calibration.ratio * layers * kv_heads
    assert 0.45 < cache_bytes(model, context) / dense <= 0.53


@pytest.mark.parametrize(
    ("head_dim", "index_dim"), [(32, 16), (64, 32), (80, 32), (96, 48), (128, 48), (256, 64)]
)
def test_the_index_has_three_eighths_of_the_head_in_multiples_of_16(head_dim, index_dim):
    settings = default_settings("standard", 32768, head_dim=head_dim)
    assert settings.indexer.index_dim == index_dim
    assert settings.indexer.min_wavelength == 4096
    assert default_settings("quick", 32768, head_dim=head_dim).indexer.index_dim == 16


@pytest.mark.parametrize(("size", "head_dim"), [("0.5b", 64), ("1.5b", 128)])
def test_artifacts_of_public_models_have_the_default_settings(size, head_dim):
    folder = Path(__file__).parents[2] / "artifacts" / f"qwen2.5-coder-{size}-instruct"
    config = ArtifactConfig.read(folder).config
    settings = default_settings("standard", 32768, head_dim=head_dim)
    assert replace(config.attention, layer_top_p=None) == settings.attention
    assert config.indexer == settings.indexer
    key_value_heads = 2 * len(config.head_map.retrieval_heads)
    counts = [
        math.ceil((settings.calibration.ratio + steps * STEP) * key_value_heads)
        for steps in range(8)
    ]
    assert config.head_map.num_full_key_value_heads in counts

"""Plans and their checks for every family, context and effort, without weights."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from rtpurbo.conversion import plan as plans
from rtpurbo.conversion import plan_conversion
from rtpurbo.conversion.defaults import EFFORTS
from rtpurbo.conversion.options import choose_settings
from rtpurbo.conversion.plan import make_plan
from rtpurbo.conversion.run import with_stage2
from rtpurbo.errors import RTPurboError
from rtpurbo.lengths import check_lengths, lengths_of
from rtpurbo.models.families import FAMILIES
from rtpurbo.settings import change_settings
from tests.conversion.test_defaults import CONTEXTS
from tests.tiny_models import COMMON
from tests.tiny_models import FAMILIES as TINY

CPU = torch.device("cpu")
GPU = torch.device("cuda")


def tiny_config(family="llama", context=4096, **changes):
    return CONFIG_MAPPING[family](
        **{**COMMON, **TINY[family], "max_position_embeddings": context, **changes}
    )


def planned(config, device=CPU, effort="auto", max_length=None, changes=None, **options):
    settings = choose_settings(
        config, device, {"effort": effort, "max_length": max_length, "changes": changes}
    )
    check_lengths(settings, config.max_position_embeddings)
    return make_plan("some/model", config, settings, device=device, **options)


@pytest.fixture
def h200(monkeypatch):
    """A GPU by name only."""
    monkeypatch.setattr(
        plans, "device_name", lambda device: "cpu" if device == CPU else "NVIDIA H200"
    )


@pytest.mark.parametrize("effort", EFFORTS)
@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_model_has_a_plan(family, context, effort):
    plan = planned(tiny_config(family, context), effort=effort)
    rule = plan.settings.attention
    for lengths in lengths_of(plan.settings).values():
        assert rule.sliding_window + rule.num_sink_tokens < min(lengths)
        assert max(lengths) <= max(plan.settings.stage2.lengths) <= context
    assert plan.context_length == context
    assert 0 < plan.num_retrieval_heads <= plan.num_heads
    assert plan.peak_gib > 0
    stage2 = plan.settings.stage2
    has_stage2 = effort != "standard"
    expected = {
        "calibration": True,
        "stage1": True,
        "writing": has_stage2 and bool({"conversations", "documents"} & stage2.mixture.keys()),
        "stage2": has_stage2,
        "refresh": has_stage2,
        "top_p": effort != "quick",
    }
    assert {stage: seconds > 0 for stage, seconds in vars(plan.seconds).items()} == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_and_heads_are_those_of_the_model(family):
    config = tiny_config(family)
    plan = planned(config)
    model = AutoModelForCausalLM.from_config(config)
    assert plan.parameters == sum(parameter.numel() for parameter in model.parameters())
    full_layers = 1 if family == "gemma3_text" else 2
    assert plan.num_heads == full_layers * config.num_attention_heads
    assert plan.num_kv_heads == full_layers * config.num_key_value_heads


def test_the_text_describes_the_conversion():
    text = str(
        planned(tiny_config(context=8192), changes={"calibration.ratio": 0.25}, data=["a", "b"])
    )
    for part in (
        "some/model (llama)",
        "weights in float32",
        "8,192 tokens",
        "1,024 tokens, after 4 sinks",
        "3 retrieval heads of 12 query heads (6 KV heads)",
        "3 documents at 2,048 tokens",
        "60 steps at 2,048 tokens\n             needles 50 %, prose 50 %\n",
        "8 steps at 2,048 tokens, LoRA of rank 8, learning rate 0.0002",
        "15 steps at 2,048 tokens",
        "a, b",
        "GiB expected at the peak",
        "minutes expected: calibration 0.1",
    ):
        assert part in text


def test_the_text_of_other_choices():
    changes = {"calibration.threshold": 0.5, "stage2.steps": 0}
    text = str(planned(tiny_config(), changes=changes))
    assert "a score of 0.5 or more, of 12 query heads" in text
    assert "stage 2      left out" in text
    assert "refresh" not in text
    assert "documentation of Python" in text
    changes = {"calibration.count": 5, "calibration.granularity": "kv_group", "stage2.lora_rank": 0}
    text = str(planned(tiny_config(context=32768), changes=changes, max_length=32768))
    assert "5 retrieval heads of 12 query heads (6 KV heads), by KV group" in text
    assert "8 steps at 8,192, 16,384 and 32,768 tokens, all weights" in text
    changes = {"stage1.mixture": {"reading": 0.125, "needles": 0.875}}
    assert "  needles 87.5 %, reading 12.5 %\n" in str(planned(tiny_config(), changes=changes))


def test_too_many_heads_are_refused():
    with pytest.raises(
        RTPurboError, match="13 retrieval heads were asked for, but the model has 12"
    ):
        planned(tiny_config(), changes={"calibration.count": 13})


@pytest.mark.parametrize(
    ("device", "dtype", "stored", "expected"),
    [
        (CPU, "auto", "bfloat16", "float32"),
        (GPU, "auto", "bfloat16", "bfloat16"),
        (GPU, "auto", None, "float32"),
        (GPU, "float16", "bfloat16", "float16"),
    ],
)
def test_the_type_of_the_weights(h200, device, dtype, stored, expected):
    config = tiny_config(dtype=stored)
    assert planned(config, device, dtype=dtype).dtype == expected


def test_a_type_that_is_none_is_named():
    with pytest.raises(RTPurboError, match="there is no dtype 'int8': choose one of auto"):
        planned(tiny_config(), CPU, dtype="int8")


@pytest.mark.parametrize(
    ("changes", "is_searched"),
    [
        ({}, True),
        ({"calibration.ratio": 0.4}, False),
        ({"calibration.count": 300}, False),
        ({"calibration.threshold": 0.5}, False),
        ({"calibration.ranking": "induction"}, False),
        ({"calibration.ratio": 0.3, "calibration.max_divergence": 0.01}, True),
    ],
)
def test_the_plan_says_where_more_heads_may_be_chosen(h200, changes, is_searched):
    text = str(planned(shape_of_qwen3_8b(), GPU, "standard", changes=changes))
    assert ("more if answers diverge by more than" in text) == is_searched


def shape_of_qwen3_8b():
    return CONFIG_MAPPING["qwen3"](
        num_hidden_layers=36, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
        head_dim=128, intermediate_size=12288, vocab_size=151936, max_position_embeddings=40960,
        tie_word_embeddings=False, dtype="bfloat16",
    )  # fmt: skip


def test_estimates_of_a_large_model(h200):
    plan = planned(shape_of_qwen3_8b(), GPU, "thorough")
    assert plan.parameters == 8_190_735_360  # of the published checkpoint
    weights = 2 * plan.parameters / 2**30
    assert weights < plan.peak_gib < 80
    assert 60 < sum(vars(plan.seconds).values()) < 7200
    assert "8.2 billion, weights in bfloat16" in str(plan)
    changes = {"stage2.lora_rank": 0, "stage2.lora_scale": 1.0}
    whole = planned(shape_of_qwen3_8b(), GPU, "thorough", changes=changes, dtype="float32")
    assert whole.peak_gib > 16 * plan.parameters / 2**30
    lora = planned(shape_of_qwen3_8b(), GPU, "thorough", changes={"stage2.lora_scale": 1.0})
    assert whole.seconds.stage2 > lora.seconds.stage2
    # A scale that is to be found takes forwards of its own.
    assert plan.seconds.stage2 > lora.seconds.stage2
    # Twice the length costs more than twice: attention is quadratic.
    longer = planned(shape_of_qwen3_8b(), GPU, "thorough", changes={"stage2.lengths": (40960,)})
    shorter = planned(shape_of_qwen3_8b(), GPU, "thorough", changes={"stage2.lengths": (20480,)})
    assert longer.seconds.stage2 > 2 * shorter.seconds.stage2
    assert longer.peak_gib >= shorter.peak_gib


def test_fsdp_divides_the_weights(h200):
    whole = planned(shape_of_qwen3_8b(), GPU)
    divided = planned(shape_of_qwen3_8b(), GPU, shards=4)
    assert divided.peak_gib < whole.peak_gib
    no_documents = {"stage2.mixture.documents": 0.0}
    apart = [
        planned(shape_of_qwen3_8b(), GPU, shards=shards, changes=no_documents).peak_gib
        for shards in (1, 4)
    ]
    # Embeddings stay whole, a layer is gathered, and a quarter of the rest is held.
    layers = 2 * (whole.parameters - 2 * 151936 * 4096) / 2**30
    assert apart[0] - apart[1] == pytest.approx((0.75 - 1 / 36) * layers, rel=1e-3)
    assert "at the peak in each of 4 processes" in str(divided)
    assert "processes" not in str(whole)


def test_experts_are_counted_by_use(h200):
    """A token is computed by two of four experts, while all of them are in memory."""
    used = planned(
        tiny_config("qwen3_moe", hidden_size=512, moe_intermediate_size=2048), GPU, "thorough"
    )
    config = tiny_config(
        "qwen3_moe", hidden_size=512, moe_intermediate_size=2048, num_experts_per_tok=4
    )
    every = planned(config, GPU, "thorough")
    assert used.parameters == every.parameters
    assert used.seconds.stage2 < every.seconds.stage2


def test_keeping_no_states_saves_memory(h200):
    settings = choose_settings(shape_of_qwen3_8b(), GPU, {"effort": "standard"})
    settings = change_settings(settings, {"stage1.steps": 100, "stage2.steps": 0})
    layerwise = replace(settings, stage1=replace(settings.stage1, steps_per_sequence=1))
    kept, passing = (
        make_plan("m", shape_of_qwen3_8b(), each, device=GPU) for each in (settings, layerwise)
    )
    assert passing.peak_gib < kept.peak_gib
    untrained = replace(settings, stage1=replace(settings.stage1, steps=0))
    assert make_plan("m", shape_of_qwen3_8b(), untrained, device=GPU).peak_gib < kept.peak_gib


def test_given_settings_take_no_longest_length():
    config = tiny_config()
    settings = choose_settings(config, CPU, {"effort": "quick"})
    assert choose_settings(config, CPU, {"settings": settings, "changes": {"seed": 3}}).seed == 3
    with pytest.raises(RTPurboError, match="max_length has no effect on given settings"):
        choose_settings(config, CPU, {"settings": settings, "max_length": 2048})


def test_lengths_follow_a_window_that_is_changed():
    config = tiny_config(context=32768)
    wide = choose_settings(
        config, CPU, {"effort": "quick", "changes": {"attention.sliding_window": 8192}}
    )
    assert wide.stage2.lengths == (16384,)
    narrow = {"attention.sliding_window": 32, "attention.block_size": 16}
    assert choose_settings(config, CPU, {"effort": "quick", "changes": narrow}).stage1.lengths == (
        64,
    )


def test_changes_to_a_stage_2_that_is_left_out_are_refused(tmp_path):
    tiny_config(context=8192).save_pretrained(tmp_path)
    arguments = {"effort": "standard", "device": "cpu"}
    with pytest.raises(
        RTPurboError, match=r"stage2\.lengths has no effect.*add --stage2-steps 100"
    ):
        plan_conversion(str(tmp_path), changes={"stage2.lengths": (4096,)}, **arguments)
    changes = {"stage2.lengths": (4096,), "stage2.steps": 3}
    assert plan_conversion(str(tmp_path), changes=changes, **arguments).settings.stage2.steps == 3


@pytest.mark.parametrize(("effort", "steps"), [("quick", 8), ("standard", 100), ("thorough", 200)])
def test_stage_2_alone_has_steps_at_every_effort(effort, steps):
    settings = choose_settings(tiny_config(), CPU, {"effort": effort})
    assert with_stage2(settings).stage2.steps == steps

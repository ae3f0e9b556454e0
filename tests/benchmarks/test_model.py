import pytest
import torch

from rtpurbo.benchmarks import geometries
from rtpurbo.benchmarks.geometries import build_model, spread_head_map
from rtpurbo.benchmarks.model import bench_model
from rtpurbo.benchmarks.model_case import ModelCase
from rtpurbo.config import AttentionRule
from rtpurbo.errors import RTPurboError
from tests.benchmarks.support import CPU, session

RULE = AttentionRule(
    sliding_window=32, retrieval_window=16, block_size=16, query_block_size=32,
    prefill_mode="row_peak",
)  # fmt: skip
SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    monkeypatch.setitem(geometries.GEOMETRIES, "tiny", ("qwen3", SIZES))
    monkeypatch.setitem(geometries.GEOMETRIES, "tiny-moe", ("qwen3_moe", {**SIZES, **experts}))


def run(phase, geometry="tiny", length=180, **options):
    made = session(repeats=3, **options)
    densities = {"model-decode": 0.2, "model-prefill": 0.6}
    bench_model(made, geometry, {phase: RULE}, [length], densities, [2], torch.float32, layers=2)
    return made


@pytest.mark.parametrize("geometry", ["tiny", "tiny-moe"])
def test_decoding(geometry):
    made = run("model-decode", geometry)
    assert not made.results.errors
    dense, sparse = made.results.records
    assert (dense.implementation, dense.density) == ("sdpa-flash", 1)
    assert dense.note in ("query heads folded into rows", "KV heads shared")
    assert sparse.implementation == "rtpurbo"
    assert 0.15 < sparse.density < 0.4
    assert (sparse.batch_size, sparse.context_length, sparse.model) == (
        2,
        180,
        f"{geometry}, 2 layers",
    )
    assert sparse.num_retrieval_heads == 1
    assert "forced" in sparse.note


def test_a_prompt():
    made = run("model-prefill", length=144)
    assert not made.results.errors
    records = {record.implementation: record for record in made.results.records}
    assert set(records) == {"sdpa-flash", "rtpurbo-dense-retrieval", "rtpurbo"}
    assert records["rtpurbo"].density == pytest.approx(0.6, abs=0.1)
    assert {record.batch_size for record in records.values()} == {1}


def test_logits_that_are_not_finite_get_no_figure(monkeypatch):
    real = ModelCase.forward
    monkeypatch.setattr(ModelCase, "forward", lambda *args: real(*args) * torch.nan)
    made = run("model-prefill", wanted=("rtpurbo-dense-retrieval",))
    assert not made.results.records
    assert "the logits are not finite" in made.results.errors[0]


def test_a_dense_step_computes_the_logits_of_the_model():
    from transformers import DynamicCache

    from rtpurbo.benchmarks.dense_model import attending, full_cache
    from rtpurbo.benchmarks.sdpa import step_attentions

    dense = build_model("tiny", None, torch.float32, CPU)
    cache = full_cache(dense, 20, 1)
    usual = DynamicCache()
    for number, layer in enumerate(cache.layers):
        usual.update(layer.keys[:, :, :-1].clone(), layer.values[:, :, :-1].clone(), number)
    ids, positions = torch.tensor([[5]]), torch.tensor([[19]])
    with torch.no_grad():
        expected = dense(ids, position_ids=positions, past_key_values=usual).logits
        for attend in step_attentions("sdpa-flash").values():
            with attending(dense, attend):
                logits = dense(ids, position_ids=positions, past_key_values=cache).logits
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


def test_the_head_map_is_spread_over_layers_and_the_same_each_time():
    config = build_model("tiny", 1, torch.float32, CPU).config
    config.num_hidden_layers, config.num_attention_heads = 36, 32
    head_map = spread_head_map(config, 0.15)
    assert head_map.num_retrieval_heads == round(0.15 * 36 * 32)
    assert {len(heads) for heads in head_map.retrieval_heads} == {4, 5}
    assert head_map == spread_head_map(config, 0.15)
    assert head_map != spread_head_map(config, 0.15, seed=1)


@pytest.mark.parametrize("name", ["qwen3-8b", "qwen3-30b-a3b", "smollm2-135m"])
def test_published_geometries_can_be_made(name):
    with torch.device("meta"):
        made = build_model(name, 2, torch.bfloat16, torch.device("meta"))
    assert made.config.num_hidden_layers == 2
    assert made.config.head_dim in (64, 128)
    theta = geometries.GEOMETRIES[name][1]["rope_theta"]
    assert made.config.rope_parameters["rope_theta"] == theta


def test_an_unknown_geometry_is_refused():
    with pytest.raises(RTPurboError, match="no geometry 'giant'"):
        build_model("giant", None, torch.float32, CPU)

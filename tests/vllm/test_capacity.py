"""The capacity equals the planner's, and exceeds the dense model's."""

import pytest
import torch
from prometheus_client import REGISTRY

from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.serving.capacity import capacity_of
from rtpurbo.serving.vllm.layout import dense_capacity, plan_cache
from rtpurbo.serving.vllm.rank_heads import TokenBytes
from tests.vllm.checkpoints import save_checkpoint
from tests.vllm.engines import running, scheduler

pytestmark = pytest.mark.vllm

MEMORY = 2**30
# Long contexts, as random weights can have any.
CONTEXT, IN_FLIGHT = 8192, 512
LAYERS = ((1,), (), (4, 5), (), (), (6,), (), ())


def held_by(checkpoint, **options):
    """Tokens that vLLM says its cache holds, and its blocks."""
    with running(
        checkpoint, max_model_len=CONTEXT, max_num_batched_tokens=IN_FLIGHT, **options
    ) as llm:
        cache = llm.llm_engine.vllm_config.cache_config
        return cache.kv_cache_size_tokens, scheduler(llm).kv_cache_config.num_blocks


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    rule = {"sliding_window": 1024}
    return save_checkpoint(
        tmp_path_factory.mktemp("long"),
        layers=LAYERS,
        rule=rule,
        max_position_embeddings=CONTEXT,
    )


def test_the_capacity_equals_the_prediction(checkpoint):
    tokens, blocks = held_by(checkpoint)
    config = ArtifactConfig.read(checkpoint).config
    plan = plan_cache(config, TokenBytes.of(config, 32, 4), tokens=CONTEXT, in_flight=IN_FLIGHT)
    assert blocks == MEMORY // plan.block_bytes
    assert abs(tokens / plan.capacity(MEMORY, CONTEXT, IN_FLIGHT) - 1) < 0.001
    predicted = capacity_of(checkpoint, MEMORY, in_flight=IN_FLIGHT, dtype="float32")
    assert abs(tokens / predicted.tokens - 1) < 0.001


def test_dense_queries_at_the_end_of_prompts_cost_one_prompt(tmp_path):
    rule = {"sliding_window": 1024, "dense_prompt_queries": 64}
    checkpoint = save_checkpoint(
        tmp_path, layers=LAYERS, rule=rule, max_position_embeddings=CONTEXT
    )
    tokens, blocks = held_by(checkpoint)
    config = ArtifactConfig.read(checkpoint).config
    plan = plan_cache(config, TokenBytes.of(config, 32, 4), tokens=CONTEXT, in_flight=IN_FLIGHT)
    assert blocks == MEMORY // plan.block_bytes
    # vLLM reports what fits if all requests read their prompts at once.
    assert tokens == int(blocks / plan.blocks_per_request(CONTEXT, IN_FLIGHT) * CONTEXT)
    metrics = {sample.name: sample.value for sample in samples()}
    fits = plan.capacity(MEMORY, CONTEXT, IN_FLIGHT)
    assert metrics["rtpurbo:cache_tokens"] == fits > 1.5 * tokens
    assert metrics["rtpurbo:dense_cache_tokens"] == pytest.approx(fits_dense(config), rel=0.001)


def samples():
    for metric in REGISTRY.collect():
        yield from metric.samples


def fits_dense(config):
    token_bytes = TokenBytes.of(config, 32, 4)
    return dense_capacity(config, token_bytes, MEMORY, tokens=CONTEXT, in_flight=IN_FLIGHT)


def test_layers_with_a_window_of_their_own(tmp_path):
    rule = {"sliding_window": 1024}
    checkpoint = save_checkpoint(
        tmp_path, "gemma3_text", rule=rule, max_position_embeddings=CONTEXT, sliding_window=512
    )
    tokens, _ = held_by(checkpoint)
    predicted = capacity_of(checkpoint, MEMORY, in_flight=IN_FLIGHT, dtype="float32")
    assert abs(tokens / predicted.tokens - 1) < 0.001
    dense, _ = held_by(checkpoint.parent / "base")
    print(f"sparse {tokens}, dense {dense}, predicted {predicted}")
    assert tokens / dense > 1


def test_the_gain_over_the_dense_model_equals_the_prediction(checkpoint):
    predicted = capacity_of(checkpoint, MEMORY, in_flight=IN_FLIGHT, dtype="float32")
    sparse, _ = held_by(checkpoint)
    dense, _ = held_by(checkpoint.parent / "base")
    gain = sparse / dense
    print(f"sparse {sparse}, dense {dense}, gain {gain:.3f}")
    assert abs(gain / (predicted.tokens / predicted.dense_tokens) - 1) < 0.05
    assert gain > 2


def test_the_blocks_of_a_request_stay_within_the_plan(checkpoint):
    """A pool of just the blocks that the plan grants two requests serves two at a time."""
    from tests.vllm.checkpoints import random_prompts
    from tests.vllm.engines import free_blocks, greedy

    config = ArtifactConfig.read(checkpoint).config
    plan = plan_cache(config, TokenBytes.of(config, 32, 4), tokens=CONTEXT, in_flight=IN_FLIGHT)
    granted = plan.blocks_per_request(CONTEXT, IN_FLIGHT)
    (prompt,) = random_prompts([4000])
    with running(
        checkpoint,
        max_model_len=CONTEXT,
        max_num_batched_tokens=IN_FLIGHT,
        num_gpu_blocks_override=granted + 1,
    ) as llm:
        engine, free = llm.llm_engine, free_blocks(llm)
        engine.add_request("0", {"prompt_token_ids": prompt}, greedy(20))
        least = free
        while engine.has_unfinished_requests():
            engine.step()
            least = min(least, free_blocks(llm))
        assert free - least <= plan.blocks_per_request(4020, IN_FLIGHT)
        assert free_blocks(llm) == free


def test_bfloat16_keeps_index_keys_in_float16(checkpoint):
    with running(checkpoint, dtype="bfloat16", max_model_len=CONTEXT) as llm:
        context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        pages = context["rtpurbo.0"].pages[0]
        assert pages.keys.dtype == torch.bfloat16
        assert pages.index_keys.dtype == torch.float16
        assert pages.index_keys.shape[1:] == (1, pages.block_size, 8)

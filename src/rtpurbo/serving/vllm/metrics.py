"""Gauges about the cache of a sparse model, in vLLM's `/metrics`."""

from __future__ import annotations

from functools import cache

from prometheus_client import Gauge
from vllm.config import VllmConfig

from rtpurbo.config import RTPurboConfig
from rtpurbo.serving.vllm.caches import plan_of
from rtpurbo.serving.vllm.checkpoint import own_window
from rtpurbo.serving.vllm.layout import CachePlan, dense_capacity


def set_gauges(config: RTPurboConfig, vllm_config: VllmConfig) -> None:
    """Sets the gauges to functions of an engine's configuration, which vLLM completes when the engine starts.

    Args:
        config: configuration of the sparse model.
        vllm_config: configuration of the engine.
    """

    def limits() -> tuple[int, int]:
        return vllm_config.model_config.max_model_len, vllm_config.max_in_flight_tokens

    def memory(plan: CachePlan) -> int:
        # vLLM adds up the blocks of data-parallel engines, but not their tokens.
        reported = vllm_config.cache_config.kv_cache_size_tokens or 0
        blocks = -(-reported * plan.blocks_per_request(*limits()) // limits()[0])
        return blocks * plan.block_bytes

    def tokens() -> int:
        plan, _ = plan_of(config, vllm_config)
        return plan.capacity(memory(plan), *limits())

    def dense_tokens() -> int:
        plan, token_bytes = plan_of(config, vllm_config)
        ranks = vllm_config.parallel_config.tensor_parallel_size
        tokens, in_flight = limits()
        return dense_capacity(
            config,
            token_bytes,
            memory(plan) * ranks,
            tokens=tokens,
            in_flight=in_flight,
            own_window=own_window(vllm_config.model_config.hf_config),
        )

    _gauge("cache_tokens", "Tokens of context that fit in the KV cache.").set_function(tokens)
    _gauge(
        "dense_cache_tokens", "Tokens of context of the dense model that fit in the same memory."
    ).set_function(dense_tokens)


@cache
def _gauge(name: str, text: str) -> Gauge:
    # A name is registered once per process, which may start several engines.
    return Gauge(f"rtpurbo:{name}", text)

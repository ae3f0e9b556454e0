"""Gauges about the cache of a sparse model, in vLLM's `/metrics`."""

from __future__ import annotations

from functools import cache, lru_cache

from prometheus_client import Gauge
from vllm.config import VllmConfig

from rtpurbo.config import RTPurboConfig
from rtpurbo.serving.vllm.caches import plan_of
from rtpurbo.serving.vllm.checkpoint import own_window
from rtpurbo.serving.vllm.layout import dense_capacity


def set_gauges(config: RTPurboConfig, vllm_config: VllmConfig) -> None:
    """Sets the gauges to functions of an engine's configuration, which vLLM completes when the engine starts.

    Args:
        config: configuration of the sparse model.
        vllm_config: configuration of the engine.
    """

    @lru_cache(maxsize=1)
    def tokens_that_fit(longest: int, in_flight: int, reported: int) -> tuple[int, int]:
        """Tokens of the sparse and of the dense model, from the tokens that vLLM reports."""
        plan, token_bytes = plan_of(config, vllm_config)
        # vLLM adds up the blocks of data-parallel engines, but not their tokens.
        blocks = -(-reported * plan.blocks_per_request(longest, in_flight) // longest)
        memory = blocks * plan.block_bytes
        dense = dense_capacity(
            config,
            token_bytes,
            memory * vllm_config.parallel_config.tensor_parallel_size,
            tokens=longest,
            in_flight=in_flight,
            own_window=own_window(vllm_config.model_config.hf_config),
        )
        return plan.capacity(memory, longest, in_flight), dense

    def current() -> tuple[int, int]:
        return tokens_that_fit(
            vllm_config.model_config.max_model_len,
            vllm_config.max_in_flight_tokens,
            vllm_config.cache_config.kv_cache_size_tokens or 0,
        )

    _gauge("cache_tokens", "Tokens of context that fit in the KV cache.").set_function(
        lambda: current()[0]
    )
    _gauge(
        "dense_cache_tokens", "Tokens of context of the dense model that fit in the same memory."
    ).set_function(lambda: current()[1])


@cache
def _gauge(name: str, text: str) -> Gauge:
    # A name is registered once per process, which may start several engines.
    return Gauge(f"rtpurbo:{name}", text)

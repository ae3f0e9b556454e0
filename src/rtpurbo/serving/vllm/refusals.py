"""Settings of vLLM that sparse models do not support, checked before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
import vllm
from vllm.config import VllmConfig
from vllm.platforms import current_platform

from rtpurbo.errors import RTPurboError
from rtpurbo.ops.triton.heads import MAX_HEAD_DIM, supports_head_dim
from rtpurbo.serving.vllm.checkpoint import read_config
from rtpurbo.serving.vllm.metrics import set_gauges
from rtpurbo.serving.vllm.rank_heads import FLOAT8_CACHE_DTYPES, heads_of_rank
from rtpurbo.serving.vllm.versions import check_version


def check(config: VllmConfig) -> None:
    """Rejects unsupported settings and checkpoints, and adds what the model's cache holds to vLLM's metrics.

    Raises:
        RTPurboError: the version of vLLM, the checkpoint or a setting is not supported.
    """
    check_version(vllm.__version__)
    checkpoint = read_config(config.model_config.hf_config)
    heads_of_rank(checkpoint.head_map, 0, config.parallel_config.tensor_parallel_size)
    if config.cache_config.cache_dtype == "auto" and _cache_scheme(config):
        # vLLM does so too, but only when it makes the layers.
        config.cache_config.cache_dtype = "fp8"
    for reason in refusals(config):
        raise RTPurboError(reason)
    set_gauges(checkpoint, config)


def refusals(config: VllmConfig) -> Iterator[str]:
    """Yields the reasons for which a sparse model cannot be served with these settings."""
    parallel, cache = config.parallel_config, config.cache_config
    if not (current_platform.is_cuda() or current_platform.is_cpu()):
        yield "sparse models are served on NVIDIA GPUs and on CPUs: choose such a machine."
    head_dim, dtype = config.model_config.get_head_size(), config.model_config.dtype
    assert isinstance(dtype, torch.dtype)
    if current_platform.is_cuda() and not supports_head_dim(head_dim, dtype):
        yield (
            f"the kernels take heads of up to {MAX_HEAD_DIM} dimensions in multiples of 16 "
            f"bytes, but the model's have {head_dim}: serve it with transformers."
        )
    if config.model_config.runner_type != "generate":
        yield "sparse models generate text and give no embeddings: leave out --runner."
    speculative = config.speculative_config
    if speculative is not None and speculative.method != "ngram":
        yield (
            f"speculative decoding by '{speculative.method}' needs a cache for the drafts, which the plan of the "
            "sparse model's cache does not contain: choose the method 'ngram', or leave out --speculative-config."
        )
    if config.lora_config is not None:
        yield (
            "LoRA adapters change the queries and keys that the index was trained on: leave out "
            "--enable-lora; an export has the LoRA of stage 2 merged already."
        )
    if parallel.pipeline_parallel_size > 1:
        yield (
            "the caches of all layers share blocks on one device, which excludes pipeline parallelism: "
            "leave out --pipeline-parallel-size and choose --tensor-parallel-size."
        )
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        yield (
            "a query selects among all keys of its request, so a context is not divided among ranks: "
            "leave out context parallelism."
        )
    if parallel.enable_dbo:
        yield (
            "the decode kernels share one workspace, so batches do not overlap: leave out --enable-dbo."
        )
    if config.kv_transfer_config is not None or cache.kv_offloading_size is not None:
        yield (
            "windowed heads keep a part of a request's blocks only, which connectors do not know: leave "
            "out --kv-transfer-config and --kv-offloading-size."
        )
    yield from _cache_refusals(config)
    yield from _chunk_refusals(config)
    if config.scheduler_config.disable_hybrid_kv_cache_manager:
        yield (
            "full and windowed KV heads have caches of different sizes: leave out "
            "--disable-hybrid-kv-cache-manager."
        )
    if os.environ.get("VLLM_KV_CACHE_LAYOUT"):
        yield "sparse models choose the layout of their cache: unset VLLM_KV_CACHE_LAYOUT."
    if cache.block_size is not None and cache.block_size % 16:
        yield (
            f"blocks of {cache.block_size} tokens do not fit the kernels: choose a multiple of 16 "
            "as --block-size, or leave it out."
        )


def _cache_refusals(config: VllmConfig) -> Iterator[str]:
    """Yields the reasons against the dtype of the cache."""
    cache = config.cache_config
    if cache.cache_dtype == "auto":
        return
    if cache.cache_dtype not in FLOAT8_CACHE_DTYPES:
        yield (
            "the kernels read keys and values in the model's dtype or as fp8 (e4m3): leave out "
            f"--kv-cache-dtype {cache.cache_dtype}, or choose fp8."
        )
    if current_platform.is_cuda() and not current_platform.has_device_capability(89):
        yield (
            "fp8 needs a GPU of compute capability 8.9 or higher: leave out --kv-cache-dtype "
            f"{cache.cache_dtype}."
        )
    if cache.kv_cache_dtype_skip_layers:
        yield (
            "the layers of a sparse model share blocks, so all of them are fp8 or none is: leave out "
            "--kv-cache-dtype-skip-layers."
        )
    strategy = _cache_scheme(config).get("strategy", "tensor")
    if strategy != "tensor":
        yield (
            f"the checkpoint's cache scales have strategy '{strategy}', but one scale per layer "
            "('tensor') is supported: remove kv_cache_scheme from its config.json for a cache in the model's dtype."
        )


def _chunk_refusals(config: VllmConfig) -> Iterator[str]:
    """Yields the reasons against chunks of single tokens of prompts.

    Steps of single tokens may be CUDA graphs, in which no heavy hitters are chosen.
    """
    rule = read_config(config.model_config.hf_config).attention
    scheduler = config.scheduler_config
    if not rule.num_heavy_hitters:
        return
    if (
        scheduler.max_num_batched_tokens <= scheduler.max_num_seqs
        or scheduler.long_prefill_token_threshold == 1
    ):
        yield (
            "the last queries of a prompt choose its heavy hitters, so prompts cannot be read token by token: choose "
            f"--max-num-batched-tokens above --max-num-seqs ({scheduler.max_num_seqs}), and leave out "
            "--long-prefill-token-threshold 1."
        )


def _cache_scheme(config: VllmConfig) -> dict[str, Any]:
    """Scheme of compressed-tensors for keys and values in the checkpoint; empty if it has none."""
    quantization = getattr(config.model_config.hf_config, "quantization_config", None)
    scheme = quantization.get("kv_cache_scheme") if isinstance(quantization, dict) else None
    return scheme or {}

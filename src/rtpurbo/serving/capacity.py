"""Context that a server can hold, computed before it starts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtpurbo.models.artifact_config import MODEL_CONFIG_FILE, ArtifactConfig
from rtpurbo.serving.vllm.layout import dense_capacity, plan_cache
from rtpurbo.serving.vllm.rank_heads import TokenBytes

GIB = 2**30

_ELEMENT_BYTES = {"float32": 4, "float": 4, "auto": 2}


@dataclass(frozen=True)
class Capacity:
    """Capacity of a KV cache, in requests of one length.

    Attributes:
        memory: size of the cache in bytes, on each device.
        request_tokens: tokens of a request.
        tokens: tokens of all requests that fit at the same time.
        dense_tokens: `tokens` of the dense model.
    """

    memory: int
    request_tokens: int
    tokens: int
    dense_tokens: int

    def __str__(self) -> str:
        return (
            f"{self.memory / GIB:g} GiB of cache holds {self.tokens:,} tokens of context in requests "
            f"of {self.request_tokens:,}, {self.tokens / self.dense_tokens:.1f} times the dense "
            f"model's {self.dense_tokens:,}."
        )


def capacity_of(
    checkpoint: Path,
    memory: int,
    *,
    in_flight: int,
    max_model_len: int | None = None,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    tensor_parallel_size: int = 1,
) -> Capacity:
    """Computes the capacity of a cache for a checkpoint, as vLLM with rtpurbo lays it out.

    Args:
        checkpoint: folder of an export for vLLM.
        memory: size of the cache in bytes, on each device.
        in_flight: tokens that may be computed before blocks are freed: vLLM's
            `max_num_batched_tokens`, times the batches that run at once.
        max_model_len: tokens of a request; None for the model's context.
        dtype: dtype of the running model; "auto" is one of 16 bits.
        kv_cache_dtype: dtype of keys and values as in vLLM's `--kv-cache-dtype`; "auto" is the model's.
        tensor_parallel_size: devices that share the heads.

    Raises:
        RTPurboError: the folder is no export, or its heads cannot be divided among the devices.
    """
    config = ArtifactConfig.read(checkpoint).config
    model = json.loads((checkpoint / MODEL_CONFIG_FILE).read_text(encoding="utf-8"))
    request = max_model_len or int(model["max_position_embeddings"])
    token_bytes = TokenBytes.of(
        config, _head_dim(model), _ELEMENT_BYTES.get(dtype, 2), kv_cache_dtype
    )
    own_window = model.get("sliding_window")
    plan = plan_cache(
        config,
        token_bytes,
        tokens=request,
        in_flight=in_flight,
        world_size=tensor_parallel_size,
        own_window=own_window,
    )
    # Devices share the heads of a token, so their memory adds up.
    dense = dense_capacity(
        config,
        token_bytes,
        memory * tensor_parallel_size,
        tokens=request,
        in_flight=in_flight,
        own_window=own_window,
    )
    return Capacity(memory, request, plan.capacity(memory, request, in_flight), dense)


def _head_dim(model: dict[str, Any]) -> int:
    return int(model.get("head_dim") or model["hidden_size"] // model["num_attention_heads"])

"""KV cache sizes of an artifact, computed from its files without loading a model."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rtpurbo import strict_json
from rtpurbo.config import DEFAULT_CROP_SLACK, RTPurboConfig
from rtpurbo.models.artifact_config import MODEL_CONFIG_FILE

_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class CacheShape:
    """Sizes of the base model that its cache depends on.

    Attributes:
        head_dim: dimensions of a key and of a value.
        dtype: data type of the stored weights, which the cache shares unless loaded otherwise.
        layer_window: window in tokens of the layers that are not converted.
    """

    head_dim: int
    dtype: str
    layer_window: int | None = None


def read_cache_shape(folder: Path) -> CacheShape | None:
    """Reads the base model's sizes from an artifact's or an export's config.json.

    Returns:
        The sizes; None if the folder has no such file or the file does not state them.
    """
    try:
        data = strict_json.read(folder / MODEL_CONFIG_FILE)
    except (OSError, ValueError):
        return None
    config = data.get("base_config", data) if isinstance(data, dict) else None
    if isinstance(config, dict) and isinstance(config.get("text_config"), dict):
        config = {"dtype": config.get("dtype"), **config["text_config"]}
    return _shape(config) if isinstance(config, dict) else None


def _shape(config: dict[str, Any]) -> CacheShape | None:
    heads, hidden = config.get("num_attention_heads"), config.get("hidden_size")
    head_dim = config.get("head_dim")
    if head_dim is None and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        head_dim = hidden // heads
    # Latent attention caches something else than keys and values of every head.
    if not isinstance(head_dim, int) or config.get("kv_lora_rank") is not None:
        return None
    dtype, window = config.get("dtype") or config.get("torch_dtype"), config.get("sliding_window")
    return CacheShape(
        head_dim,
        dtype if dtype in _ELEMENT_BYTES else "bfloat16",
        window if isinstance(window, int) else None,
    )


def stored_tokens(
    config: RTPurboConfig, length: int, layer_window: int | None = None
) -> tuple[int, int]:
    """Returns tokens times KV heads in the sparse and in the dense cache of one sequence.

    Windowed KV heads have all their slots from the start.

    Args:
        config: the sparse model.
        length: tokens of context.
        layer_window: window of the layers that are not converted; None: the whole context.
    """
    head_map, rule = config.head_map, config.attention
    windowed = rule.num_sink_tokens + rule.sliding_window + DEFAULT_CROP_SLACK
    sparse = dense = 0
    for layer, retrieval_heads in enumerate(head_map.retrieval_heads):
        heads = head_map.num_key_value_heads
        if retrieval_heads is None:
            kept = heads * min(length, layer_window or length)
            sparse, dense = sparse + kept, dense + kept
            continue
        full = len(head_map.full_key_value_heads(layer))
        sparse += full * length + (heads - full) * windowed
        dense += heads * length
    return sparse, dense


def cache_sizes(config: RTPurboConfig, shape: CacheShape, length: int) -> tuple[int, int]:
    """Returns bytes of the sparse cache, index keys included, and of the dense one.

    Positions and slot numbers, about ten bytes for each slot of a window, are left out.

    Args:
        config: the sparse model.
        shape: sizes of the base model.
        length: tokens of context.
    """
    sparse, dense = stored_tokens(config, length, shape.layer_window)
    element = _ELEMENT_BYTES[shape.dtype]
    token = 2 * shape.head_dim * element
    head_map, indexer = config.head_map, config.indexer
    keys = (
        head_map.num_full_key_value_heads if indexer.shared_keys else head_map.num_retrieval_heads
    )
    index_element = 1 if config.attention.index_storage == "float8" else element
    index = keys * indexer.index_dim * index_element * length
    return sparse * token + index, dense * token

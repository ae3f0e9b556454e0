"""KV cache sizes of an artifact, computed from its files without loading a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rtpurbo import strict_json
from rtpurbo.config import DEFAULT_CROP_SLACK, RTPurboConfig
from rtpurbo.models.artifact_config import MODEL_CONFIG_FILE
from rtpurbo.models.families import WITHOUT_ATTENTION

_ELEMENT_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True)
class CacheShape:
    """Sizes of the base model that its cache depends on.

    Attributes:
        head_dim: dimensions of a key and of a value.
        dtype: data type of the stored weights, which the cache shares unless loaded otherwise.
        layer_window: window in tokens of the layers that are not converted.
        num_kv_heads: KV heads of a layer; None if they are not known.
        layer_types: type of each layer; empty if they are not known.
        of_layers: by layer, the sizes that differ there.
    """

    head_dim: int
    dtype: str
    layer_window: int | None = None
    num_kv_heads: int | None = None
    layer_types: Sequence[str] = ()
    of_layers: Mapping[int, Mapping[str, int]] = field(default_factory=dict)

    def head_dim_of(self, layer: int) -> int:
        """Returns the dimensions of a key and of a value in a layer."""
        return self.of_layers.get(layer, {}).get("head_dim", self.head_dim)

    def num_kv_heads_of(self, layer: int) -> int | None:
        """Returns the KV heads of a layer; None if they are not known."""
        return self.of_layers.get(layer, {}).get("num_key_value_heads", self.num_kv_heads)


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
    dtype = config.get("dtype") or config.get("torch_dtype")
    window = config.get("sliding_window") or config.get("attention_chunk_size")
    layer_types = config.get("layer_types") or config.get("layers_block_type")
    return CacheShape(
        head_dim,
        dtype if dtype in _ELEMENT_BYTES else "bfloat16",
        window if isinstance(window, int) else None,
        _sizes(config).get("num_key_value_heads"),
        tuple(map(str, layer_types)) if isinstance(layer_types, list) else (),
        _sizes_by_layer(config.get("per_layer_config")),
    )


def _sizes_by_layer(of_layers: Any) -> dict[int, dict[str, int]]:
    """Returns the sizes of single layers that a configuration of transformers 5.20 or newer states."""
    if not isinstance(of_layers, dict):
        return {}
    return {
        int(layer): _sizes(changes)
        for layer, changes in of_layers.items()
        if layer.isdecimal() and isinstance(changes, dict)
    }


def _sizes(config: dict[str, Any]) -> dict[str, int]:
    names = ("head_dim", "num_key_value_heads")
    return {name: config[name] for name in names if isinstance(config.get(name), int)}


def stored_tokens(config: RTPurboConfig, length: int) -> tuple[int, int]:
    """Returns tokens times KV heads in the sparse and in the dense cache of one sequence of some length.

    Windowed KV heads have all their slots from the start.
    """
    by_layer = [
        _tokens_of_layer(config, layer, length)
        for layer in range(len(config.head_map.retrieval_heads))
    ]
    return sum(sparse for sparse, _ in by_layer), sum(dense for _, dense in by_layer)


def _tokens_of_layer(
    config: RTPurboConfig, layer: int, length: int, shape: CacheShape | None = None
) -> tuple[int, int]:
    """Returns tokens times KV heads in the sparse and in the dense cache of a layer."""
    head_map, rule = config.head_map, config.attention
    heads = head_map.num_kv_heads(layer)
    if head_map.retrieval_heads[layer] is None:
        if shape is not None:
            if set(shape.layer_types[layer : layer + 1]) & set(WITHOUT_ATTENTION):
                return 0, 0
            heads = shape.num_kv_heads_of(layer) or heads
            length = min(length, shape.layer_window or length)
        return heads * length, heads * length
    full = len(head_map.full_key_value_heads(layer))
    windowed = rule.num_sink_tokens + rule.sliding_window + DEFAULT_CROP_SLACK
    return full * length + (heads - full) * windowed, heads * length


def cache_sizes(config: RTPurboConfig, shape: CacheShape, length: int) -> tuple[int, int]:
    """Returns bytes of the sparse cache, index keys included, and of the dense one.

    Positions and slot numbers, about ten bytes for each slot of a window, are left out.
    """
    element = _ELEMENT_BYTES[shape.dtype]
    head_map, indexer = config.head_map, config.indexer
    sparse_bytes = dense_bytes = 0
    for layer in range(len(head_map.retrieval_heads)):
        sparse, dense = _tokens_of_layer(config, layer, length, shape)
        token = 2 * shape.head_dim_of(layer) * element
        sparse_bytes, dense_bytes = sparse_bytes + sparse * token, dense_bytes + dense * token
    keys = (
        head_map.num_full_key_value_heads if indexer.shared_keys else head_map.num_retrieval_heads
    )
    index_element = 1 if config.attention.index_storage == "float8" else element
    return sparse_bytes + keys * indexer.index_dim * index_element * length, dense_bytes

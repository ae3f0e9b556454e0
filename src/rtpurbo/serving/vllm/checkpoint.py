"""Entries of an exported checkpoint's config.json, and their validation."""

from __future__ import annotations

from typing import Any

from rtpurbo.config import RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.models.architecture import convertible_layers, convertible_shapes, layer_types
from rtpurbo.models.artifact_config import CHECKPOINT_KEY, FORMAT_VERSION, MODEL_CONFIG_FILE
from rtpurbo.models.sparsify import check_head_map
from rtpurbo.serving.vllm.layout import BLOCK_SIZES, smallest_window

EXPORT_AGAIN = "export the artifact again (rtpurbo export --to vllm)"

PROMPT_LENGTHS_KEY = "rswa_window"
"""vLLM passes the lengths of prompts to a model only if its configuration has this entry.

They are needed because prompts are read dense and answers sparse.
"""

SERVED_PREFILL_MODES = ("dense", "top_p")
"""Other modes share block lists between the queries of a block, but vLLM splits prompts at any token."""


def read_config(hf_config: Any) -> RTPurboConfig:
    """Reads head map, attention rule and indexer settings of a checkpoint.

    Args:
        hf_config: transformers configuration of the checkpoint.

    Raises:
        RTPurboError: they are missing, have another format version or do not fit the model, or a setting
            is not supported on vLLM.
    """
    entry = getattr(hf_config, CHECKPOINT_KEY, None)
    if not isinstance(entry, dict) or getattr(hf_config, PROMPT_LENGTHS_KEY, None) is None:
        raise RTPurboError(
            f"config.json names an rtpurbo architecture but lacks the entry '{CHECKPOINT_KEY}' or "
            f"'{PROMPT_LENGTHS_KEY}': {EXPORT_AGAIN}."
        )
    version = entry.get("format_version")
    if version != FORMAT_VERSION:
        raise RTPurboError(
            f"the checkpoint has format version {version}, but this rtpurbo reads "
            f"{FORMAT_VERSION}: {EXPORT_AGAIN}, or install the rtpurbo that wrote it."
        )
    config = RTPurboConfig.from_dict(entry)
    check_head_map(config.head_map, convertible_shapes(hf_config), hf_config.num_hidden_layers)
    check_served(config, MODEL_CONFIG_FILE)
    _check_model(hf_config, config)
    return config


def check_served(config: RTPurboConfig, file: str) -> None:
    """Rejects head maps and attention rules that the plugin does not support.

    Args:
        config: configuration of an artifact or a checkpoint.
        file: name of the file with its settings, for error messages.

    Raises:
        RTPurboError: some layers have another number of heads, or a setting of the rule is not supported.
    """
    elsewhere = "serve it with transformers (rtpurbo export --to transformers)"
    if not config.head_map.is_uniform:
        raise RTPurboError(
            "the layers of the model differ in their numbers of heads, which is not supported on vLLM: "
            f"{elsewhere}."
        )
    if config.attention.prefill_mode not in SERVED_PREFILL_MODES:
        raise RTPurboError(
            f"prefill_mode '{config.attention.prefill_mode}' shares block lists between queries, but "
            f"vLLM splits prompts at any token: change it to 'dense' in {file}, or {elsewhere}."
        )
    window = smallest_window(config.attention, min(BLOCK_SIZES))
    if config.attention.num_heavy_hitters and config.attention.sliding_window < window:
        raise RTPurboError(
            f"sliding_window is {config.attention.sliding_window}, but num_heavy_hitters on vLLM needs one of at least "
            f"{window}: set num_heavy_hitters to 0 in {file}, or {elsewhere}."
        )


def own_window(hf_config: Any) -> int | None:
    """Sliding window of the layers that are not converted; None if all are."""
    return None if all(convertible_layers(hf_config)) else int(hf_config.sliding_window)


def _check_model(hf_config: Any, config: RTPurboConfig) -> None:
    converted = convertible_layers(hf_config)
    kinds = {
        kind
        for kind, is_sparse in zip(layer_types(hf_config), converted, strict=True)
        if not is_sparse
    }
    if kinds - {"sliding_attention"}:
        raise RTPurboError(
            f"the model has layers of the type {sorted(kinds)}, but only layers with full attention or a sliding "
            "window are supported on vLLM: serve it with transformers (rtpurbo export --to transformers)."
        )
    if config.indexer.min_wavelength is None and config.indexer.index_space == "low_frequency":
        raise RTPurboError(f"the checkpoint lacks min_wavelength: {EXPORT_AGAIN}.")
    for name in ("llama_4_scaling", "dual_chunk_attention_config"):
        if getattr(hf_config, name, None) is not None:
            raise RTPurboError(
                f"models with {name} are not supported on vLLM: serve them with transformers."
            )

"""What an exported checkpoint says in its config.json, checked before anything is built from it."""

from __future__ import annotations

from typing import Any

from rtpurbo.config import RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.models.artifact_config import CHECKPOINT_KEY, FORMAT_VERSION
from rtpurbo.models.sparsify import check_head_map

EXPORT_AGAIN = "export the artifact again (rtpurbo export --to vllm)"

PROMPT_LENGTHS_KEY = "rswa_window"
"""vLLM tells a model where each prompt ends only if its configuration has this entry.

Without it a row could not tell whether it selects: prompts are read dense and answers sparse.
"""

SERVED_PREFILL_MODES = ("dense", "top_p")
"""Other modes share lists of blocks between rows, and vLLM cuts prompts where it likes."""


def read_config(hf_config: Any) -> RTPurboConfig:
    """Head map, rule and indexer settings of a checkpoint.

    Args:
        hf_config: the checkpoint's transformers configuration.

    Raises:
        RTPurboError: they are missing, of another format, or do not fit the model; or the model
            works in a way that is not served.
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
    check_head_map(hf_config, config.head_map)
    _refuse_what_is_not_served(hf_config, config)
    return config


def _refuse_what_is_not_served(hf_config: Any, config: RTPurboConfig) -> None:
    if None in config.head_map.retrieval_heads:
        raise RTPurboError(
            "some layers of the model keep a sliding window of their own, which is not served on "
            "vLLM: serve it with transformers (rtpurbo export --to transformers)."
        )
    if config.attention.prefill_mode not in SERVED_PREFILL_MODES:
        raise RTPurboError(
            f"prefill_mode '{config.attention.prefill_mode}' shares lists of blocks between rows, "
            "and vLLM cuts prompts where it likes: change it to 'dense' in config.json."
        )
    if config.indexer.min_wavelength is None and config.indexer.index_space == "low_frequency":
        raise RTPurboError(f"the checkpoint does not tell its min_wavelength: {EXPORT_AGAIN}.")
    for name in ("llama_4_scaling", "dual_chunk_attention_config"):
        if getattr(hf_config, name, None) is not None:
            raise RTPurboError(f"models with {name} are not served on vLLM.")

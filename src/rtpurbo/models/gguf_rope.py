"""Scaled rotary frequencies of a GGUF file, which transformers does not read.

Without them a model with a scaled context loads, and loses the thread in long texts.
"""

from __future__ import annotations

import torch
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from rtpurbo.errors import RTPurboError
from rtpurbo.models.architecture import attention_shapes
from rtpurbo.models.gguf_header import GgufHeader

_LLAMA3_TENSOR = "rope_freqs.weight"
_LONGROPE_TENSOR = "rope_factors_long.weight"
# Llama 3.1 to 3.3 all have these; the file only has the factors that come of them.
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def set_rope_scaling(config: PretrainedConfig, header: GgufHeader) -> None:
    """Sets the `rope_parameters` of a configuration to the scaling that the file describes.

    Raises:
        RTPurboError: the file scales its frequencies in a way that is not supported.
    """
    dimensions = header.hyperparameter("rope.dimension_count")
    head_dim = next(iter(attention_shapes(config).values())).head_dim
    if dimensions not in (None, head_dim):
        raise _unsupported(header, f"{dimensions} of {head_dim} dimensions")
    kind = header.hyperparameter("rope.scaling.type")
    factor = header.hyperparameter("rope.scaling.factor")
    if _LLAMA3_TENSOR in header.tensors:
        _set_llama3(config, header)
    elif kind == "longrope" or _LONGROPE_TENSOR in header.tensors:
        raise _unsupported(header, "longrope")
    elif kind in ("linear", "yarn") and factor:
        scaling = {"rope_type": kind, "factor": float(factor)}
        original = header.hyperparameter("rope.scaling.original_context_length")
        if kind == "yarn" and original:
            scaling["original_max_position_embeddings"] = int(original)
        # Gemma 3 scales only the layers with full attention.
        scaled = config.rope_parameters.get("full_attention", config.rope_parameters)
        scaled.update(scaling)
    elif kind not in (None, "none", "linear"):
        raise _unsupported(header, kind)


def _set_llama3(config: PretrainedConfig, header: GgufHeader) -> None:
    """Sets the scaling of Llama 3 after checking that it gives the factors in the file."""
    factors = torch.from_numpy(header.read_float32(_LLAMA3_TENSOR))
    theta = config.rope_parameters["rope_theta"]
    config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": theta,
        "factor": float(factors.max()),
        **_LLAMA3,
    }
    dimensions = 2 * len(factors)
    unscaled = theta ** -(torch.arange(0, dimensions, 2) / dimensions)
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    if scaled.shape != unscaled.shape or not torch.allclose(scaled, unscaled / factors, rtol=1e-3):
        raise _unsupported(header, "frequencies other than those of Llama 3")


def _unsupported(header: GgufHeader, kind: object) -> RTPurboError:
    return RTPurboError(
        f"the rotary embedding of {header.path} ({kind}) is not supported for GGUF files; use the "
        "model's safetensors files."
    )

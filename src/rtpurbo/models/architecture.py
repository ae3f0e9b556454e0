"""Properties of a decoder's layers from its configuration, before any weights are loaded.

A probe of the loaded model confirms it (`rtpurbo.models.probe`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)

from rtpurbo.errors import RTPurboError
from rtpurbo.models.families import FAMILIES, WITHOUT_ATTENTION

# Layer types of transformers whose attention sees every earlier token; `hybrid` layers have a recurrent
# state beside it.
FULL_ATTENTION = ("full_attention", "hybrid")


def layer_types(config: Any) -> list[str]:
    """Returns the type of each layer of a text decoder, as transformers names it; `shared` if its keys are shared."""
    types = getattr(config, "layer_types", None)
    if types is None:
        kind = "full_attention"
        if getattr(config, "sliding_window", None) is not None:
            kind = "sliding_attention"
        elif getattr(config, "attention_chunk_size", None) is not None:
            kind = "chunked_attention"
        types = [kind] * config.num_hidden_layers
    sharing = getattr(config, "kv_sharing_modes", None) or ()
    if "reuse" not in sharing:
        return list(types)
    return [kind if mode is None else "shared" for kind, mode in zip(types, sharing, strict=True)]


def convertible_layers(config: Any) -> list[bool]:
    """Returns for each layer True if it has full attention and is converted."""
    window = getattr(config, "sliding_window", None)
    is_full = window is None or window_covers_context(config, window)
    return [
        kind in FULL_ATTENTION or (kind == "sliding_attention" and is_full)
        for kind in layer_types(config)
    ]


def takes_packed_documents(config: Any) -> bool:
    """True if every layer separates the documents that are packed into one sequence.

    Sparse layers do. Recurrent states do not, and not every model passes document boundaries to its
    windowed layers.
    """
    types = layer_types(config)
    is_sparse = all(convertible_layers(config)) and "hybrid" not in types
    return is_sparse or config.model_type in FAMILIES


def is_text_part(model_type: str) -> bool:
    """True for the text decoder of a vision-language model that has no class for text alone."""
    return (
        model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and model_type in MODEL_MAPPING_NAMES
        and model_type.endswith("_text")
        and model_type.removesuffix("_text") in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    )


def check_architecture(config: Any) -> None:
    """Refuses a model, or the text decoder of a multimodal one, whose configuration shows that it cannot be sparse.

    Raises:
        RTPurboError: with the reason.
    """
    reason = _refusal(config)
    if reason is not None:
        raise RTPurboError(f"this {config.model_type} model cannot be made sparse: {reason}.")


def _refusal(config: Any) -> str | None:
    kind = config.model_type
    is_encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(
        config, "is_decoder", False
    )
    if is_encoder or getattr(config, "is_encoder_decoder", False):
        return "it has an encoder, and only decoders are supported"
    if config.get_text_config() is not config:
        return (
            "it is multimodal, and only its text decoder can be: pass the checkpoint's name or folder "
            "to rtpurbo.convert, or to rtpurbo.models.base.load_base_model, which load that part"
        )
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not is_text_part(kind):
        return "transformers has no class of a causal language model for it"
    if getattr(config, "num_attention_heads", None) is None:
        return "it has no attention heads"
    bidirectional = getattr(config, "use_bidirectional_attention", None)
    if not getattr(config, "is_causal", True) or bidirectional in (True, "all"):
        return "its attention is not causal (is_causal or use_bidirectional_attention)"
    if getattr(config, "attn_logit_softcapping", None):
        return "it caps its attention logits (attn_logit_softcapping), which is not supported"
    if getattr(config, "kv_lora_rank", None):
        return "it caches a latent instead of keys and values (multi-head latent attention)"
    if getattr(config, "alibi", False):
        return "it biases its attention logits by distance (ALiBi), which is not supported"
    if "shared" in layer_types(config):
        return "some of its layers read the keys and values of others"
    if any(convertible_layers(config)):
        return None
    window = getattr(config, "sliding_window", None)
    if window is not None and set(layer_types(config)) == {"sliding_attention"}:
        return (
            f"every layer already attends to a sliding window of {window} keys, so there is nothing "
            "to make sparse"
        )
    return f"no layer has full attention of its own (layers are {sorted(set(layer_types(config)))})"


@dataclass(frozen=True)
class AttentionShape:
    """Numbers and size of the heads of one layer.

    Attributes:
        num_attention_heads: query heads.
        num_key_value_heads: KV heads.
        head_dim: dimensions of a head.
    """

    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


def attention_shapes(config: Any) -> dict[int, AttentionShape]:
    """Returns the heads of each layer of a text decoder with attention, by layer, as the configuration states them."""
    of_layers = getattr(config, "per_layer_config", None)  # transformers >= 5.20
    shapes = {}
    for layer, kind in enumerate(layer_types(config)):
        if kind in WITHOUT_ATTENTION:
            continue
        own = config if of_layers is None else of_layers[layer]
        listed = getattr(own, "num_attention_heads_per_layer", None)
        heads = own.num_attention_heads if listed is None else listed[layer]
        kv_heads = getattr(own, "num_key_value_heads", None) or heads
        # Older configurations lack a size of heads.
        head_dim = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
        shapes[layer] = AttentionShape(heads, kv_heads, head_dim)
    return shapes


def convertible_shapes(config: Any) -> dict[int, AttentionShape]:
    """Returns the heads of the layers that are converted, by layer."""
    converted = convertible_layers(config)
    return {layer: shape for layer, shape in attention_shapes(config).items() if converted[layer]}


def context_length(config: Any) -> int:
    """Returns the context length of a model, including the extension set in its configuration.

    Checkpoints that are extended by YaRN often keep the context of their training in
    `max_position_embeddings`.
    """
    length = int(config.max_position_embeddings)
    rope = getattr(config, "rope_parameters", None) or {}
    # Some models have one set of parameters for each type of layer.
    for parameters in (rope, rope.get("full_attention")):
        if isinstance(parameters, dict) and parameters.get("rope_type") == "yarn":
            original = parameters.get("original_max_position_embeddings") or length
            length = max(length, int(original * parameters.get("factor", 1.0)))
    return length


def window_covers_context(config: Any, window: int) -> bool:
    """True if a model's own sliding window is as long as its context, and therefore has no effect."""
    return window >= context_length(config)

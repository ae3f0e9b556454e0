"""Sparse versions of vLLM's models, for all supported families."""

from __future__ import annotations

import time
from collections.abc import Iterable
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from vllm.config import CompilationMode, VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.logger import init_logger
from vllm.model_executor.models.gemma3 import Gemma3ForCausalLM
from vllm.model_executor.models.gpt_oss import GptOssForCausalLM
from vllm.model_executor.models.llama import LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_moe import Qwen3MoeForCausalLM
from vllm.model_executor.utils import set_weight_attrs

from rtpurbo.config import RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.models.indexer import TokenIndexer, slow_dimensions
from rtpurbo.serving.vllm.attention import OPERATOR, ServedAttention
from rtpurbo.serving.vllm.caches import make_caches
from rtpurbo.serving.vllm.checkpoint import EXPORT_AGAIN, read_config
from rtpurbo.serving.vllm.prompts import model_state_class
from rtpurbo.serving.vllm.rank_heads import LayerHeads, heads_of_rank
from rtpurbo.serving.vllm.refusals import check

# vLLM shows its own loggers only.
logger = init_logger(f"vllm.{__name__}")


class SparseModelMixin(nn.Module):
    """Mixin that makes a vLLM model sparse; must precede vLLM's class among the bases.

    Args:
        vllm_config: configuration of the engine.
        prefix: prefix of the model's names.
    """

    # vLLM rejects these features because of the flags.
    supports_lora = False
    supports_pp = False

    attention_class = ServedAttention
    attention_name = "self_attn"

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        check(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        make_sparse(self.model, vllm_config, prefix, self.attention_class, self.attention_name)

    @staticmethod
    def get_model_state_cls() -> type:
        """Model state for vLLM's second model runner."""
        return model_state_class()

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads a checkpoint.

        Raises:
            RTPurboError: a tensor of an indexer is missing or has another shape.
        """
        loaded: set[str] = super().load_weights(weights)  # type: ignore[misc]
        for name, _ in self.named_parameters():
            if ".indexer." in name and name not in loaded:
                raise RTPurboError(f"the checkpoint lacks the tensor '{name}': {EXPORT_AGAIN}.")
        return loaded


class RTPurboGemma3ForCausalLM(SparseModelMixin, Gemma3ForCausalLM):
    """Sparse Gemma 3, whose layers with a sliding window keep it."""


class ServedGptOssAttention(ServedAttention):
    """Attention of gpt-oss, whose decoder layers pass the hidden states first."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, positions: Tensor
    ) -> Tensor:
        """Attention block: [T, hidden_size] to [T, hidden_size]."""
        return super().forward(positions, hidden_states)


class RTPurboGptOssForCausalLM(SparseModelMixin, GptOssForCausalLM):
    """Sparse gpt-oss, with learned sinks in every layer; layers with a sliding window keep it."""

    attention_class = ServedGptOssAttention
    attention_name = "attn"


class RTPurboLlamaForCausalLM(SparseModelMixin, LlamaForCausalLM):
    """Sparse Llama."""


class RTPurboMistralForCausalLM(SparseModelMixin, MistralForCausalLM):
    """Sparse Mistral."""


class RTPurboQwen2ForCausalLM(SparseModelMixin, Qwen2ForCausalLM):
    """Sparse Qwen2."""


class RTPurboQwen3ForCausalLM(SparseModelMixin, Qwen3ForCausalLM):
    """Sparse Qwen3."""


class RTPurboQwen3MoeForCausalLM(SparseModelMixin, Qwen3MoeForCausalLM):
    """Sparse Qwen3 with mixtures of experts."""


def make_sparse(
    model: Any,
    vllm_config: VllmConfig,
    prefix: str,
    attention_class: type[ServedAttention],
    attention_name: str,
) -> None:
    """Replaces the attention of every layer in place, and registers the caches with vLLM.

    Args:
        model: decoder of a vLLM model on one rank.
        vllm_config: configuration of the engine.
        prefix: prefix of the model's names.
        attention_class: class of the new attention modules.
        attention_name: name of a decoder layer's attention module.
    """
    hf_config = vllm_config.model_config.hf_config
    config = read_config(hf_config)
    compilation = vllm_config.compilation_config
    rank, world_size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
    heads = heads_of_rank(config.head_map, rank, world_size)
    head_dim = getattr(model.layers[0], attention_name).head_dim
    caches = make_caches(config, heads, head_dim, f"{prefix}rtpurbo", vllm_config)
    features = _feature_dimensions(hf_config, config, head_dim)
    layers = []
    for number, layer in enumerate(model.layers):
        original = getattr(layer, attention_name)
        indexer = None
        if config.head_map.retrieval_heads[number]:
            indexer = _indexer(config, number, rank, heads[number], features)
        # Otherwise vLLM would allocate a cache for it.
        del compilation.static_forward_context[original.attn.layer_name]
        served = attention_class(original, heads[number], config, indexer, number, caches)
        setattr(layer, attention_name, served)
        compilation.static_forward_context[served.name] = served
        layers.append(served)
    caches.when_all_bound(partial(_prepare, layers, vllm_config))
    if compilation.mode == CompilationMode.VLLM_COMPILE and OPERATOR not in (
        compilation.splitting_ops or []
    ):
        compilation.splitting_ops = [*(compilation.splitting_ops or []), OPERATOR]


def _prepare(layers: list[ServedAttention], vllm_config: VllmConfig) -> None:
    """Reads the cache scales and compiles the kernels, once weights and caches are there."""
    for layer in layers:
        layer.bind()
    kernel_layers = [layer for layer in layers if layer.uses_kernels]
    start = time.monotonic()
    for layer in kernel_layers:
        layer.warm_up(vllm_config)
    if kernel_layers:
        logger.info("Compiled the attention kernels in %.1f s.", time.monotonic() - start)


def _feature_dimensions(hf_config: Any, config: RTPurboConfig, head_dim: int) -> list[int]:
    """Dimensions of a head that indexers project, as in `rtpurbo.models.sparsify`."""
    if config.indexer.index_space != "low_frequency":
        return list(range(head_dim))
    assert config.indexer.min_wavelength is not None
    # All supported families use the rotary embedding of Llama, some with parameters by type of layer.
    parameters = hf_config.rope_parameters
    if "full_attention" in parameters:
        hf_config = copy(hf_config)
        hf_config.rope_parameters = parameters["full_attention"]
    inverse = LlamaRotaryEmbedding(hf_config).inv_freq
    frequencies = torch.zeros(head_dim)
    frequencies[: 2 * inverse.numel()] = inverse.repeat(2)
    return slow_dimensions(frequencies, config.indexer.min_wavelength, config.indexer.index_dim)


def _indexer(
    config: RTPurboConfig,
    layer: int,
    rank: int,
    heads: LayerHeads,
    features: list[int],
) -> TokenIndexer:
    """Indexer of a layer's retrieval heads on this rank, which loads its part of the weights."""
    indexer = TokenIndexer(
        config.indexer,
        len(heads.retrieval),
        heads.num_full,
        features,
        device=torch.get_default_device(),
        dtype=torch.get_default_dtype(),
    )
    retrieval = config.head_map.retrieval_heads[layer] or ()
    query_ranks = [head // heads.num_attention_heads for head in retrieval]
    key_ranks = query_ranks
    if config.indexer.shared_keys:
        full = config.head_map.full_key_value_heads(layer)
        key_ranks = [head // heads.num_key_value_heads for head in full]
    for parameter, ranks in ((indexer.query_weight, query_ranks), (indexer.key_weight, key_ranks)):
        mine = [number for number, of_weight in enumerate(ranks) if of_weight == rank]
        loader = partial(_load_part, mine=mine, num_weights=len(ranks))
        set_weight_attrs(parameter, {"weight_loader": loader})
    return indexer


def _load_part(
    parameter: nn.Parameter, loaded: Tensor, *, mine: list[int], num_weights: int
) -> None:
    """Copies the weights of this rank's heads from a layer's [num_weights, index_dim, features]."""
    expected = (num_weights, *parameter.shape[1:])
    if loaded.shape != expected:
        raise RTPurboError(
            f"an indexer weight of the checkpoint is {tuple(loaded.shape)}, expected {expected}: "
            f"{EXPORT_AGAIN}."
        )
    parameter.data.copy_(loaded[mine])

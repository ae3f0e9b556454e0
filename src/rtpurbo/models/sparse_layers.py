"""Sparse layers of a model, and the weights of their indexers."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from rtpurbo.errors import RTPurboError
from rtpurbo.models.sparse_layer import SparseAttention, sparse_layer_of


def check_is_not_wrapped(model: Any) -> None:
    """Refuses a model inside a wrapper, which forwards attributes but does not set them.

    Raises:
        RTPurboError: PEFT, torch.compile or data parallelism wraps it.
    """
    kind = type(model).__name__
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        raise RTPurboError(f"a {kind} wraps the transformers model: pass model.get_base_model().")
    inner = next(
        (name for name in ("_orig_mod", "module") if name in vars(model)["_modules"]), None
    )
    if inner is not None:
        raise RTPurboError(f"a {kind} wraps the transformers model: pass model.{inner}.")


def is_sparse(model: PreTrainedModel) -> bool:
    """True if `sparsify` was applied and not undone."""
    return getattr(model, "rtpurbo_config", None) is not None


def headwise_modules(model: PreTrainedModel) -> list[SparseAttention]:
    """Returns the sparse layers in order.

    Raises:
        RTPurboError: the model is not sparse.
    """
    check_is_not_wrapped(model)
    if not is_sparse(model):
        raise RTPurboError(
            "the model is dense: pass it through rtpurbo.sparsify or rtpurbo.load first."
        )
    found = (sparse_layer_of(module) for module in model.base_model.modules())
    return sorted((layer for layer in found if layer is not None), key=lambda one: one.layer_idx)


def indexers_in_float32(model: PreTrainedModel) -> None:
    """Converts half-precision indexers to float32 for training, in which small updates would be lost."""
    for module in headwise_modules(model):
        if module.retrieval_heads and module.indexer.query_weight.dtype.itemsize < 4:
            module.indexer.float()


def _indexer_parameters(model: PreTrainedModel) -> dict[str, nn.Parameter]:
    return {
        f"layers.{layer.layer_idx}.indexer.{name}": parameter
        for layer in headwise_modules(model)
        if layer.retrieval_heads
        for name, parameter in layer.indexer.named_parameters()
    }


def indexer_weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns copies of the indexers' weights by name, on the CPU in fp32, for `load_indexers`."""
    return {
        name: parameter.detach().float().cpu().clone()
        for name, parameter in _indexer_parameters(model).items()
    }


def load_indexers(model: PreTrainedModel, weights: dict[str, Tensor]) -> None:
    """Copies indexer weights into a sparse model.

    Raises:
        RTPurboError: names or shapes differ from what the head map and the indexer settings ask
            for.
    """
    parameters = _indexer_parameters(model)
    expected = {name: parameter.shape for name, parameter in parameters.items()}
    given = {name: value.shape for name, value in weights.items()}
    if expected != given:
        wrong = sorted(set(expected.items()) ^ set(given.items()))[0][0]
        raise RTPurboError(
            f"the indexer weights do not fit the configuration: '{wrong}' is "
            f"{tuple(given.get(wrong, ())) or 'missing'}, "
            f"expected {tuple(expected.get(wrong, ())) or 'nothing'}."
        )
    for name, parameter in parameters.items():
        parameter.data.copy_(weights[name])

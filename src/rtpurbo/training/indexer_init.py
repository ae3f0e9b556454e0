"""Initialisation of the indexers: the best low-rank estimate of the logits, by the SVD.

With features f of queries and keys, a head's logit is approximated by `s * f(q) . f(k)`. The rank-r bilinear form
with the least mean squared error is the truncated SVD of `C_q^1/2 (s I) C_k^1/2`, where C are second moments of
the features, estimated from data: this saves about a hundred steps of training against the projections of the
model's weights, and more against random ones (docs/experiment-log.md).

Heads h that share an index key are estimated together. With `D = W_K C_k^1/2` and `A_h = s C_h^1/2 C_k^1/2`, the
summed error is `sum_h |A_h - C_h^1/2 W_h^T D|^2`, which is least where the rows of D span the leading right-singular
vectors of the stacked A. As `A^T A = s^2 C_k^1/2 (sum_h C_h) C_k^1/2`, D is that of a single head with the summed
query moment; the best `W_h^T = s C_k^1/2 D^+` does not depend on C_h, so all heads start with the same query weight.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.models.sparse_layer import SparseAttention
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.training.capture import CapturedHeads, run_backbone


def init_indexers(model: PreTrainedModel, sequences: list[list[int]]) -> None:
    """Initialises the weights of every indexer of a sparse model from its states in some token sequences."""
    moments: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def add_up(seen: CapturedHeads) -> None:
        key_value_heads = seen.key_value_heads.tolist()
        for number, name in enumerate(seen.names):
            query, key = (
                (states.T @ states).double() / len(states)
                for states in (
                    seen.query_features[0, number].float(),
                    seen.key_features[0, key_value_heads[number]].float(),
                )
            )
            query_sum, key_sum = moments.get(name, (0.0, 0.0))
            moments[name] = (query_sum + query, key_sum + key)

    for sequence in sequences:
        run_backbone(model, [sequence], add_up)
    for module in headwise_modules(model):
        if module.retrieval_heads:
            by_head = [moments[module.layer_idx, head] for head in module.retrieval_heads]
            queries, keys = (
                torch.stack(part) / len(sequences) for part in zip(*by_head, strict=True)
            )
            _set_weights(module, queries, keys)


def low_rank_projections(
    query_moment: Tensor, key_moment: Tensor, scaling: float, rank: int
) -> tuple[Tensor, Tensor]:
    """Returns the rank-`rank` projections whose dot product is closest to `scaling * f(q) . f(k)`.

    Args:
        query_moment: second moment of the query features, [features, features].
        key_moment: second moment of the key features, [features, features].
        scaling: factor on the dot products.
        rank: index_dim.

    Returns:
        W_Q and W_K, [rank, features]; rows beyond the number of features are zero.
    """
    query_root, query_inverse = _root_and_inverse(query_moment)
    key_root, key_inverse = _root_and_inverse(key_moment)
    left, singular, right = torch.linalg.svd(scaling * query_root @ key_root)
    kept = min(rank, singular.numel())
    size = singular[:kept].sqrt()[:, None]
    projections = []
    for inverse, directions in ((query_inverse, left.T), (key_inverse, right)):
        projection = torch.zeros(rank, inverse.shape[0], dtype=inverse.dtype, device=inverse.device)
        projection[:kept] = size * (directions[:kept] @ inverse)
        projections.append(projection)
    return projections[0], projections[1]


def _root_and_inverse(moment: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the symmetric square root and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp(min=values.max() * 1e-8)
    return vectors * values.sqrt() @ vectors.T, vectors / values.sqrt() @ vectors.T


def _set_weights(module: SparseAttention, query_moments: Tensor, key_moments: Tensor) -> None:
    """Sets the indexer of a layer from second moments for each retrieval head, [heads, features, features]."""
    indexer, device = module.indexer, query_moments.device
    entries = torch.arange(len(module.retrieval_heads), device=device)
    if indexer.settings.shared_keys:
        entries = module.layout(device).retrieval.key_value_heads
    for entry in range(indexer.key_weight.shape[0]):
        heads = entries == entry
        # Heads that share an index key have the same KV head.
        query, key = low_rank_projections(
            query_moments[heads].sum(0),
            key_moments[heads][0],
            module.scaling,
            indexer.settings.index_dim,
        )
        indexer.query_weight.data[heads] = query.to(indexer.query_weight.dtype)
        indexer.key_weight.data[entry].copy_(key)

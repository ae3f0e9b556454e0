"""Where the indexers start: the best low-rank estimate of the logits, by the SVD.

A head's logit is `s * f(q) . f(k)`, if the features f were all that counts. The rank-r bilinear form
closest to it, weighing every direction by how much queries and keys use it, is the truncated SVD of
`C_q^1/2 (s I) C_k^1/2`, where C are second moments of the features: from data (`covariance`), or from
the projections as if their inputs were white (`weight`). Starting from data is worth a hundred steps
(docs/experiment-log.md).
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.errors import RTPurboError
from rtpurbo.models.attention import HeadwiseAttention
from rtpurbo.models.sharding import whole
from rtpurbo.models.sparsify import headwise_modules
from rtpurbo.settings import IndexerStart
from rtpurbo.training.capture import CapturedHeads, run_backbone


def start_indexers(
    model: PreTrainedModel, start: IndexerStart, sequences: list[list[int]], *, seed: int = 0
) -> None:
    """Sets the weights of every indexer.

    Args:
        model: sparse.
        start: `covariance`, `weight` or `random`.
        sequences: token sequences, for `covariance`.
        seed: for `random`.
    """
    if start == "covariance":
        _start_from_data(model, sequences)
    elif start == "weight":
        _start_from_weights(model)
    else:
        generator = torch.Generator().manual_seed(seed)
        for module in headwise_modules(model):
            if module.retrieval_heads:
                for weight in module.indexer.parameters():
                    drawn = (
                        torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5
                    )
                    weight.data.copy_(drawn)


def low_rank_projections(
    query_moment: Tensor, key_moment: Tensor, scaling: float, rank: int
) -> tuple[Tensor, Tensor]:
    """The rank-`rank` projections whose dot product is closest to `scaling * f(q) . f(k)`.

    Args:
        query_moment: second moment of the query features, [features, features].
        key_moment: of the key features.
        scaling: the head's factor.
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
    """Symmetric square root and its pseudo-inverse."""
    values, vectors = torch.linalg.eigh(moment.double())
    values = values.clamp(min=values.max() * 1e-8)
    return vectors * values.sqrt() @ vectors.T, vectors / values.sqrt() @ vectors.T


def _start_from_data(model: PreTrainedModel, sequences: list[list[int]]) -> None:
    moments: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def add_up(seen: CapturedHeads) -> None:
        readers = seen.key_value_heads.tolist()
        for number, name in enumerate(seen.names):
            query, key = (
                (states.T @ states).double() / len(states)
                for states in (
                    seen.query_features[0, number].float(),
                    seen.key_features[0, readers[number]].float(),
                )
            )
            query_sum, key_sum = moments.get(name, (0.0, 0.0))
            moments[name] = (query_sum + query, key_sum + key)

    for sequence in sequences:
        run_backbone(model, [sequence], add_up)
    for module in headwise_modules(model):
        for number, head in enumerate(module.retrieval_heads):
            query_moment, key_moment = moments[module.layer_idx, head]
            query, key = low_rank_projections(
                query_moment / len(sequences),
                key_moment / len(sequences),
                module.scaling,
                module.indexer.settings.index_dim,
            )
            module.indexer.query_weight.data[number].copy_(query)
            module.indexer.key_weight.data[number].copy_(key)


def _start_from_weights(model: PreTrainedModel) -> None:
    for module in headwise_modules(model):
        for number, head in enumerate(module.retrieval_heads):
            query_rows, key_rows = _projection_rows(module, head)
            dimensions = module.indexer.feature_dimensions
            query, key = low_rank_projections(
                (query_rows @ query_rows.T)[dimensions][:, dimensions],
                (key_rows @ key_rows.T)[dimensions][:, dimensions],
                module.scaling,
                module.indexer.settings.index_dim,
            )
            module.indexer.query_weight.data[number].copy_(query)
            module.indexer.key_weight.data[number].copy_(key)


def _projection_rows(module: HeadwiseAttention, head: int) -> tuple[Tensor, Tensor]:
    """Rows of the query and key projections of one query head, [head_dim, hidden_size]."""
    if module.family.query_key_norm != "none":
        raise RTPurboError(
            "the start 'weight' does not suit models that normalise queries and keys: choose 'covariance'."
        )
    size, group = module.head_dim, module.num_attention_heads // module.num_key_value_heads
    key_head = head // group
    projections = ("qkv_proj",) * 2 if module.family.fused_projection else ("q_proj", "k_proj")
    query_weight, key_weight = (
        whole(module.get_parameter(f"{name}.weight")) for name in projections
    )
    offset = module.num_attention_heads * size if module.family.fused_projection else 0
    return (
        query_weight[head * size : (head + 1) * size].double(),
        key_weight[offset + key_head * size : offset + (key_head + 1) * size].double(),
    )

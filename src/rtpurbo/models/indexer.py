"""Token indexer: low-dimensional projections whose products estimate attention logits."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from rtpurbo.config import IndexerSettings


def slow_dimensions(frequencies: Tensor, min_wavelength: float, at_least: int) -> list[int]:
    """Returns the dimensions of a head that rotate slowly or not at all.

    Args:
        frequencies: [head_dim], radians a token of each dimension; 0 where it is not rotated.
        min_wavelength: shortest wavelength kept, in tokens.
        at_least: minimum number of dimensions, of the slowest pairs.

    Returns:
        Rotated dimensions in ascending order, then those that are not rotated.
    """
    frequencies = frequencies.double().cpu()
    unrotated = (frequencies == 0).nonzero()[:, 0].tolist()
    rotated = (frequencies != 0).nonzero()[:, 0]
    limit = 2 * torch.pi / min_wavelength
    missing = min(at_least - len(unrotated), rotated.numel())
    if missing > 0:
        limit = max(limit, float(frequencies[rotated].sort().values[missing - 1]))
    return [*rotated[frequencies[rotated] <= limit].tolist(), *unrotated]


class TokenIndexer(nn.Module):
    """Projects query and key features of a layer's retrieval heads to index queries and index keys.

    Features are selected before the projection, so cache and operators do not depend on the index space.
    (Paper: indexer, `s_h(m, n) = (W^Q_h q(m))^T (W^K_h k(n))`.)

    Each retrieval head has a query weight. Key weights are per retrieval head too, or, with
    `shared_keys`, per full KV head: heads that read the same keys then share their index keys.

    Args:
        settings: index_dim, index_space and shared_keys.
        num_retrieval_heads: retrieval query heads of the layer.
        num_full_key_value_heads: KV heads that the retrieval heads read.
        feature_dimensions: the dimensions of a head that are projected.
        device: device of the weights.
        dtype: dtype of the weights.
    """

    feature_dimensions: Tensor

    def __init__(
        self,
        settings: IndexerSettings,
        num_retrieval_heads: int,
        num_full_key_value_heads: int,
        feature_dimensions: list[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.register_buffer(
            "feature_dimensions", torch.tensor(feature_dimensions, device=device), persistent=False
        )
        num_keys = num_full_key_value_heads if settings.shared_keys else num_retrieval_heads
        shape = (settings.index_dim, len(feature_dimensions))
        self.query_weight, self.key_weight = (
            nn.Parameter(
                torch.zeros(heads, *shape, device=device, dtype=dtype), requires_grad=False
            )
            for heads in (num_retrieval_heads, num_keys)
        )

    def features(self, states: Tensor, undo_rotation: Callable[[Tensor], Tensor]) -> Tensor:
        """Returns the features that are projected: [batch, heads, length, features].

        Args:
            states: [batch, heads, length, head_dim], after RoPE.
            undo_rotation: function that returns states before RoPE.
        """
        if self.settings.index_space == "pre_rope":
            states = undo_rotation(states)
        return states[..., self.feature_dimensions]

    def index_queries(self, features: Tensor) -> Tensor:
        """Returns index queries [batch, num_retrieval_heads, q_len, index_dim] of query features."""
        return _projected(features, self.query_weight)

    def index_keys(self, features: Tensor) -> Tensor:
        """Returns index keys [batch, heads, k_len, index_dim] of the key features of these heads.

        They are the full KV heads with `shared_keys`, else each retrieval head's KV head.
        """
        return _projected(features, self.key_weight)


def _projected(features: Tensor, weight: Tensor) -> Tensor:
    """Returns the projection, in float16 if the model is in bfloat16.

    Index states are small: float16 has three more bits of precision, and kernels may accumulate in
    float16, which halves the time to find the maximum score of a block.
    """
    states = features @ weight.to(features.dtype).transpose(-1, -2)
    return states.to(torch.float16) if states.dtype == torch.bfloat16 else states

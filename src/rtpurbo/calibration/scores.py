"""Retrieval score of a query head (paper: head calibration)."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.data.needles import CalibrationDocument
from rtpurbo.models.decoder import decoder_of
from rtpurbo.models.sparse_layer import LayerObservation
from rtpurbo.models.sparsify import observing
from rtpurbo.ops.eager.attend import attention_logits
from rtpurbo.ops.eager.visibility import causal_mask


def retrieval_scores(model: PreTrainedModel, document: CalibrationDocument) -> dict[int, Tensor]:
    """Returns the attention of the later needle's queries to the earlier needle, for each query head.

    `R_h = 1/|N_post| * sum over queries t of the later needle, keys j of the earlier one, of A_h(t, j)`, minus
    that of a head with uniform attention (|N_pre| / length), so that documents of all lengths are comparable. Only
    the needle's queries are computed, so no n x n matrix is made.

    Args:
        model: dense, on any device.
        document: prose with the same needle near the beginning and at the end.

    Returns:
        For each converted layer, fp32 [num_attention_heads] on the CPU.
    """
    scores: dict[int, Tensor] = {}
    early, late = slice(*document.early_span), slice(*document.late_span)

    def score_layer(seen: LayerObservation) -> None:
        mass = attention_of_queries(seen, late)[..., early].sum(-1).mean(-1)
        scores[seen.layer] = (mass - (early.stop - early.start) / seen.keys.shape[2]).float().cpu()

    input_ids = torch.tensor([document.input_ids], device=model.device)
    with torch.no_grad(), observing(model, score_layer):
        decoder_of(model)(input_ids, use_cache=False)
    return scores


def attention_of_queries(seen: LayerObservation, places: slice | Tensor) -> Tensor:
    """Returns the full attention of some queries: [heads, queries, keys], in at least fp32.

    Args:
        seen: states of a layer for one document.
        places: indices of the queries.
    """
    queries, keys = seen.queries[:, :, places], seen.keys
    group = queries.shape[1] // keys.shape[1]
    logits = attention_logits(queries, keys.repeat_interleave(group, 1), seen.scaling)
    visible = causal_mask(seen.positions[:, places], seen.positions)
    logits = logits.masked_fill(~visible, -torch.inf)
    if seen.sinks is None:
        return logits.softmax(-1)[0]
    column = seen.sinks.to(logits.dtype)[None, :, None, None].expand_as(logits[..., :1])
    return torch.cat([logits, column], -1).softmax(-1)[0, ..., :-1]

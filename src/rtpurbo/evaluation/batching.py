"""Batch sizes for questions."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from rtpurbo.models.sparse_layers import is_sparse

MOST_AT_ONCE = 32
# For short questions with long answers, whose steps take about as long for many sequences as for one.
MOST_SHORT_AT_ONCE = 128
# Limits the size of the cache of a batch.
TOKENS_AT_ONCE = 2**18
# Entries of a dense model's mask, of one byte each before attention converts it.
MASK_ENTRIES = 2**30


def questions_at_once(model: PreTrainedModel, context_length: int, most: int = MOST_AT_ONCE) -> int:
    """Returns the batch size for questions whose prompts differ in length.

    Batches save time on a GPU only. In a dense model, several padded prompts need a mask [batch, length,
    length], and a single prompt needs none: long prompts are slower in a batch, and a batch of eight at 32K
    took 50 GB (docs/experiment-log.md).

    Args:
        model: dense or sparse.
        context_length: tokens of the longest prompt and answer.
        most: largest batch size.
    """
    if model.device.type != "cuda":
        return 1
    fitting = TOKENS_AT_ONCE // context_length
    if not is_sparse(model):
        fitting = min(fitting, MASK_ENTRIES // context_length**2)
    return max(1, min(most, fitting))


def batches_by_length(
    model: PreTrainedModel, lengths: Sequence[int], most: int = MOST_SHORT_AT_ONCE
) -> list[list[int]]:
    """Returns batches of questions of similar length, the longest first.

    Args:
        model: dense or sparse.
        lengths: tokens of each question's prompt and answer, at least one.
        most: largest batch size.

    Returns:
        Indices into `lengths`, by batch.
    """
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    batches = []
    while order:
        size = questions_at_once(model, lengths[order[0]], most)
        batches.append(order[:size])
        order = order[size:]
    return batches

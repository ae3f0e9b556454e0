"""Which tokens of a sequence stage 2 learns from, and the states that say what the model thinks of them."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.models.decoder import decoder_of
from rtpurbo.settings import DistillationSettings
from rtpurbo.training.sequences import TrainingSequence


def label_positions(
    sequence: TrainingSequence, settings: DistillationSettings, seed: str
) -> tuple[Tensor, Tensor]:
    """The positions that are learnt from: of answers, of the text, or of both.

    Args:
        sequence: at least two tokens.
        settings: `targets`, `target_stride` and `targets_per_sequence`.
        seed: of a random choice.

    Returns:
        Positions, int64 ascending, whose logits predict the label tokens, and whether each predicts
        an answer token.
    """
    last = len(sequence.input_ids) - 1
    first_answer = last - sequence.num_answer_tokens
    answers = list(range(first_answer, last))
    if settings.targets == "answers" and answers:
        text: list[int] = []
    else:
        text = list(range(last if settings.targets == "text" else first_answer))
        if settings.targets == "text":
            answers = []
        if settings.target_stride is not None:
            text = text[:: settings.target_stride]
        else:
            wanted = max(0, min(len(text), settings.targets_per_sequence - len(answers)))
            text = sorted(random.Random(seed).sample(text, wanted))
    positions = torch.tensor([*text, *answers])
    return positions, positions >= first_answer


def label_states(model: PreTrainedModel, input_ids: list[int], positions: Tensor) -> Tensor:
    """The model's last hidden states at some positions of a sequence: [labels, hidden_size]."""
    ids = torch.tensor([input_ids], device=model.device)
    states = decoder_of(model)(ids, use_cache=False).last_hidden_state
    return states[0].index_select(0, positions.to(model.device))

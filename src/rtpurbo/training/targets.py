"""Target positions of stage 2, and the hidden states that predict them."""

from __future__ import annotations

import random

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo.models.decoder import decoder_of
from rtpurbo.settings import DistillationSettings
from rtpurbo.training.sequences import TrainingSequence


def choose_targets(
    sequence: TrainingSequence, settings: DistillationSettings, seed: str
) -> tuple[Tensor, Tensor]:
    """Chooses target positions in the answer, in the text before it, or in both.

    Args:
        sequence: at least two tokens.
        settings: `targets`, `target_stride` and `targets_per_sequence`.
        seed: seed of the random choice.

    Returns:
        int64 [targets], ascending positions whose logits predict the target tokens, and bool [targets],
        true where the target token belongs to an answer.
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


def states_at(model: PreTrainedModel, input_ids: list[int], positions: Tensor) -> Tensor:
    """Returns the model's last hidden states at some positions: [positions, hidden_size]."""
    ids = torch.tensor([input_ids], device=model.device)
    states = decoder_of(model)(ids, use_cache=False).last_hidden_state
    return states[0].index_select(0, positions.to(model.device))

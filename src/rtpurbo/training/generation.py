"""Batched generation of token sequences with a dense model, for training data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.devices import in_fitting_batches
from rtpurbo.models.sharding import is_sharded
from rtpurbo.models.text import left_padded, stop_tokens


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Attributes:
        temperature: sampling temperature; 0 is greedy decoding.
        top_p: probability mass of nucleus sampling.
    """

    temperature: float
    top_p: float = 1.0


GREEDY = Sampling(0.0)


def generate_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    seed: int,
    stops: Sequence[int] = (),
) -> list[list[int]]:
    """Generates continuations of a batch of prompts of at least one token each.

    A batch that does not fit into the memory is halved. Processes that hold parts of the model call this
    together, divide the prompts among them, and all return the tokens of all prompts. The model is dense: a
    sparse one inside `Runtime.dense` has no cache to generate with. Its own and the tokenizer's stop tokens
    end a continuation too. The global random state is unchanged.

    Returns:
        New tokens of each prompt, up to and including the first stop token.
    """
    sharded = is_sharded(model)
    rank, count = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
    ends = {*stop_tokens(model, tokenizer), *stops}
    padding = tokenizer.pad_token_id
    if padding is None:
        padding = min(ends, default=0)
    choice = (
        {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        if sampling.temperature
        else {"do_sample": False, "temperature": None, "top_p": None}
    )

    def write(batch: Sequence[Sequence[int]]) -> list[list[int]]:
        inputs = left_padded(batch, padding, model.device)
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(ends) or None,
            pad_token_id=padding,
            # Overrides the model's generation defaults, so that its own distribution is sampled.
            top_k=0 if sampling.temperature else None,
            repetition_penalty=1.0,
            # A process that has finished keeps running its part of each layer.
            synced_gpus=sharded,
            **choice,
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        return [_up_to_stop(row, ends) for row in new.tolist()]

    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(seed + rank)
        if not sharded:
            return [row for _, rows in in_fitting_batches([prompts], write) for row in rows]
        # All processes run every layer together, so each needs a prompt. None halves its batch: others would wait.
        written = write(prompts[rank::count] or prompts[:1])
    parts: list[list[list[int]]] = [[]] * count
    dist.all_gather_object(parts, written)
    return [parts[number % count][number // count] for number in range(len(prompts))]


def _up_to_stop(token_ids: list[int], ends: set[int]) -> list[int]:
    """Returns tokens up to and including the first stop token, without the padding after it."""
    for index, token_id in enumerate(token_ids):
        if token_id in ends:
            return token_ids[: index + 1]
    return token_ids

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
    """Parameters of nucleus sampling; a temperature of 0 is greedy decoding."""

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
    together, divide the prompts among them, and all return the tokens of all prompts.

    Args:
        model: dense; a sparse model inside `Runtime.dense` has no cache to generate with.
        tokenizer: the model's.
        prompts: tokens of each prompt.
        max_new_tokens: maximum number of tokens of a continuation.
        sampling: temperature and top-p.
        seed: seed of the sampling; the global random state is unchanged.
        stops: tokens that end a continuation, in addition to those of the model and the tokenizer.

    Returns:
        New tokens of each prompt, up to and including the first stop token.
    """
    if not is_sharded(model):
        return _generate(model, tokenizer, prompts, max_new_tokens, sampling, seed, stops)
    rank, count = dist.get_rank(), dist.get_world_size()
    # All processes run every layer together, so each needs a prompt.
    own = prompts[rank::count] or prompts[:1]
    written = _generate(model, tokenizer, own, max_new_tokens, sampling, seed + rank, stops)
    parts: list[list[list[int]]] = [[]] * count
    dist.all_gather_object(parts, written)
    return [parts[number % count][number // count] for number in range(len(prompts))]


def _generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int,
    stops: Sequence[int],
) -> list[list[int]]:
    """Generates the continuations of this process's prompts."""
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
            synced_gpus=is_sharded(model),
            **choice,
        )
        new = output[:, inputs["input_ids"].shape[1] :]
        return [_up_to_stop(row, ends) for row in new.tolist()]

    devices = [model.device] if model.device.type == "cuda" else []
    with torch.no_grad(), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        if is_sharded(model):
            return write(prompts)  # halving would make the other processes wait
        return [row for _, rows in in_fitting_batches([prompts], write) for row in rows]


def _up_to_stop(token_ids: list[int], ends: set[int]) -> list[int]:
    """Returns tokens up to and including the first stop token, without the padding after it."""
    for index, token_id in enumerate(token_ids):
        if token_id in ends:
            return token_ids[: index + 1]
    return token_ids

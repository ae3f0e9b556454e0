"""Conversations with a sparse model that keep the KV cache between turns."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextStreamer,
)

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.memory import cache_bytes
from rtpurbo.interruption import steps_undisturbed, stop_requested
from rtpurbo.models.architecture import context_length
from rtpurbo.models.arguments import CACHE_NAME
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.text import chat_tokens, stop_arguments
from rtpurbo.ops import SelectionStatistics


@dataclass(frozen=True)
class Answer:
    """Counts of an answer.

    Attributes:
        prompt_tokens: tokens of the conversation before the answer.
        reused_tokens: prompt tokens that were in the cache already.
        new_tokens: tokens of the answer, including its end.
        tokens_read: keys that a retrieval head read in a decode step, mean over heads and steps; None if
            they were not counted, or without retrieval heads or decode steps.
        dense_tokens_read: keys that the dense model reads in a decode step, mean over the steps.
        cache_bytes: size of the KV cache after the answer.
        dense_cache_bytes: size of the dense model's KV cache.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    tokens_read: float | None
    dense_tokens_read: float
    cache_bytes: int
    dense_cache_bytes: int


class Conversation:
    """Messages and their cache.

    Args:
        model: sparse model.
        tokenizer: tokenizer of the model.
        system: system message.
        count_reads: count the keys that retrieval heads read. On a GPU, steps then run without a CUDA
            graph, slower.
        max_new_tokens: largest number of tokens of an answer.
        generation: arguments for `generate`, such as `temperature`.

    Attributes:
        messages: messages so far, each with `role` and `content`.
        last_answer: counts of the last answer.

    Raises:
        RTPurboError: the model has no chat template, or one that takes no system message.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        count_reads: bool = False,
        max_new_tokens: int = 512,
        **generation: Any,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.system, self.count_reads = system, count_reads
        self.max_new_tokens, self.generation = max_new_tokens, generation
        self.last_answer: Answer | None = None
        self.reset()
        # Fails now instead of at the first message.
        chat_tokens(tokenizer, [*self.messages, {"role": "user", "content": "?"}])

    def reset(self) -> None:
        """Deletes all messages but the system message."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.messages: list[dict[str, str]] = system
        self._empty_cache()

    def answer(self, text: str, streamer: TextStreamer | None = None) -> str:
        """Generates the answer to a message.

        Within `rtpurbo.interruption.stopping_cleanly`, Ctrl-C ends the answer between two tokens: the part
        generated so far stays in the conversation and in the cache. Any other exception leaves the messages
        unchanged and empties the cache, which may have been half written.

        Args:
            text: the user's message.
            streamer: receives the tokens as they are generated.

        Returns:
            The answer.

        Raises:
            RTPurboError: the conversation is longer than the model's context; it is left unchanged.
            StoppedBySignalError: Ctrl-C ended the answer.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt, context = chat_tokens(self.tokenizer, messages), context_length(self.model.config)
        if len(prompt) >= context:
            raise RTPurboError(
                f"the conversation has become {len(prompt):,} tokens long, and the model's context "
                f"is {context:,}: begin a new one."
            )
        statistics, far_read = SelectionStatistics(), []

        def is_stopped(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
            far_read.append(statistics.far_keys_read)
            return torch.full_like(input_ids[:, 0], stop_requested() is not None, dtype=torch.bool)

        with steps_undisturbed():
            reused = self._crop_cache(prompt)
            ids = torch.tensor([prompt], device=self.model.device)
            try:
                with self.model.rtpurbo.counting(statistics) if self.count_reads else nullcontext():
                    [tokens] = self.model.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=min(context - len(prompt), self.max_new_tokens),
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([is_stopped]),
                        **{CACHE_NAME: self._cache},
                        **stop_arguments(self.model, self.tokenizer),
                        **self.generation,
                    ).tolist()
            except BaseException:
                self._empty_cache()
                raise
            self._cached = tokens[: self._cache.get_seq_length()]
            new = tokens[len(prompt) :]
            answer = str(self.tokenizer.decode(new, skip_special_tokens=True))
            self.messages = [*messages, {"role": "assistant", "content": answer}]
            # The first token came from the queries of the prompt.
            self.last_answer = self._count(
                len(prompt), reused, len(new), far_read[-1] - far_read[0]
            )
        return answer

    def _empty_cache(self) -> None:
        self._cache, self._cached = HeadwiseCache(self.model), list[int]()

    def _crop_cache(self, prompt: Sequence[int]) -> int:
        """Crops the cache to the prefix that it shares with the prompt, and returns the length of that prefix.

        Templates may change earlier turns (some leave out reasoning), and decoded text may have other tokens than those
        that were generated.
        """
        # The last token is computed for its logits.
        limit = min(len(self._cached), len(prompt) - 1)
        shared = next((at for at in range(limit) if self._cached[at] != prompt[at]), limit)
        try:
            if superfluous := len(self._cached) - shared:
                self._cache.crop(-superfluous)
        except RTPurboError:  # the windows no longer have the keys before the removed ones
            shared = 0
        if not shared:
            self._empty_cache()
        return shared

    def _count(self, prompt: int, reused: int, new: int, far_read: float) -> Answer:
        config, steps = self.model.rtpurbo_config, new - 1  # the last token was not an input
        near = config.attention.num_sink_tokens + config.attention.near_window
        heads = config.head_map.num_retrieval_heads
        lengths = range(prompt + 1, prompt + new)
        read = None
        if self.count_reads and heads and steps:
            read = sum(min(length, near) for length in lengths) / steps + far_read / heads / steps
        return Answer(
            prompt_tokens=prompt,
            reused_tokens=reused,
            new_tokens=new,
            tokens_read=read,
            dense_tokens_read=prompt + new / 2,
            cache_bytes=self._cache.num_bytes(),
            dense_cache_bytes=cache_bytes(self.model, prompt + steps, dense=True),
        )

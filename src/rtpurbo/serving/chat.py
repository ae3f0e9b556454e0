"""Conversations with a sparse model that keep the KV cache between turns."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextStreamer,
)

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.memory import cache_bytes
from rtpurbo.formats import percent, short_bytes
from rtpurbo.interruption import steps_undisturbed, stop_requested
from rtpurbo.models.architecture import context_length
from rtpurbo.models.arguments import CACHE_NAME
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.text import chat_tokens, left_padded, stop_arguments
from rtpurbo.ops import SelectionStatistics


class Answer(NamedTuple):
    """Counts of an answer, and of the dense model for comparison.

    Attributes:
        prompt_tokens: tokens of the conversation before the answer.
        reused_tokens: tokens of these that were in the cache already.
        new_tokens: tokens of the answer, including its end.
        tokens_read: mean keys that a retrieval head read in a decode step; None without such heads or steps, or
            if reads are not counted.
        dense_tokens_read: mean keys that a head of the dense model reads.
        cache_bytes: bytes of the cache after the answer.
        dense_cache_bytes: bytes of the dense model's cache.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    tokens_read: float | None
    dense_tokens_read: float
    cache_bytes: int
    dense_cache_bytes: int

    def __str__(self) -> str:
        """Describes the answer in one line."""
        read, dense, reads = self.tokens_read, self.dense_tokens_read, ""
        if read is not None:
            reads = f"a retrieval head read {read:,.0f} of {dense:,.0f} tokens ({percent(read / dense)}); "
        return (
            f"[{self.prompt_tokens:,} tokens of conversation, {self.reused_tokens:,} of them cached before; "
            f"{self.new_tokens:,} generated; {reads}the cache takes {short_bytes(self.cache_bytes)}, "
            f"the dense model's {short_bytes(self.dense_cache_bytes)}]"
        )


class Conversation:
    """Messages and their cache.

    Args:
        model: sparse.
        tokenizer: the model's.
        system: system message.
        count_reads: count the keys that retrieval heads read; steps on a GPU are then slower, without a CUDA graph.
        max_new_tokens: largest length of an answer.
        generation: arguments for `generate`, such as `temperature`.

    Attributes:
        messages: messages so far, each with `role` and `content`.
        last_answer: counts of the last answer; None before the first one and after a failed one.

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
        self.reset()
        # Fails now instead of at the first message.
        chat_tokens(tokenizer, [*self.messages, {"role": "user", "content": "?"}])

    def reset(self) -> None:
        """Deletes all messages but the system message."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        self.messages: list[dict[str, str]] = system
        self.last_answer: Answer | None = None
        self._cache, self._cached = HeadwiseCache(self.model), list[int]()

    def answer(self, text: str, streamer: TextStreamer | None = None) -> str:
        """Generates the answer to a message, whose tokens the streamer receives.

        Within `rtpurbo.interruption.stopping_cleanly`, Ctrl-C ends the answer between two tokens: the part
        generated so far stays in the conversation and in the cache. Any other exception leaves the messages
        unchanged, and the cache, which may be half written, is not used again.

        Raises:
            RTPurboError: the conversation is longer than the model's context.
            StoppedBySignalError: Ctrl-C ended the answer.
        """
        self.last_answer = None
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt, context = chat_tokens(self.tokenizer, messages), context_length(self.model.config)
        if len(prompt) >= context:
            raise RTPurboError(
                f"the conversation has become {len(prompt):,} tokens long, and the model's context "
                f"is {context:,}: begin a new one."
            )
        statistics, skipped = SelectionStatistics(), list[float]()

        def is_stopped(*_: Any, **__: Any) -> bool:
            skipped.append(statistics.far_keys - statistics.far_keys_read)
            return stop_requested() is not None

        counting = self.model.rtpurbo.counting(statistics) if self.count_reads else nullcontext()
        with steps_undisturbed(), counting:
            reused = self._crop_cache(prompt)
            [tokens] = self.model.generate(
                **left_padded([prompt], 0, self.model.device),
                max_new_tokens=min(context - len(prompt), self.max_new_tokens),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([is_stopped]),
                **{CACHE_NAME: self._cache},
                **stop_arguments(self.model, self.tokenizer),
                **self.generation,
            ).tolist()
            self._cached, new = tokens[: self._cache.get_seq_length()], tokens[len(prompt) :]
            answer = str(self.tokenizer.decode(new, skip_special_tokens=True))
            self.messages = [*messages, {"role": "assistant", "content": answer}]
            # The first token came from the queries of the prompt, and the last one was not an input.
            steps, dense_read, read = len(new) - 1, len(prompt) + len(new) / 2, None
            heads = self.model.rtpurbo_config.head_map.num_retrieval_heads
            if self.count_reads and heads and steps:
                read = dense_read - (skipped[-1] - skipped[0]) / heads / steps
            self.last_answer = Answer(
                prompt_tokens=len(prompt),
                reused_tokens=reused,
                new_tokens=len(new),
                tokens_read=read,
                dense_tokens_read=dense_read,
                cache_bytes=self._cache.num_bytes(),
                dense_cache_bytes=cache_bytes(self.model, len(tokens) - 1, dense=True),
            )
        return answer

    def _crop_cache(self, prompt: Sequence[int]) -> int:
        """Crops the cache to the prefix that it shares with the prompt, and returns the length of that prefix.

        Templates may change earlier turns (some leave out reasoning), and decoded text may have other tokens than those
        that were generated.
        """
        cached, self._cached = self._cached, []  # until the answer is complete
        # The last token is computed for its logits.
        limit = min(len(cached), len(prompt) - 1)
        shared = next((at for at in range(limit) if cached[at] != prompt[at]), limit)
        try:
            if superfluous := len(cached) - shared:
                self._cache.crop(-superfluous)
        except RTPurboError:  # a window no longer has the keys before the removed ones
            shared = 0
        if not shared:
            self._cache = HeadwiseCache(self.model)
        return shared

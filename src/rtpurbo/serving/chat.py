"""Conversations with a sparse model that keep the cache between turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.memory import cache_bytes
from rtpurbo.interruption import StoppedBySignalError, steps_undisturbed, stop_requested
from rtpurbo.models.architecture import attention_shapes, context_length, layer_types
from rtpurbo.models.arguments import CACHE_NAME
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.sparsify import counting
from rtpurbo.models.text import chat_tokens, stop_tokens
from rtpurbo.ops import SelectionStatistics


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Attributes:
        temperature: 0 for greedy decoding; None for the model's generation settings.
        top_p: total probability of the likeliest tokens that are sampled from.
        top_k: number of the likeliest tokens that are sampled from.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def arguments(self) -> dict[str, Any]:
        """Returns arguments for `generate`."""
        if self.temperature == 0:
            # Sampling settings of the model would cause a warning.
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        given = {name: value for name, value in vars(self).items() if value is not None}
        return {"do_sample": True, **given} if given else {}


@dataclass(frozen=True)
class Answer:
    """Counts of an answer.

    Attributes:
        prompt_tokens: tokens of the conversation before the answer.
        reused_tokens: prompt tokens that were in the cache already.
        new_tokens: tokens of the answer, including its end.
        tokens_read: keys that a head read per token of the answer, mean over all heads; None if they were
            not counted or there was no decode step.
        dense_tokens_read: `tokens_read` of the dense model.
        cache_bytes: size of the KV cache after the answer.
        dense_cache_bytes: size of the dense model's KV cache.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    tokens_read: float | None
    dense_tokens_read: float | None
    cache_bytes: int
    dense_cache_bytes: int


class Conversation:
    """Messages and their cache.

    Args:
        model: sparse model.
        tokenizer: tokenizer of the model.
        system: system message.
        max_new_tokens: largest number of tokens of an answer.
        sampling: sampling parameters.
        count_reads: count the keys that heads read. On a GPU, steps then run without a CUDA graph, slower.

    Raises:
        RTPurboError: the model has no chat template, or one that takes no system message.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        sampling: Sampling | None = None,
        count_reads: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.system = system
        self.max_new_tokens = max_new_tokens
        self.sampling = Sampling() if sampling is None else sampling
        self.count_reads = count_reads
        self.last_answer: Answer | None = None
        self._held: list[int] = []
        self.reset()
        # Fails now instead of at the first message.
        chat_tokens(tokenizer, [*self.messages, {"role": "user", "content": "?"}])

    def reset(self) -> None:
        """Deletes all messages but the system message."""
        self.messages: list[dict[str, str]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self._forget()

    def answer(self, text: str, show: Callable[[str], None] = lambda piece: None) -> str:
        """Generates the answer to a message.

        KeyboardInterrupt stops the answer, and the part generated so far stays in the conversation.
        Within `rtpurbo.interruption.stopping_cleanly`, Ctrl-C stops it between two tokens, so that the
        cache is kept as well.

        Args:
            text: the user's message.
            show: receives the answer piece by piece.

        Returns:
            The answer.

        Raises:
            RTPurboError: the conversation is longer than the model's context; it is left unchanged.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        prompt = chat_tokens(self.tokenizer, messages)
        room = context_length(self.model.config) - len(prompt)
        if room < 1:
            raise RTPurboError(
                f"the conversation has become {len(prompt):,} tokens long, and the model's context "
                f"is {context_length(self.model.config):,}: begin a new one."
            )
        reused = self._reuse(prompt)
        statistics = SelectionStatistics()
        streamer = _AnswerStreamer(self.tokenizer, show, statistics)
        try:
            with (
                steps_undisturbed(),
                counting(self.model, statistics) if self.count_reads else nullcontext(),
            ):
                self._generate(prompt, min(room, self.max_new_tokens), streamer)
        except KeyboardInterrupt:
            self._keep(messages, prompt, reused, streamer, is_cache_valid=streamer.is_stopped)
            raise
        except BaseException:
            self._forget()
            raise
        return self._keep(messages, prompt, reused, streamer)

    def _keep(
        self,
        messages: list[dict[str, str]],
        prompt: list[int],
        reused: int,
        streamer: _AnswerStreamer,
        *,
        is_cache_valid: bool = True,
    ) -> str:
        """Appends the answer to the messages and returns it."""
        if is_cache_valid:
            self._held = [*prompt, *streamer.tokens][: self._cache.get_seq_length()]
        else:
            self._forget()  # the interruption may have come in the middle of a layer
        answer = str(self.tokenizer.decode(streamer.tokens, skip_special_tokens=True))
        self.messages = [*messages, {"role": "assistant", "content": answer}]
        far_read = streamer.far_read if self.count_reads else None
        self.last_answer = self._describe(len(prompt), reused, len(streamer.tokens), far_read)
        return answer

    def _generate(self, prompt: list[int], max_new_tokens: int, streamer: TextStreamer) -> None:
        stops = stop_tokens(self.model, self.tokenizer)
        padding = self.tokenizer.pad_token_id
        ids = torch.tensor([prompt], device=self.model.device)
        self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            eos_token_id=stops or None,
            pad_token_id=padding if padding is not None else (stops or [0])[0],
            streamer=streamer,
            **{CACHE_NAME: self._cache},
            **self.sampling.arguments(),
        )

    def _forget(self) -> None:
        self._cache = HeadwiseCache(self.model)
        self._held = []

    def _reuse(self, prompt: Sequence[int]) -> int:
        """Crops the cache to the prefix that it shares with the prompt, and returns the length of that prefix.

        Templates may change earlier turns (some leave out reasoning), and decoded text may have other tokens than those
        that were generated.
        """
        # The last token is computed for its logits.
        limit = min(len(self._held), len(prompt) - 1)
        shared = next((at for at in range(limit) if self._held[at] != prompt[at]), limit)
        superfluous = len(self._held) - shared
        if not superfluous or (shared and self._crops(superfluous)):
            return shared
        self._forget()
        return 0

    def _crops(self, superfluous: int) -> bool:
        """Removes the last tokens, and returns False if the windows no longer have the keys of earlier ones."""
        try:
            self._cache.crop(-superfluous)
        except RTPurboError:
            return False
        return True

    def _describe(self, prompt: int, reused: int, new: int, far_read: float | None) -> Answer:
        tokens = self._cache.get_seq_length()
        read = dense = None
        # The answer's last token was not an input.
        steps = range(prompt + 1, prompt + new)
        if far_read is not None and len(steps):
            near, everything = reads_of_steps(self.model, steps)
            shapes = attention_shapes(self.model.config).values()
            heads = sum(shape.num_attention_heads for shape in shapes)
            read = (near + far_read) / heads / len(steps)
            dense = everything / heads / len(steps)
        return Answer(
            prompt,
            reused,
            new,
            read,
            dense,
            self._cache.num_bytes(),
            cache_bytes(self.model, tokens, dense=True),
        )


def reads_of_steps(model: PreTrainedModel, lengths: Sequence[int]) -> tuple[int, int]:
    """Counts the keys that all heads read in decode steps, without the far ones that retrieval heads select.

    Args:
        model: sparse model.
        lengths: tokens of the sequence in each step, including the new one.

    Returns:
        Keys in sinks and windows, and all keys that the dense model would read.
    """
    config, rule = model.rtpurbo_config, model.rtpurbo_config.attention
    kinds = layer_types(model.config)
    near = dense = 0
    for layer, shape in attention_shapes(model.config).items():
        heads, retrieval_heads = shape.num_attention_heads, config.head_map.retrieval_heads[layer]
        if retrieval_heads is None:
            if kinds[layer] == "chunked_attention":
                chunk = model.config.attention_chunk_size
                read = sum((length - 1) % chunk + 1 for length in lengths)
            else:
                read = sum(min(length, model.config.sliding_window) for length in lengths)
            near, dense = near + heads * read, dense + heads * read
            continue
        retrieving = len(retrieval_heads)
        for length in lengths:
            local = min(length, rule.num_sink_tokens + rule.sliding_window)
            others = min(length, rule.num_sink_tokens + rule.near_window)
            near += (heads - retrieving) * local + retrieving * others
            dense += heads * length
    return near, dense


class _AnswerStreamer(TextStreamer):
    """Streamer that passes on an answer's text, and stops between two tokens after a signal.

    Attributes:
        tokens: tokens of the answer so far.
        is_stopped: True once a signal stopped the answer between two tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        show: Callable[[str], None],
        statistics: SelectionStatistics,
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.tokens: list[int] = []
        self.is_stopped = False
        self._show, self._statistics = show, statistics
        self._read_by_prompt = 0.0

    @property
    def far_read(self) -> float:
        """Far keys that the answer's tokens read, over all heads."""
        return self._statistics.far_keys_read - self._read_by_prompt

    def put(self, value: Tensor) -> None:
        """Receives the prompt [1, tokens] and then each new token [1]."""
        if not self.next_tokens_are_prompt:
            if not self.tokens:
                # The first token came from the queries of the prompt.
                self._read_by_prompt = self._statistics.far_keys_read
            self.tokens += value.tolist()
        super().put(value)
        if number := stop_requested():
            self.is_stopped = True
            raise StoppedBySignalError(number)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Receives text that later tokens do not change."""
        if text:
            self._show(text)

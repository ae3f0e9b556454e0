"""A conversation with a sparse model whose cache is kept between turns."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    TextIteratorStreamer,
)

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.memory import cache_bytes
from rtpurbo.models.architecture import context_length, convertible_layers
from rtpurbo.models.arguments import CACHE_NAME
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.sparsify import counting
from rtpurbo.models.text import chat_tokens, stop_tokens
from rtpurbo.ops import SelectionStatistics


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters.

    Attributes:
        temperature: 0 takes the likeliest token; None does as the model's generation settings say.
        top_p: tokens are drawn from the likeliest that have this much probability together.
        top_k: tokens are drawn from so many.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def arguments(self) -> dict[str, Any]:
        """As `generate` takes them."""
        if self.temperature == 0:
            # Else what the model's settings say of sampling would be found useless, and told.
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        given = {name: value for name, value in vars(self).items() if value is not None}
        return {"do_sample": True, **given} if given else {}


@dataclass(frozen=True)
class Answer:
    """Counts of an answer.

    Attributes:
        prompt_tokens: of the whole conversation before the answer.
        reused_tokens: those that the cache held already.
        new_tokens: of the answer, its end included.
        tokens_read: keys that a head read for a token of the answer, on average over all heads;
            None if that was not counted, or no step was made.
        dense_tokens_read: what the dense model's heads would have read.
        cache_bytes: of the key-value cache after the answer.
        dense_cache_bytes: of the dense model's.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    tokens_read: float | None
    dense_tokens_read: float | None
    cache_bytes: int
    dense_cache_bytes: int


class Conversation:
    """Messages, and the cache that holds them.

    Args:
        model: sparse.
        tokenizer: the model's.
        system: the system message.
        max_new_tokens: the most tokens of an answer.
        sampling: how they are drawn.
        count_reads: count what heads read. On a GPU steps then run without a CUDA graph, slower.

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
        # Now, and not when the first message was written.
        chat_tokens(tokenizer, [*self.messages, {"role": "user", "content": "?"}])

    def reset(self) -> None:
        """Forgets everything but the system message."""
        self.messages: list[dict[str, str]] = []
        if self.system is not None:
            self.messages.append({"role": "system", "content": self.system})
        self._forget()

    def answer(self, text: str) -> Generator[str, None, None]:
        """Answers a message piece by piece.

        An answer that is not read to its end (the iterator is closed, or an exception such as
        KeyboardInterrupt ends it) stops there, and what was written of it is kept.

        Args:
            text: the user's message.

        Raises:
            RTPurboError: the conversation has become longer than the model's context; it is then as
                it was before.
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
        writing = _Writing(self, prompt, min(room, self.max_new_tokens))
        try:
            yield from writing.pieces()
        finally:
            written = writing.finish()
            if written is None:
                self._forget()  # something failed, perhaps in the middle of a layer
            else:
                self._held = written[: self._cache.get_seq_length()]
                new = written[len(prompt) :]
                content = str(self.tokenizer.decode(new, skip_special_tokens=True))
                self.messages = [*messages, {"role": "assistant", "content": content}]
                self.last_answer = self._describe(len(prompt), reused, len(new), writing.far_read)

    def _forget(self) -> None:
        self._cache = HeadwiseCache(self.model)
        self._held = []

    def _reuse(self, prompt: Sequence[int]) -> int:
        """Leaves in the cache what it shares with the prompt, and tells how many tokens that is.

        Templates may write earlier turns anew (some leave out what a model thought), and text may
        come back as other tokens than those that were written.
        """
        # The last token has to be read, to know what comes after it.
        limit = min(len(self._held), len(prompt) - 1)
        shared = next((at for at in range(limit) if self._held[at] != prompt[at]), limit)
        superfluous = len(self._held) - shared
        if not superfluous or (shared and self._crops(superfluous)):
            return shared
        self._forget()
        return 0

    def _crops(self, superfluous: int) -> bool:
        """Takes back the last tokens, unless windows have forgotten what those before would see."""
        try:
            self._cache.crop(-superfluous)
        except RTPurboError:
            return False
        return True

    def _describe(self, prompt: int, reused: int, new: int, far_read: float | None) -> Answer:
        tokens = self._cache.get_seq_length()
        read = dense = None
        # The answer's last token was not read by anyone.
        steps = range(prompt + 1, prompt + new)
        if far_read is not None and len(steps):
            near, everything = reads_of_steps(self.model, steps)
            heads = self.model.config.num_attention_heads * self.model.config.num_hidden_layers
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
    """Keys that all heads read in decoding steps, but for far ones that retrieval heads select.

    Args:
        model: sparse.
        lengths: tokens of the sequence in each step, its own included.

    Returns:
        Keys in sinks and windows, and all keys that the dense model would read.
    """
    config, rule = model.rtpurbo_config, model.rtpurbo_config.attention
    near = dense = 0
    for layer, converted in enumerate(convertible_layers(model.config)):
        heads = model.config.num_attention_heads
        if not converted:
            own = heads * sum(min(length, model.config.sliding_window) for length in lengths)
            near, dense = near + own, dense + own
            continue
        retrieving = len(config.head_map.retrieval_heads[layer])
        for length in lengths:
            local = min(length, rule.num_sink_tokens + rule.sliding_window)
            others = min(length, rule.num_sink_tokens + rule.near_window)
            near += (heads - retrieving) * local + retrieving * others
            dense += heads * length
    return near, dense


class _Writing:
    """One run of `generate` in a thread of its own, which can be stopped after any token."""

    def __init__(self, conversation: Conversation, prompt: list[int], max_new_tokens: int) -> None:
        self._statistics = SelectionStatistics()
        self._counts = conversation.count_reads
        self._read_by_prompt: float | None = None
        self._stop = Event()
        self._error: BaseException | None = None
        self._written: list[int] | None = None
        self._streamer = TextIteratorStreamer(
            conversation.tokenizer, skip_prompt=True, skip_special_tokens=True
        )
        self._thread = Thread(
            target=self._run, args=(conversation, prompt, max_new_tokens), daemon=True
        )
        self._thread.start()

    def pieces(self) -> Iterator[str]:
        """The text as it is written."""
        for piece in self._streamer:
            if piece:
                yield piece
        self._thread.join()
        if self._error is not None:
            raise self._error

    def finish(self) -> list[int] | None:
        """Stops, and gives prompt and answer as tokens; None if something failed."""
        self._stop.set()
        self._thread.join()
        return self._written

    @property
    def far_read(self) -> float | None:
        """Far keys that the answer's tokens read, over all heads; None if they were not counted."""
        if self._read_by_prompt is None:
            return None
        return self._statistics.far_keys_read - self._read_by_prompt

    def _run(self, conversation: Conversation, prompt: list[int], max_new_tokens: int) -> None:
        model, tokenizer = conversation.model, conversation.tokenizer
        stops = stop_tokens(model, tokenizer)
        ids = torch.tensor([prompt], device=model.device)
        padding = tokenizer.pad_token_id
        try:
            with counting(model, self._statistics) if self._counts else nullcontext():
                output = model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=max_new_tokens,
                    eos_token_id=stops or None,
                    pad_token_id=padding if padding is not None else (stops or [0])[0],
                    streamer=self._streamer,
                    stopping_criteria=[_AfterEachToken(self._after_token)],
                    **{CACHE_NAME: conversation._cache},
                    **conversation.sampling.arguments(),
                )
            self._written = output[0].tolist()
        except BaseException as error:
            self._error = error
        finally:
            # After an error nobody else would tell the reader that nothing more comes.
            self._streamer.end()

    def _after_token(self) -> bool:
        if self._counts and self._read_by_prompt is None:
            # The first token came from the prompt's own rows.
            self._read_by_prompt = self._statistics.far_keys_read
        return self._stop.is_set()


class _AfterEachToken(StoppingCriteria):
    """Calls a function after every token, which tells whether it was the last."""

    def __init__(self, is_last: Callable[[], bool]) -> None:
        self._is_last = is_last

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Returns bool [batch]: the sequences that are done."""
        return torch.full((input_ids.shape[0],), self._is_last(), device=input_ids.device)

"""Text generation around `generate()`: prompts, chat templates, stop tokens, streaming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from rtpurbo.errors import RTPurboError
from rtpurbo.models.architecture import context_length
from rtpurbo.visible import visible


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the token ids that end an answer: those of the model and the tokenizer's end of turn."""
    named = model.generation_config.eos_token_id
    stops = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return sorted(token_id for token_id in stops if token_id is not None)


def stop_arguments(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Returns the stop and padding tokens as arguments for `generate`."""
    stops, padding = stop_tokens(model, tokenizer), tokenizer.pad_token_id
    if padding is None:
        padding = stops[0] if stops else 0
    return {"eos_token_id": stops or None, "pad_token_id": padding}


def chat_tokens(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]]
) -> list[int]:
    """Returns the token ids of a conversation (`role` and `content` each), up to the start of the model's answer.

    Raises:
        RTPurboError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if not tokenizer.chat_template:
        raise RTPurboError(
            "this model has no chat template, so it cannot answer messages: let it continue text "
            "instead (`rtpurbo generate --no-chat`)."
        )
    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise RTPurboError(
            f"the model's chat template does not take these messages ({error}); some support no "
            "system message."
        ) from error
    return list(tokenizer(str(text), add_special_tokens=False, verbose=False)["input_ids"])


def left_padded(
    prompts: Sequence[Sequence[int]], padding: int, device: torch.device
) -> dict[str, Tensor]:
    """Returns prompts as `input_ids` and `attention_mask`, int64 [prompts, longest], for `generate`."""
    rows = [torch.tensor(prompt, dtype=torch.int64) for prompt in prompts]
    pad = partial(pad_sequence, batch_first=True, padding_side="left")
    ids, mask = pad(rows, padding_value=padding), pad([torch.ones_like(row) for row in rows])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def continue_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    sample: bool = False,
    streamer: TextStreamer | None = None,
) -> list[str]:
    """Generates the continuation of each prompt of one left-padded batch, up to the end of the model's turn.

    It is greedy, unless `sample` asks for the model's generation settings. A streamer receives the tokens of a single
    prompt as they are generated.
    """
    stops = stop_arguments(model, tokenizer)
    inputs = left_padded(prompts, stops["pad_token_id"], model.device)
    output = model.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=sample, streamer=streamer, **stops
    )
    return list(
        tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    )


class VisibleStreamer(TextStreamer):
    """Streamer that prints an answer with control characters escaped, for a terminal."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints a piece of text."""
        super().on_finalized_text(visible(text), stream_end)


def generate_text(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    sample: bool = False,
    chat: bool | None = None,
    stream: bool = False,
) -> str:
    """Generates the continuation of a prompt, or the answer to it as a chat message.

    The chat template is applied as `chat` says; None applies it if there is one. It is greedy, unless `sample` asks for
    the model's generation settings. With `stream`, the text is printed to standard output while it is generated.

    Raises:
        RTPurboError: the prompt is empty or too long for the model's context, or `chat` is True and
            there is no chat template.
    """
    if chat or (chat is None and tokenizer.chat_template):
        prompt_ids = chat_tokens(tokenizer, [{"role": "user", "content": prompt}])
    else:
        prompt_ids = tokenizer(prompt, verbose=False)["input_ids"]
    if not prompt_ids:
        raise RTPurboError("the prompt is empty: pass at least one word.")
    context = context_length(model.config)
    if len(prompt_ids) + max_new_tokens > context:
        raise RTPurboError(
            f"the prompt has {len(prompt_ids):,} tokens, which with {max_new_tokens:,} new ones do "
            f"not fit into the model's context of {context:,}."
        )
    streamer = VisibleStreamer(tokenizer) if stream else None
    [text] = continue_tokens(
        model, tokenizer, [prompt_ids], max_new_tokens, sample=sample, streamer=streamer
    )
    return text

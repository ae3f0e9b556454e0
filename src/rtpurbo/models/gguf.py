"""GGUF files as base models: the configuration, and weights and tokenizer as transformers decodes them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import gguf
import torch
import transformers
from transformers import (
    AddedToken,
    GemmaTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers import modeling_gguf_pytorch_utils as gguf_reader
from transformers.convert_slow_tokenizer import generate_merges

from rtpurbo.errors import RTPurboError
from rtpurbo.models.gguf_config import gguf_config
from rtpurbo.models.gguf_header import GgufHeader, read_gguf_header
from rtpurbo.models.pretrained import LoadingOptions, load_pretrained
from rtpurbo.settings import Progress

SUFFIX = ".gguf"

_END_TOKENS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "<end_of_turn>")
"""Tokens that end an answer or a text, in whichever model has them."""

Item = TypeVar("Item")

_CONTROL, _USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type`."""


def find_gguf(path: Path) -> Path | None:
    """Returns the GGUF file at `path`, or in a folder without weights of another format.

    Raises:
        RTPurboError: the folder holds several.
    """
    if path.is_file():
        return path if path.suffix.lower() == SUFFIX else None
    if not path.is_dir():
        return None
    content = sorted(path.iterdir())
    if any(file.suffix in (".safetensors", ".bin") for file in content):
        return None
    files = [file for file in content if file.suffix.lower() == SUFFIX]
    if len(files) > 1:
        names = ", ".join(file.name for file in files[:4]) + (", ..." if len(files) > 4 else "")
        raise RTPurboError(
            f"the folder {path} holds {len(files)} GGUF files ({names}); give the path of one."
        )
    return files[0] if files else None


def read_gguf_config(path: Path) -> PretrainedConfig:
    """Reads the configuration of the model in a GGUF file, with the type it is decoded to.

    Raises:
        RTPurboError: the file is damaged, or its model is not supported.
    """
    return gguf_config(read_gguf_header(path))


def decode_gguf(
    path: Path, progress: Progress, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Decodes a GGUF file on the CPU.

    Args:
        path: the file.
        progress: called after each tensor.
        dtype: of the weights; None is `GgufHeader.decoded_dtype`.

    Raises:
        RTPurboError: the file is damaged, or its model is not supported.
    """
    header = read_gguf_header(path)
    config = gguf_config(header)
    # Old versions of transformers have no such option, and always dequantise.
    quantization = getattr(transformers, "GgufConfig", None)
    # Reading the vocabulary comes first, and takes a while.
    progress("decoding", 0, len(header.tensors), {})
    with _reading_once(), _reporting_tensors(progress):
        options = LoadingOptions(
            {"gguf_file": path.name},
            {} if quantization is None else {"quantization_config": quantization(dequantize=True)},
            dtype or header.decoded_dtype(),
        )
        model, decoded = load_pretrained(str(path.parent), options, config=config)
        tokenizer = corrected_tokenizer(decoded, path)
    model.generation_config.eos_token_id = _end_token_ids(header, tokenizer) or None
    return model, tokenizer


def _end_token_ids(header: GgufHeader, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the tokens that end generation: a GGUF file has one, models have several.

    An instruct model whose file names the end of a text would not stop at the end of its turn.
    """
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    named = [header.metadata.get(f"tokenizer.ggml.{key}") for key in keys]
    vocabulary = tokenizer.get_vocab()
    # Only special tokens count; the same characters could be a piece of text elsewhere.
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    known = [vocabulary[token] for token in _END_TOKENS if vocabulary.get(token) in special]
    return list(dict.fromkeys(int(token) for token in [*named, *known] if token is not None))


@contextmanager
def _reading_once() -> Iterator[None]:
    """Makes transformers parse a file once, instead of once for weights and once for the tokenizer.

    Each time takes half a minute where a vocabulary is large.
    """
    package: Any = gguf
    original = package.GGUFReader
    package.GGUFReader = cache(original)
    try:
        yield
    finally:
        package.GGUFReader = original


@contextmanager
def _reporting_tensors(progress: Progress) -> Iterator[None]:
    """Makes transformers report each decoded tensor to `progress` instead of its own progress bar.

    It offers no option for this bar.
    """

    def report(tensors: Sequence[Item], *_: Any, **__: Any) -> Iterable[Item]:
        for done, tensor in enumerate(tensors, start=1):
            yield tensor
            progress("decoding", done, len(tensors), {})

    original = getattr(gguf_reader, "tqdm", None)
    gguf_reader.tqdm = report
    try:
        yield
    finally:
        gguf_reader.tqdm = original


def corrected_tokenizer(tokenizer: PreTrainedTokenizerBase, path: Path) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a GGUF file as a current version of transformers decodes it.

    transformers 5.17 makes a Unigram model of Gemma's vocabulary, which splits text into single characters, and leaves
    out the BOS token. It is a BPE model, whose merges follow from the order of the vocabulary.

    Args:
        tokenizer: as the installed version of transformers decoded it.
        path: the GGUF file.
    """
    if not isinstance(tokenizer, GemmaTokenizer):
        return tokenizer
    if type(tokenizer.backend_tokenizer.model).__name__ != "Unigram":
        return tokenizer
    fields = gguf.GGUFReader(path).fields
    tokens = [str(token) for token in fields["tokenizer.ggml.tokens"].contents()]
    # Runs of spaces are stored as they are, and Gemma replaces each space before it looks up a token.
    tokens = ["▁" * len(token) if " " in token and not token.strip() else token for token in tokens]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    merges = generate_merges(vocabulary, {token: -number for token, number in vocabulary.items()})
    names = ("unk_token", "bos_token", "eos_token", "pad_token", "mask_token")
    corrected = GemmaTokenizer(
        vocab=vocabulary,
        merges=merges,
        add_bos_token=True,
        **{name: token for name in names if (token := getattr(tokenizer, name))},
    )
    corrected.chat_template = tokenizer.chat_template
    kinds = fields["tokenizer.ggml.token_type"].contents()
    for kind in (_CONTROL, _USER_DEFINED):
        is_special = kind == _CONTROL
        corrected.add_tokens(
            [
                AddedToken(token, normalized=False, special=is_special)
                for token, found in zip(tokens, kinds, strict=True)
                if found == kind
            ],
            special_tokens=is_special,
        )
    return corrected

"""Tokenizers of GGUF files that old versions of transformers decode wrongly."""

from __future__ import annotations

from pathlib import Path

import gguf
from transformers import AddedToken, GemmaTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import generate_merges

_CONTROL, _USER_DEFINED = 3, 4
"""Values of `tokenizer.ggml.token_type`."""


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

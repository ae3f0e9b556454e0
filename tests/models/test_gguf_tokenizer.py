"""Gemma's tokenizer as transformers 5.17 decodes it from a GGUF file, and as it should be."""

import gguf
import pytest
from tokenizers.models import Unigram
from transformers import GemmaTokenizer

from rtpurbo.models.gguf import corrected_tokenizer
from tests.tiny_tokenizer import tiny_tokenizer

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<end_of_turn>"]
LETTERS = sorted(set("the cat\n") - {" "})
TOKENS = [*SPECIAL, "\n\n", "  ", "▁", *LETTERS, "th", "the", "▁the", "▁c", "at", "▁cat"]
NORMAL, CONTROL, USER_DEFINED = 1, 3, 4


@pytest.fixture
def file(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "gemma.gguf", "gemma3")
    writer.add_token_list(TOKENS)
    kinds = [CONTROL] * len(SPECIAL) + [USER_DEFINED] + [NORMAL] * (len(TOKENS) - len(SPECIAL) - 1)
    writer.add_token_types(kinds)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "gemma.gguf"


def wrongly_decoded():
    tokenizer = GemmaTokenizer()
    tokenizer.backend_tokenizer.model = Unigram([(token, -1.0) for token in TOKENS], 3, False)
    tokenizer.chat_template = "{{ messages }}"
    return tokenizer


def test_words_become_tokens_after_the_first_one(file):
    corrected = corrected_tokenizer(wrongly_decoded(), file)
    text = "the cat  the\n\nthe<end_of_turn>"
    tokens = corrected.convert_ids_to_tokens(corrected(text).input_ids)
    assert tokens == ["<bos>", "the", "▁cat", "▁▁", "the", "\n\n", "the", "<end_of_turn>"]
    assert corrected.decode(corrected(text).input_ids, skip_special_tokens=True) == text[:-13]
    assert corrected.chat_template == "{{ messages }}"
    assert len(corrected) == len(TOKENS)


def test_other_tokenizers_are_not_changed(file):
    right = GemmaTokenizer()
    assert corrected_tokenizer(right, file) is right
    other = tiny_tokenizer()
    assert corrected_tokenizer(other, file) is other

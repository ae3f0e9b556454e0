import gzip
import json
import os
import random
import sys
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rtpurbo.data.texts import TextCorpus, encode, load_texts
from rtpurbo.errors import RTPurboError
from tests.tiny_tokenizer import tiny_tokenizer

PARAGRAPH = "The quick fox saw the dog. It ran to the hill! Did it come back? Nobody knows.\n\n"


def numbered_document(count, first=0):
    return "".join(f"Sentence number {first + i} stands here.\n\n" for i in range(count))


def test_samples_are_exact_deterministic_and_begin_at_a_sentence():
    tokenizer = tiny_tokenizer()
    corpus = TextCorpus("numbers", (numbered_document(300), numbered_document(300, first=300)))
    samples = [corpus.sample_tokens(tokenizer, 100, random.Random(seed)) for seed in range(20)]
    assert all(len(sample) == 100 for sample in samples)
    assert all(tokenizer.decode(sample).startswith("Sentence number") for sample in samples)
    assert len({tuple(sample) for sample in samples}) > 15
    assert samples[3] == corpus.sample_tokens(tokenizer, 100, random.Random(3))


@given(num_tokens=st.integers(1, 2500), seed=st.integers(0, 99))
def test_any_length_up_to_the_whole_corpus(num_tokens, seed):
    corpus = TextCorpus("numbers", (numbered_document(100), numbered_document(20), PARAGRAPH))
    sample = corpus.sample_tokens(tiny_tokenizer(), num_tokens, random.Random(seed))
    assert len(sample) == num_tokens


def test_text_with_more_characters_per_token_is_long_enough():
    # The first characters make a token each, so the first estimate is far too short.
    corpus = TextCorpus("uneven", ("\u00e9" * 4096 + numbered_document(2000),))
    assert len(corpus.sample_tokens(tiny_tokenizer(), 3000, random.Random(0))) == 3000


def test_consecutive_documents_are_joined():
    tokenizer = tiny_tokenizer()
    corpus = TextCorpus("short", tuple(numbered_document(5, first=5 * i) for i in range(10)))
    text = tokenizer.decode(corpus.sample_tokens(tokenizer, 300, random.Random(0)))
    numbers = [int(word) for word in text.split() if word.isdigit()]
    assert all((b - a) % 50 == 1 for a, b in pairwise(numbers[:-1]))


def test_too_short_a_corpus_says_by_how_much():
    tokenizer = tiny_tokenizer()
    corpus = TextCorpus("fox tales", (PARAGRAPH,))
    with pytest.raises(RTPurboError) as error:
        corpus.sample_tokens(tokenizer, 10_000, random.Random(0))
    actual = len(encode(tokenizer, PARAGRAPH + "\n\n"))
    for part in ("fox tales", f"only {actual} tokens", "10,000"):
        assert part in str(error.value)


def test_built_in_text_is_long_fixed_and_shares_no_paragraph():
    train, held_out = load_texts(None, "train"), load_texts(None, "heldout")
    [train_text], [held_out_text] = train.documents, held_out.documents
    share = len(held_out_text) / (len(held_out_text) + len(train_text))
    assert len(train_text) > 200_000
    assert 0.1 <= share <= 0.25
    assert not set(train_text.split("\n\n")) & set(held_out_text.split("\n\n"))
    assert train == load_texts(None, "train")
    assert not any(set(line) <= set("*=-~") for line in train_text.split("\n") if line)


def test_held_out_part_is_the_last_documents(tmp_path):
    path = tmp_path / "many.jsonl"
    documents = [numbered_document(10, first=10 * i) for i in range(20)]
    path.write_text("\n".join(json.dumps({"text": text}) for text in documents) + "\n\n")
    train, held_out = load_texts([str(path)], "train"), load_texts([str(path)], "heldout")
    assert train.documents + held_out.documents == tuple(documents)
    assert len(held_out.documents) == 4


def test_held_out_part_of_one_document_is_its_tail(tmp_path):
    path = tmp_path / "one.md"
    path.write_text(numbered_document(100))
    [train], [held_out] = (load_texts([str(path)], part).documents for part in ("train", "heldout"))
    assert f"{train}\n\n{held_out}" == numbered_document(100)
    assert 0.1 <= len(held_out) / len(train + held_out) <= 0.25


def test_several_sources_and_compression(tmp_path):
    compressed = tmp_path / "a.jsonl.gz"
    compressed.write_bytes(gzip.compress(json.dumps({"text": PARAGRAPH * 50}).encode()))
    plain = tmp_path / "b.txt"
    plain.write_text("Last words. " * 70)
    corpus = load_texts([str(compressed), str(plain)], "heldout")
    assert corpus.documents == (plain.read_text(),)
    assert "a.jsonl.gz" in corpus.name
    assert "b.txt" in corpus.name


@pytest.mark.parametrize(
    ("file_name", "content", "message"),
    [
        ("missing.txt", None, "no text file"),
        ("empty.txt", b" \n", "is empty"),
        ("tiny.txt", b"W", "too short to be split"),
        ("binary.txt", b"\xff\xfe\x00", "cannot read"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}', mtime=0)[:-9], "cannot read"),
        ("not-compressed.jsonl.gz", b"{}", "cannot read"),
        ("wrong.jsonl", b'{"body": "a"}\n', 'Line 1 of .* no field "text"'),
        ("list.jsonl", b'{"text": "a"}\n[1]\n', "Line 2"),
        ("broken.jsonl", b'{"text": \n', "Line 1 of .* is not JSON"),
        ("unknown.docx", b"text", "unknown kind"),
    ],
)
def test_bad_files_are_named_in_one_sentence(tmp_path, file_name, content, message):
    path = tmp_path / file_name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RTPurboError, match=message) as error:
        load_texts([str(path)], "train")
    assert file_name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_report_without_sources_is_refused():
    with pytest.raises(RTPurboError, match="no text source"):
        load_texts([])


def test_hub_datasets(monkeypatch):
    calls = []

    def load_dataset(name, configuration, split):
        calls.append((name, configuration, split))
        if name == "nobody/nothing":
            raise FileNotFoundError("Dataset not found.\nMore lines.")
        column = "body" if name == "wrong/column" else "text"
        texts = [PARAGRAPH] * 10
        return type("Dataset", (dict,), {"column_names": [column]})({column: texts})

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for source in ("hf:a/b", "hf:a/b:test", "hf:a/b:large:test"):
        assert len(load_texts([source]).documents) == 8
    assert calls == [("a/b", None, "train"), ("a/b", None, "test"), ("a/b", "large", "test")]
    with pytest.raises(RTPurboError, match="Dataset not found;"):
        load_texts(["hf:nobody/nothing"])
    with pytest.raises(RTPurboError, match='no column "text", only body'):
        load_texts(["hf:wrong/column"])
    with pytest.raises(RTPurboError, match="does not name a dataset"):
        load_texts(["hf:a:b:c:d"])


def test_missing_package_is_explained(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").touch()
    for source in ("hf:a/b", str(tmp_path / "a.parquet")):
        with pytest.raises(RTPurboError, match=r"rtpurbo\[data\]"):
            load_texts([source])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "\\ud800 half"}', "Line 2 of .* surrogate pair"),
        ('{"text": "a", "n": ' + "9" * 5000 + "}", "Line 2 of .*4300 digits"),
        ("[" * 100_000, "Line 2 of .* nested too deeply"),
    ],
)
def test_undecodable_lines_are_named(tmp_path, line, message):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(RTPurboError, match=message):
        load_texts([str(path)])


def test_pipes_and_devices_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name in ("pipe.txt", "zero.txt"):
        with pytest.raises(RTPurboError, match="not a regular file"):
            load_texts([str(tmp_path / name)])


def test_a_compressed_text_out_of_all_proportion_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "bomb.jsonl.gz"
    monkeypatch.setattr("rtpurbo.data.texts._LEAST_EXPANDED", 1000)
    line = json.dumps({"text": "word " * 20}) + "\n"
    with gzip.open(path, "wt") as file:
        file.write(line * 8)
    assert len(load_texts([str(path)]).documents) > 0
    for bomb in (line * 10_000, '{"text": "' + "a" * 2_000_000 + '"}'):
        with gzip.open(path, "wt") as file:
            file.write(bomb)
        with pytest.raises(RTPurboError, match="expands to more than 200 times its size"):
            load_texts([str(path)])

"""Streams of text: every document once a pass, in parts, and from where they were left."""

import gzip
import json
import random

import pytest

from rtpurbo.data.stream import open_stream
from rtpurbo.data.texts import TextCorpus
from rtpurbo.errors import RTPurboError
from tests.tiny_tokenizer import tiny_tokenizer

datasets = pytest.importorskip("datasets")
pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("pyarrow.parquet")

HELD_OUT, COUNT = 3, 40


def document(number):
    return f"Document {number} tells of the magic number {number * number}. " * (5 + number % 7)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "texts.jsonl.gz"
    with gzip.open(path, "wt") as lines:
        for number in range(COUNT):
            lines.write(json.dumps({"text": document(number), "number": number}) + "\n")
    return path


@pytest.fixture
def stream(file):
    return open_stream([str(file)], buffer_size=8, held_out=HELD_OUT, seed=0)


def take(lane, count):
    return [lane.next_document() for _ in range(count)]


def test_every_document_once_a_pass_in_an_order_of_its_own(stream):
    lane, size = stream.lane(0, 1), COUNT - HELD_OUT
    first, second = take(lane, size), take(lane, size)
    in_order = [document(number) for number in range(HELD_OUT, COUNT)]
    assert sorted(first) == sorted(second) == sorted(in_order)
    assert first != in_order
    assert first != second
    assert first == take(stream.lane(0, 1), size)
    # Shuffled within the buffer, not beyond it.
    assert sorted(first[:8]) == sorted(in_order[:8])


def test_parts_share_the_documents(stream):
    parts = [take(stream.lane(number, 3), 12) for number in range(3)]
    texts = [text for part in parts for text in part]
    assert len(set(texts)) == 36
    assert not set(texts) & set(stream.held_out.documents)


@pytest.mark.parametrize("taken", [0, 1, 7, 8, 20, 36, 37, 38, 74, 80])
def test_a_position_is_exact(stream, taken):
    lane = stream.lane(0, 1)
    take(lane, taken)
    position = json.loads(json.dumps(lane.position()))
    expected = take(lane, 90)
    resumed = stream.lane(0, 1)
    take(resumed, 5)
    resumed.seek(position)
    assert resumed.position() == position
    assert take(resumed, 90) == expected


def test_the_beginning_is_kept_in_memory(stream):
    assert stream.held_out.documents == tuple(document(number) for number in range(HELD_OUT))
    assert stream.opening.documents == tuple(
        document(number) for number in range(HELD_OUT, 2 * HELD_OUT)
    )
    assert isinstance(stream.opening, TextCorpus)


def test_prose_is_cut_from_one_document_or_joined_from_several(stream):
    tokenizer, rng = tiny_tokenizer(), random.Random(0)
    lane = stream.lane(0, 1)
    short = lane.sample_tokens(tokenizer, 20, rng)
    assert len(short) == 20
    assert lane.position()["taken"] == 1
    long = lane.sample_tokens(tokenizer, 900, rng)
    assert len(long) == 900
    assert lane.position()["taken"] > 3
    with pytest.raises(RTPurboError, match=r"has only .* tokens"):
        lane.sample_tokens(tokenizer, 100_000, rng)


def test_kinds_of_files_and_several_sources(tmp_path, file, monkeypatch):
    # The library waits for the threads of its Parquet reader.
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    text, table = tmp_path / "book.txt", tmp_path / "table.parquet"
    text.write_text("A book.\n\nWith two paragraphs.")
    rows = pyarrow.table({"text": ["row 1", "row 2", " "], "other": [1, 2, 3]})
    pyarrow.parquet.write_table(rows, table)
    both = open_stream([str(table), str(text), str(file)], buffer_size=4, held_out=1)
    texts = take(both.lane(0, 1), COUNT + 2)
    assert both.held_out.documents == ("row 1",)
    assert {"row 2", "A book.\n\nWith two paragraphs.", document(0)} <= set(texts)
    assert len(set(texts)) == COUNT + 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "no text file"),
        ("a.docx", b"x", "unknown kind"),
        ("few.jsonl", b'{"text": "a"}\n{"text": "b"}\n', "no more than the 2 documents"),
        ("wrong.jsonl", b'{"body": "a"}\n', 'no field "text", only body'),
        ("broken.jsonl", b'{"text": \n', "cannot read the texts"),
        ("broken.parquet", b"0123", "cannot read the texts"),
        ("empty.jsonl", b"", "few|empty|cannot read|no field|no more"),
    ],
)
def test_bad_texts_are_named_in_one_sentence(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(RTPurboError, match=message) as caught:
        open_stream([str(path)], held_out=2)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(RTPurboError, match="--data"):
        open_stream(None)

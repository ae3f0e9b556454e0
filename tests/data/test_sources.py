import gzip
import json
import os
import sys
from types import SimpleNamespace

import pytest

from rtpurbo.data.texts import load_texts
from rtpurbo.errors import RTPurboError

PARAGRAPH = "The quick fox saw the dog. It ran to the hill! Did it come back? Nobody knows.\n\n"


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
    monkeypatch.setattr("rtpurbo.data.sources._LEAST_EXPANDED", 1000)
    line = json.dumps({"text": "word " * 20}) + "\n"
    with gzip.open(path, "wt") as file:
        file.write(line * 8)
    assert len(load_texts([str(path)]).documents) > 0
    for bomb in (line * 10_000, '{"text": "' + "a" * 2_000_000 + '"}'):
        with gzip.open(path, "wt") as file:
            file.write(bomb)
        with pytest.raises(RTPurboError, match="expands to more than 200 times its size"):
            load_texts([str(path)])

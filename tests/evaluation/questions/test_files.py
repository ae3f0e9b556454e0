import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.questions.suite import read_rows
from tests.evaluation.questions.support import ROWS, write_questions

COLUMNS = {"question": str, "answer": str}


def test_plain_and_compressed_lines_are_read(tmp_path):
    paths = write_questions(tmp_path, ("gsm8k", "math"))
    assert {path.suffix for path in paths.values()} == {".gz", ".jsonl"}
    for suite, path in paths.items():
        assert read_rows(suite, path, {}) == ROWS[suite]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.jsonl", b'{"question": "a", "answer": "b"}\n{"question"', "line 2 of .* is not JSON"),
        ("a.jsonl", b'{"question": "a", "answer": 3}', "no column 'answer' of type str"),
        ("a.jsonl", b'\n{"question": "a"}', "line 2 of .* no column 'answer'"),
        ("a.jsonl", b"[1]", "is not a JSON object"),
        ("a.jsonl", b"\n\n", "has no questions of gsm8k"),
        ("a.jsonl", b"\xff\xfe", "cannot read the questions of gsm8k"),
        ("a.jsonl.gz", b"plain", "cannot read the questions of gsm8k"),
        ("a.parquet", b"PAR1", "come from a .jsonl or .jsonl.gz file"),
        ("missing.jsonl", None, "there is no file .*missing.jsonl with questions of gsm8k"),
    ],
)
def test_malformed_files_are_refused_in_one_sentence(tmp_path, name, content, sentence):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(RTPurboError, match=sentence):
        read_rows("gsm8k", tmp_path / name, COLUMNS)

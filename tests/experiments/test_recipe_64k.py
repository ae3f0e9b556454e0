import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "recipes" / "smollm2-64k"))

import make_teacher

from tests.data.test_needles import corpus
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

LENGTHS = (2048, 4096)


def answered(path, samples=2):
    model = tiny_model(vocab_size=512)
    return make_teacher.answers_of(model, tiny_tokenizer(), corpus(), LENGTHS, samples, path)


def test_each_stage_reaches_its_context_and_goes_beyond_the_one_before():
    contexts = [settings.context for settings in make_teacher.STAGES.values()]
    assert contexts == sorted(set(contexts))
    assert contexts[-1] == max(make_teacher.LENGTHS) == 65536
    for settings in make_teacher.STAGES.values():
        assert max(settings.lengths) == settings.context
        assert settings.batch_tokens * settings.batches_per_step == settings.tokens


def test_questions_that_were_answered_are_not_asked_again(tmp_path, monkeypatch):
    whole = answered(tmp_path / "whole.json")
    predicted, asked = make_teacher.is_predicted, []

    def interrupted(model, example):
        asked.append(example.prompt_ids)
        if len(asked) == 6:
            raise KeyboardInterrupt
        return predicted(model, example)

    monkeypatch.setattr(make_teacher, "is_predicted", interrupted)
    with pytest.raises(KeyboardInterrupt):
        answered(tmp_path / "cut.json")
    assert answered(tmp_path / "cut.json")["right"] == whole["right"]
    # Four answers were kept; of the question that was cut, one had to be asked again.
    tasks = len(make_teacher.TASKS)
    assert len(asked) == tasks * 2 * len(LENGTHS) + 2


def test_the_table_has_a_row_for_each_length():
    right = {"4 keys": [True, True], "variables": [False, True]}
    lines = make_teacher.table({"right": {"8192": right, "65536": right}}).splitlines()
    assert lines[2].startswith("| 8K | 100 | 50 | 75 (")
    assert lines[3].startswith("| 64K | 100 | 50 | 75 (")

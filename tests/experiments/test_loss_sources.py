import json

import pytest
from loss_sources import main

from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

TASKS = ["niah_single_1", "niah_multikey_2"]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    tiny_model(vocab_size=512, max_position_embeddings=4096).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["loss_sources.py", *map(str, arguments)])
    main()


def test_variants_are_compared_with_the_dense_model(monkeypatch, model, tmp_path):
    common = ["--device", "cpu", "--window", 128]
    for name, by in (("gates", "gates-group"), ("copies", "copies")):
        options = ["--by", by, "--length", 512, "--steps", 2]
        run(monkeypatch, "rank", model, *common, *options, "-o", tmp_path / f"{name}.json")
    asked = ["--lengths", 2048, "--tasks", *TASKS, "--samples", 2]
    asked += ["--questions", tmp_path / "questions"]
    run(monkeypatch, "questions", model, *common, *asked)
    assert len(list((tmp_path / "questions").iterdir())) == len(TASKS)
    maps = [f"{tmp_path}/gates.json:kv_group:1", f"{tmp_path}/copies.json:query_head:0.25"]
    output = tmp_path / "table.json"
    every = [option for each in maps for option in ("--map", each)]
    run(monkeypatch, "measure", model, *common, *asked, *every, "-o", output)
    table = json.loads(output.read_text())
    assert set(table) == {"gates:kv_group:1", "copies:query_head:0.25", "windows"}
    for figures in table.values():
        assert set(figures) == {f"2048 {task}" for task in TASKS}
    for key in table["windows"]:
        divergence, agreement, _, questions = table["gates:kv_group:1"][key]
        # Every head is kept, so only rounding is left.
        assert divergence < 1e-4
        assert agreement == 1
        assert questions == 2
        assert table["windows"][key][0] > 0.01

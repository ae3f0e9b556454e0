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
    for name, by in (("gates", "gates-group"), ("copies", "induction")):
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
        assert set(figures) == {"1024 prose", *(f"2048 {task}" for task in TASKS)}
    for key in set(table["windows"]) - {"1024 prose"}:
        divergence, agreement, _, questions = table["gates:kv_group:1"][key]
        # Every head is kept, so only rounding is left.
        assert divergence < 1e-4
        assert agreement == 1
        assert questions == 2
        assert table["windows"][key][0] > 0.01


def test_artifacts_are_measured_with_each_rule(monkeypatch, tiny_base, tiny_artifact, tmp_path):
    rules = [{}, {"top_p": 0.5}, {"top_p": 1.0}]
    run(
        monkeypatch, "measure", tiny_base, "--device", "cpu", "--lengths", 768, "--samples", 1,
        "--tasks", TASKS[0], "--artifact", tiny_artifact,
        *(option for rule in rules for option in ("--rule", json.dumps(rule))),
        "-o", tmp_path / "table.json",
    )  # fmt: skip
    table = json.loads((tmp_path / "table.json").read_text())
    name = tiny_artifact.name
    assert list(table) == [
        f"{name} stage2={stage2} {json.dumps(rule)}" for stage2 in (False, True) for rule in rules
    ]
    figures = {key: rows[f"768 {TASKS[0]}"][0] for key, rows in table.items()}
    assert len(set(figures.values())) == len(figures)


def test_stage_2_is_measured_before_and_after(monkeypatch, model, tmp_path):
    common = ["--device", "cpu", "--window", 128]
    run(
        monkeypatch,
        "rank",
        model,
        *common,
        "--by",
        "induction",
        "--length",
        512,
        "-o",
        tmp_path / "a.json",
    )
    options = [
        "--lengths",
        1024,
        "--tasks",
        TASKS[0],
        "--samples",
        1,
        "--map",
        f"{tmp_path}/a.json:kv_group:0.5:64:8",
    ]
    training = [
        "--steps",
        2,
        "--train-lengths",
        512,
        "--shares",
        "needles=.5",
        "--learning-rate",
        0.1,
    ]
    output = tmp_path / "table.json"
    run(monkeypatch, "distill", model, *common, *options, *training, "-o", output)
    table = json.loads(output.read_text())
    name = "a:kv_group:0.5:64:8"
    assert list(table) == [
        f"{name} before",
        f"{name} stage 2, scale 0.5",
        f"{name} stage 2, scale 1.0",
    ]
    before, half, whole = (figures["1024 niah_single_1"][0] for figures in table.values())
    assert len({before, half, whole}) == 3

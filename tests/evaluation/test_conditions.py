import json
import shutil

import pytest
import torch

from rtpurbo.data.texts import TextCorpus
from rtpurbo.evaluation.conditions import _DIFFERENCES, conditions_of, differences
from rtpurbo.evaluation.policies import Source
from rtpurbo.evaluation.ruler.materials import Materials
from rtpurbo.models.artifact_config import CARD_FILE, CONFIG_FILE, INDEXER_FILE, LOG_FILE
from rtpurbo.models.stage2_weights import ADAPTER_FOLDER
from tests.evaluation.support import conditions

CORPUS = TextCorpus("two", ("One document.", "Another document."))


@pytest.fixture
def copy(tiny_artifact, tmp_path):
    return shutil.copytree(tiny_artifact, tmp_path / "copy")


def of(folder, corpus=CORPUS, squad=None, **options):
    source = Source(folder, torch.device("cpu"), torch.bfloat16, seed=3)
    return conditions_of(source, corpus, Materials.of(corpus, squad), **options)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"artifact": "x"}, "another artifact"),
        ({"prose": "x"}, "other prose (--data)"),
        ({"words": "wonderwords 3.0.1"}, "the words of rtpurbo in RULER, not of wonderwords 3.0.1"),
        ({"single_hop": "x"}, "other questions of ruler:qa_1 (--squad)"),
        ({"two_hop": "x"}, "other questions of ruler:qa_2 (--hotpotqa)"),
        ({"task_data": {}}, "other questions (--task-data)"),
        ({"max_new_tokens": 5}, "--max-new-tokens left out, not 5"),
        ({"seed": 1}, "--seed 0, not 1"),
        ({"cache_length": 8192}, "cache sizes computed at the length left out, not 8192"),
        ({"dtype": "bfloat16"}, "--dtype float32, not bfloat16"),
        ({"device": "cuda 9.0"}, "a device of the kind cpu, not cuda 9.0"),
        ({"rtpurbo": "0.2.0"}, "rtpurbo 0.1.0, not 0.2.0"),
        ({"torch": "2.12.0"}, "torch 2.11.0, not 2.12.0"),
        ({"transformers": "6.0"}, "transformers 5.17.0, not 6.0"),
        ({"lm_eval": "0.4.13"}, "lm-eval left out, not 0.4.13"),
    ],
)
def test_every_condition_has_a_description(change, words):
    assert differences(json.loads(json.dumps(conditions())), conditions(**change)) == [words]


def test_equal_conditions_have_no_differences(copy):
    before = json.loads(json.dumps(conditions()))
    assert differences(before, conditions()) == []
    assert list(before) == list(_DIFFERENCES) == list(of(copy))
    del before["seed"]
    assert differences(before, conditions()) == ["--seed left out, not 0"]
    assert of(copy) == of(copy)


def test_data_is_compared_by_content_and_not_by_path(copy, tmp_path):
    first = of(copy)
    assert (first["seed"], first["dtype"], first["device"]) == (3, "bfloat16", "cpu")
    moved = copy.rename(tmp_path / "moved")
    for name in (CARD_FILE, LOG_FILE, "results.json"):
        (moved / name).write_text("new")
    assert of(moved) == first


@pytest.mark.parametrize(
    "name", [CONFIG_FILE, INDEXER_FILE, f"{ADAPTER_FOLDER}/adapter_model.safetensors"]
)
def test_the_digest_of_an_artifact_covers_all_deciding_files(copy, name):
    first = of(copy)
    path = copy / name
    path.write_bytes(path.read_bytes() + b" ")
    assert of(copy)["artifact"] != first["artifact"]


def test_the_digest_of_prose_includes_document_boundaries(copy):
    joined = TextCorpus("one", ("".join(CORPUS.documents),))
    assert of(copy, joined)["prose"] != of(copy)["prose"]


def test_questions_and_data_of_tasks(copy, tmp_path):
    article = {"context": "A fox ran.", "qas": [{"question": "Who?", "answers": [{"text": "fox"}]}]}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"data": [{"title": "Foxes", "paragraphs": [article]}]}))
    assert of(copy, squad=path)["single_hop"] != of(copy)["single_hop"]
    assert of(copy, squad=path)["two_hop"] == of(copy)["two_hop"]

    digests = []
    for content in ("one", "two"):
        (tmp_path / "tasks").mkdir(exist_ok=True)
        (tmp_path / "tasks" / "test.jsonl").write_text(content)
        data = {"whole": tmp_path / "tasks", "single": str(tmp_path / "tasks" / "test.jsonl")}
        digests.append(of(copy, task_data=data)["task_data"])
    assert all(digests[0][task] != digests[1][task] for task in ("whole", "single"))

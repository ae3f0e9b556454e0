import json
import shutil
from dataclasses import replace

import pytest
import torch
from head_elimination import Sequence, main, ranked, search

from rtpurbo.calibration.answer_sequences import AnswerSequences, answer_positions
from rtpurbo.calibration.calibrate import read_calibration
from rtpurbo.calibration.gates import gated_answers, gated_model
from rtpurbo.config import AttentionRule
from rtpurbo.data.texts import load_texts
from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.training.source import random_access
from rtpurbo.training.teacher import top_logits_divergence
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

RULE = AttentionRule(
    num_sink_tokens=36, sliding_window=96, num_heavy_hitters=32, dense_prompt_tokens=4096
)


@pytest.fixture
def conversation():
    corpus = random_access(load_texts(None, "train"))
    source = AnswerSequences(tiny_tokenizer(), corpus, (900,), 0, {"needles": 1.0})
    return next(each for each in map(source.sequence, range(9)) if len(each.answer_spans) > 1)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return tiny_model(vocab_size=512, max_position_embeddings=4096).eval()


@pytest.mark.parametrize("kept", [(), ((0, 0),), ((0, 0), (1, 1))])
def test_answers_are_those_of_closed_gates(model, conversation, kept):
    positions = answer_positions(conversation)
    ids = torch.tensor([conversation.input_ids])
    with torch.no_grad(), gated_model(model, RULE, per_group=True) as gates:
        for layer, gate in gates.items():
            gate.copy_(torch.tensor([float((layer, head) in kept) for head in range(len(gate))]))
        with gated_answers(model, RULE, gates, conversation):
            found = model(ids, use_cache=False).logits[0, positions].log_softmax(-1)
        sequence = Sequence(model, gates, "needles", conversation, RULE)
        assert sequence.begin > 700
        student = found.gather(1, sequence.targets.token_ids)
        expected = top_logits_divergence(student, sequence.targets).mean().item()
        assert expected > 1e-5
        assert sequence.divergence(frozenset(kept)) == pytest.approx(expected, rel=1e-3)
        every = frozenset((layer, head) for layer in gates for head in range(len(gates[layer])))
        assert sequence.divergence(every) == pytest.approx(0.0, abs=1e-6)
        assert sequence.divergence(frozenset()) > 1e-5


def test_the_search_keeps_the_heads_that_matter():
    matter = {(0, 1): 4.0, (1, 0): 2.0, (2, 1): 1.0}

    def loss(kept):
        return sum(cost for head, cost in matter.items() if head not in kept)

    every = [(layer, head) for layer in range(3) for head in range(2)]
    found = search(loss, every[:5], every[5:], keep=3, per_round=2, swaps=1)
    assert set(found[:3]) == set(matter)
    assert sorted(found) == every


def test_the_output_is_a_head_map(monkeypatch, tiny_artifact, tmp_path):
    output, artifact = tmp_path / "map.json", tmp_path / "scored"
    shutil.copytree(tiny_artifact, artifact)
    stored = ArtifactConfig.read(artifact)
    heads = stored.config.head_map.retrieval_heads
    scores = tuple(tuple(float(head in row) for head in range(6)) for row in heads)
    scored = replace(stored.config.head_map, scores=scores)
    replace(stored, config=replace(stored.config, head_map=scored)).write(artifact)
    arguments = [artifact, "-o", output, "--device", "cpu", "--length", 512]
    arguments += ["--sequences", 4, "--held-out", 4, "--keep", 2, "--extra", 1, "--swaps", 1]
    monkeypatch.setattr("sys.argv", ["head_elimination.py", *map(str, arguments)])
    main()
    head_map = read_calibration(output).head_map
    kept = {(layer, head // head_map.group_size(layer)) for layer in head_map.converted_layers
            for head in head_map.retrieval_heads[layer]}  # fmt: skip
    assert len(kept) == 2
    assert set(ranked(head_map)[:2]) == kept
    assert "found, 2" in json.loads(output.read_text())["held_out"]

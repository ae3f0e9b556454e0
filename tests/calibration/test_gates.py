"""Gates of heads, on random models and on a model whose retrieval head is known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rtpurbo.calibration import gates as gates_module
from rtpurbo.calibration.calibrate import calibrate
from rtpurbo.calibration.gates import SharedScaleDescent, project, train_gates
from rtpurbo.config import AttentionRule, RTPurboConfig
from rtpurbo.data.prompts import Conversation
from rtpurbo.data.texts import load_texts
from rtpurbo.errors import RTPurboError
from rtpurbo.models.runtime import Runtime
from rtpurbo.models.sparse_layers import is_sparse
from rtpurbo.models.sparsify import empty_head_map, runtime, sparsify
from rtpurbo.ops.eager.heavy_hitters import OBSERVED_QUERIES
from rtpurbo.settings import CalibrationSettings
from rtpurbo.training import teacher
from tests.calibration.copying import LENGTH, RULE, Copies, copying_model
from tests.tiny_models import FAMILIES, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer


def logits(model, seed=0, length=LENGTH):
    ids = torch.randint(64, (1, length), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_are_dense_and_closed_ones_windows(family):
    model = tiny_model(family)
    dense = logits(model)
    sparsify(model, RTPurboConfig(empty_head_map(model), RULE))
    windows = logits(model)
    layers = range(model.config.num_hidden_layers)
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    for value, expected in ((1.0, dense), (0.0, windows)):
        for count in (heads, kv_heads):
            with runtime(model).gated({layer: torch.full((count,), value) for layer in layers}):
                torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
                with runtime(model).dense():  # gates do not reach the dense model
                    torch.testing.assert_close(logits(model), dense, atol=1e-4, rtol=1e-4)
    assert (windows - dense).abs().max() > 0.01
    assert torch.equal(logits(model), windows)


@pytest.mark.parametrize("heavy_hitters", [0, 20])
def test_gates_of_answers_are_windows_after_dense_prompts(heavy_hitters):
    model = tiny_model()
    dense = logits(model)
    rule = AttentionRule(
        num_sink_tokens=22,
        sliding_window=64,
        dense_prompt_queries=LENGTH,
        num_heavy_hitters=heavy_hitters,
    )
    sparsify(model, RTPurboConfig(empty_head_map(model), rule))
    gates = {layer: torch.zeros(3) for layer in range(model.config.num_hidden_layers)}
    with runtime(model).decoding_last(9):
        generated = logits(model)
    with runtime(model).gated(gates, [(LENGTH - 9, LENGTH)]):
        torch.testing.assert_close(logits(model), generated, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(generated[:, -9:], dense[:, -9:], atol=1e-2)
    # An earlier answer is one too, and the queries of the next prompt are dense again.
    with runtime(model).gated(gates, [(120, 130), (LENGTH - 9, LENGTH)]):
        found = logits(model)
    torch.testing.assert_close(found[:, :120], dense[:, :120], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[:, 120:130], dense[:, 120:130], atol=1e-2)


@pytest.mark.parametrize("answers", [[(200, 210)], []])
@pytest.mark.parametrize("dense_prompt_queries", [0, LENGTH])
def test_gates_act_on_answers_where_prompts_are_dense(dense_prompt_queries, answers, monkeypatch):
    seen = []
    gated = Runtime.gated

    def noted(self, gates, answer_spans=None, prompt=None):
        # As positions of the whole sequence.
        begin = prompt[0][0].shape[2] if prompt else 0
        seen.append(answer_spans and [(first + begin, end + begin) for first, end in answer_spans])
        return gated(self, gates, answer_spans, prompt)

    monkeypatch.setattr(Runtime, "gated", noted)
    rule = AttentionRule(
        num_sink_tokens=2, sliding_window=64, dense_prompt_queries=dense_prompt_queries
    )
    conversation = Conversation(list(range(2, 64)) * 4, answers)
    source = type("Source", (), {"sequence": lambda self, number: conversation})()
    found = train_gates(tiny_model(), source, rule, steps=2, ratio=0.5, per_group=True)
    assert seen == [(answers or [(124, 248)]) if dense_prompt_queries else None] * 2
    assert sum(gate.sum() for gate in found.values()) <= 6.01


@pytest.mark.parametrize("answers", [[(150, 162), (200, 210)], []])
@pytest.mark.parametrize("heavy_hitters", [0, 20])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_prompt_is_read_once(family, heavy_hitters, answers, monkeypatch):
    rule = AttentionRule(
        num_sink_tokens=2 + heavy_hitters,
        sliding_window=64,
        num_heavy_hitters=heavy_hitters,
        dense_prompt_tokens=LENGTH,
    )
    ids = torch.randint(64, (248,), generator=torch.Generator().manual_seed(1)).tolist()
    conversation = Conversation(ids, answers)
    source = type("Source", (), {"sequence": lambda self, number: conversation})()
    lengths, updates = [], []
    decoder_inputs = teacher.states_at

    def noted(model, input_ids, *arguments):
        lengths.append(len(input_ids))
        return decoder_inputs(model, input_ids, *arguments)

    for module in ("rtpurbo.training.stage2", "rtpurbo.training.teacher"):
        monkeypatch.setattr(f"{module}.states_at", noted)
    step = SharedScaleDescent.step

    def stepped(self):
        updates.append(torch.cat([gate.grad.clone() for gate in self.param_groups[0]["params"]]))
        return step(self)

    monkeypatch.setattr(SharedScaleDescent, "step", stepped)
    first = answers[0][0] if answers else 124
    # Gemma 3 has layers with windows of their own, whose keys and values are not kept.
    for begin in (0 if family == "gemma3_text" else first - OBSERVED_QUERIES, 0):
        if not begin:
            monkeypatch.setattr(gates_module, "prompt_length", lambda *_: 0)
        train_gates(tiny_model(family), source, rule, steps=1, ratio=0.5, per_group=True)
        assert lengths[-2:] == [248, 248 - begin]
    assert updates[0].abs().max() > 1e-5
    torch.testing.assert_close(*updates, rtol=1e-3, atol=1e-6)


def test_a_gate_of_a_kv_head_is_that_of_all_its_query_heads():
    model = tiny_model()
    sparsify(model, RTPurboConfig(empty_head_map(model), RULE))
    by_group = torch.tensor([0.2, 0.9, 0.5])
    found = []
    for gates in (by_group, by_group.repeat_interleave(2)):
        with runtime(model).gated({0: gates, 1: gates}):
            found.append(logits(model))
    assert torch.equal(*found)


values = st.lists(st.floats(-2, 3, width=32), min_size=1, max_size=12)


@given(values, st.floats(0, 1))
def test_projection(numbers, share):
    budget = share * len(numbers)
    before = torch.tensor(numbers)
    gates = [before[:1].clone(), before[1:].clone()]
    project(gates, budget)
    after = torch.cat(gates)
    assert ((after >= 0) & (after <= 1)).all()
    assert after.sum() <= budget + 1e-4
    clamped = before.clamp(0, 1)
    if clamped.sum() <= budget:
        assert torch.equal(after, clamped)
    else:
        # All of the budget is used, and the order is kept.
        assert after.sum() == pytest.approx(budget, abs=1e-3)
        order = before.argsort()
        assert (after[order].diff() >= -1e-6).all()


def descend(gradients):
    """Two gates of .5 after steps with these gradients."""
    gates = [torch.tensor([0.5], requires_grad=True), torch.tensor([0.5], requires_grad=True)]
    descent = SharedScaleDescent(gates)
    for step in gradients:
        for gate, gradient in zip(gates, step, strict=True):
            gate.grad = torch.tensor([gradient])
        descent.step()
        project(gates, 1.0)
        assert all(gate.grad is None for gate in gates)
    return [gate.item() for gate in gates]


def test_a_rare_large_effect_outweighs_a_constant_small_one():
    rare, constant = descend([(0.0 if step % 8 else -1.0, -0.03) for step in range(60)])
    assert rare > 0.8
    assert constant < 0.2


def test_one_sequence_does_not_decide_the_choice():
    # The last gradient is a thousand times the others' size, and counts five times.
    before, _ = descend([(-0.1, 0.0)] * 5)
    after, other = descend([(-0.1, 0.0)] * 5 + [(0.0, -100.0)])
    assert after - other > 0.5 * (2 * before - 1)


def test_open_gates_do_not_set_the_scale():
    gates = [torch.ones(1, requires_grad=True), torch.tensor([0.5], requires_grad=True)]
    descent = SharedScaleDescent(gates)
    gates[0].grad, gates[1].grad = torch.tensor([-1000.0]), torch.tensor([-0.1])
    descent.step()
    project(gates, 2.0)
    assert gates[0].item() == 1
    assert gates[1].item() > 0.52


@pytest.mark.parametrize("per_group", [True, False])
def test_the_head_that_answers_need_stays_open(per_group):
    model = copying_model()
    gates = train_gates(
        model, Copies(), RULE, steps=30, ratio=1 / (6 if per_group else 12), per_group=per_group
    )
    scores = torch.stack([gates[0], gates[1]])
    needed = scores[1, 3]
    others = torch.cat([scores[0], scores[1, :2], scores[1, 4:]])
    assert needed > others.max() + 0.1
    assert (scores >= 0).all()
    assert (scores <= 1).all()
    if per_group:
        assert torch.equal(scores[1, 2], scores[1, 3])
    assert not is_sparse(model)
    assert not model.training
    assert not any(weight.requires_grad for weight in model.parameters())


def test_the_head_map_that_gates_give():
    corpus = load_texts(None, "train")
    model = tiny_model(vocab_size=512, max_position_embeddings=1024)
    settings = CalibrationSettings(
        length=512, num_documents=3, ratio=0.5, granularity="kv_group", ranking="gates"
    )

    def found(seed=0):
        return calibrate(model, tiny_tokenizer(), corpus, settings, rule=RULE, seed=seed).head_map

    head_map = found()
    assert head_map.num_full_key_value_heads == 3
    assert head_map.num_retrieval_heads == 6  # whole groups
    assert found() == head_map
    assert found(seed=1).scores != head_map.scores


def test_a_model_without_finite_numbers():
    model = tiny_model()
    model.model.layers[0].mlp.down_proj.weight.data.fill_(float("inf"))
    with pytest.raises(RTPurboError, match="step 1 of the gates is nan: try --dtype float32"):
        train_gates(model, Copies64(), RULE, steps=2, ratio=0.5, per_group=True)
    assert not is_sparse(model)


class Copies64(Copies):
    """The same of 64 tokens of vocabulary."""

    def sequence(self, number):
        drawn = super().sequence(number)
        return Conversation([token % 64 for token in drawn.input_ids], drawn.answer_spans)

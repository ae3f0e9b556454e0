"""Stage 2: gradients of its loss written out over all logits, weights added and removed."""

import warnings
from dataclasses import replace

import pytest
import torch
from peft.helpers import disable_input_dtype_casting

from rtpurbo.errors import RTPurboError
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import runtime
from rtpurbo.models.stage2_weights import apply_stage2
from rtpurbo.settings import DistillationSettings
from rtpurbo.training.sequences import TrainingSequence
from rtpurbo.training.stage2 import autocast, backpropagate
from rtpurbo.training.student import (
    check_trainable,
    save_student,
    set_gradient_checkpointing,
    trainable,
    trained_weights,
)
from rtpurbo.training.teacher import teacher_targets
from tests.tiny_models import VOCABULARY, make_sparse, sparse_config, sparse_model, tiny_model

SETTINGS = DistillationSettings(
    targets_per_sequence=30, lora_rank=2, top_logits=5, decode_queries=8
)
IDS = torch.randint(VOCABULARY, (60,), generator=torch.Generator().manual_seed(0)).tolist()
SEQUENCE = TrainingSequence(IDS, 7)


def make_model():
    return sparse_model(prefill_mode="dense", dtype=torch.float32)


def targets_of(model, sequence, settings):
    with runtime(model).dense():
        return teacher_targets(model, sequence, settings, "seed")


def open_student(student):
    """A LoRA that does something: its second half starts at zero."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in student.named_parameters():
        if "lora_B" in name:
            weight.data.copy_(0.1 * torch.randn(weight.shape, generator=generator))
    return trained_weights(student)


def gradients(weights):
    found = {name: weight.grad for name, weight in weights.items()}
    for weight in weights.values():
        weight.grad = None
    return found


def written_out(model, sequence, targets, settings):
    """Loss and mean divergence, from logits of every token."""
    rows = min(settings.decode_queries, sequence.num_answer_tokens or settings.decode_queries)
    with runtime(model).decoding_last(rows):
        logits = model(torch.tensor([sequence.input_ids])).logits[0, targets.positions]
    student = logits.log_softmax(-1).gather(-1, targets.token_ids)
    teacher = targets.log_probabilities
    rest = [(1 - part.exp().sum(-1)).clamp(min=1e-7) for part in (teacher, student)]
    divergence = (teacher.exp() * (teacher - student)).sum(-1)
    divergence = divergence + rest[0] * (rest[0] / rest[1]).log()
    loss = divergence.mean()
    if targets.answers.any():
        loss = loss + settings.answer_weight * divergence[targets.answers].mean()
    return loss, divergence.mean()


@pytest.mark.parametrize("sequence", [SEQUENCE, TrainingSequence(IDS)], ids=["task", "prose"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"lora_rank": 0},
        {"answer_weight": 2.0},
        {"targets": "answers"},
        {"targets": "text", "targets_per_sequence": 9},
        {"decode_queries": 0},
    ],
    ids=str,
)
def test_loss_and_gradients(sequence, changes):
    model, settings = make_model(), replace(SETTINGS, **changes)
    targets = targets_of(model, sequence, settings)
    with trainable(model, settings, 0) as student:
        weights = open_student(student)
        result = backpropagate(model, 3, sequence, targets, settings)
        found = gradients(weights)
        loss, divergence = written_out(model, sequence, targets, settings)
        loss.backward()
        expected = gradients(weights)
    assert result.number == 3
    torch.testing.assert_close(result.loss, divergence.detach())
    assert ("answer_loss" in result.figures) == bool(targets.answers.any())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert any(gradient.abs().max() > 1e-4 for gradient in expected.values())


def test_recomputed_layers_select_the_same():
    model = make_model()
    targets = targets_of(model, SEQUENCE, SETTINGS)
    with trainable(model, SETTINGS, 0) as student:
        weights = open_student(student)
        backpropagate(model, 0, SEQUENCE, targets, SETTINGS)
        expected = gradients(weights)
        calls = []
        for module in headwise_modules(model):
            module.module.register_forward_pre_hook(
                lambda _, inputs, module=module: calls.append(module.num_decode_queries)
            )
        set_gradient_checkpointing(model, True)
        backpropagate(model, 0, SEQUENCE, targets, SETTINGS)
        found = gradients(weights)
        set_gradient_checkpointing(model, False)
    assert calls == [7] * 2 * len(headwise_modules(model))
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, msg=name)


@pytest.mark.parametrize("as_on_a_gpu", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_a_bfloat16_base_trains_a_float32_lora(family, as_on_a_gpu):
    """Only the LoRA is in float32, and its gradients are close to those on a float32 base."""
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        # All experts, or rounding would send tokens to others.
        changes = {"num_experts_per_tok": 4} if family == "qwen3_moe" else {}
        model = tiny_model(family, initializer_range=0.1, **changes).to(torch.bfloat16).to(dtype)
        make_sparse(model, sparse_config(model, prefill_mode="dense"))
        base = [weight for name, weight in model.named_parameters() if ".indexer." not in name]
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=as_on_a_gpu)
        with autocast:
            targets = targets_of(model, SEQUENCE, SETTINGS)
        with trainable(model, SETTINGS, 0) as student, autocast:
            weights = open_student(student)
            with disable_input_dtype_casting(student, active=as_on_a_gpu):
                result = backpropagate(model, 0, SEQUENCE, targets, SETTINGS)
            assert {weight.dtype for weight in base} == {dtype}
            assert {weight.dtype for weight in weights.values()} == {torch.float32}
            assert all(weight.grad.dtype == torch.float32 for weight in weights.values())
            assert result.loss.dtype == torch.float32
            gradient = torch.cat([part.flatten() for part in gradients(weights).values()])
        assert sum(weight.nbytes for weight in model.parameters() if weight.dtype != dtype) == 0
        found[dtype] = gradient
    expected = found[torch.float32]
    assert float((found[torch.bfloat16] - expected).norm() / expected.norm()) < 0.2


def test_half_precision_weights_are_not_trained():
    full = replace(SETTINGS, lora_rank=0)
    check_trainable(torch.float32, full)
    check_trainable(torch.bfloat16, SETTINGS)
    check_trainable(torch.bfloat16, replace(full, steps=0))
    with pytest.raises(RTPurboError, match="model is bfloat16: pass --dtype float32"):
        check_trainable(torch.bfloat16, full)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"lora_rank": 0}], ids=str)
def test_on_a_gpu_long_sequences_have_the_gradients_of_plain_pytorch(changes):
    """In half precision, layers run again, and what selects selects the same."""
    model = tiny_model("qwen3", head_dim=32, max_position_embeddings=2048)
    model = make_sparse(model, sparse_config(model, prefill_mode="dense", sliding_window=128))
    model, settings = model.to("cuda", torch.bfloat16), replace(SETTINGS, **changes)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (1500,), generator=generator).tolist()
    sequence = TrainingSequence(ids, 7)
    with autocast(model):
        targets = targets_of(model, sequence, settings)
    found = {}
    with trainable(model, settings, 0) as student:
        weights = open_student(student)
        for backend in ("auto", "eager"):
            for module in headwise_modules(model):
                module.backend = backend
            result = backpropagate(model, 0, sequence, targets, settings)
            of_all = [gradient.float().flatten() for gradient in gradients(weights).values()]
            found[backend] = float(result.loss), torch.cat(of_all)
            used = {module.used_backend for module in headwise_modules(model)}
            assert used == {"flex" if backend == "auto" else "eager"}
    (loss, gradient), (expected_loss, expected) = found["auto"], found["eager"]
    assert loss == pytest.approx(expected_loss, rel=0.02)
    assert float((gradient - expected).norm() / expected.norm()) < 0.1


def test_a_lora_is_added_and_read_without_warnings(tmp_path):
    model = make_model()
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        with trainable(model, SETTINGS, 0) as student:
            set_gradient_checkpointing(model, True)
            set_gradient_checkpointing(model, False)
            save_student(student, tmp_path)
        apply_stage2(model, tmp_path, "lora")


def test_the_model_is_restored():
    for rank in (0, 2):
        model = make_model()
        before = {name: weight.clone() for name, weight in model.state_dict().items()}
        with trainable(model, replace(SETTINGS, lora_rank=rank), 0) as student:
            for weight in trained_weights(student).values():
                weight.data += 1
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], weight) for name, weight in before.items())
        assert not any(weight.requires_grad for weight in model.parameters())

import copy

import pytest
import torch
from low_rank import save_difference
from teacher_training import (
    ATTENTION,
    Batches,
    TeacherSettings,
    change_context,
    losses,
    train,
    trainable,
)
from torch.utils._python_dispatch import TorchDispatchMode

from rtpurbo.data.long_range import LongRangeMix
from rtpurbo.models.base import load_base_model
from tests.data.test_needles import corpus
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

LENGTH = 1024


class InterruptedBatches(Batches):
    def __getitem__(self, number):
        if number == 5:
            raise KeyboardInterrupt
        return super().__getitem__(number)


def batches(kind=Batches, per_step=1):
    mix = LongRangeMix(tiny_tokenizer(), corpus())
    return kind(mix, (LENGTH, 2 * LENGTH), 2 * LENGTH, 64, per_step)


def test_a_batch_marks_target_positions():
    for number in range(4):
        batch = batches()[number]
        ids = torch.tensor(batch["ids"])
        assert ids.shape == ((2, LENGTH) if number % 2 == 0 else (1, 2 * LENGTH))
        assert len(set(batch["labels"])) == 64
        for place in batch["labels"] + batch["answers"]:
            assert (place + 1) % ids.shape[1]
    assert batches()[1] == batches()[1]


def test_batches_of_a_step_have_one_length():
    shared = batches(per_step=2)
    rows = [len(shared[number]["ids"]) for number in range(8)]
    assert rows == [2, 2, 1, 1, 2, 2, 1, 1]


def test_losses_are_those_of_all_logits():
    model = tiny_model(vocab_size=512)
    batch = next(batch for batch in map(batches().__getitem__, range(9)) if batch["answers"])
    ids = torch.tensor(batch["ids"])
    predicted = model(ids).logits.log_softmax(-1).flatten(0, 1)
    for name, loss in zip(("labels", "answers"), losses(model, batch), strict=True):
        places = torch.tensor(batch[name])
        expected = -predicted[places, ids.flatten()[places + 1]].mean()
        torch.testing.assert_close(loss, expected)


def test_layers_that_are_run_again_have_the_same_gradients():
    gradients = []
    for again in (False, True):
        model = tiny_model(vocab_size=512)
        model.set_attn_implementation("sdpa")
        settings = TeacherSettings(steps=1, lengths=(LENGTH,), gradient_checkpointing=again)
        kept = Counted()
        with trainable(model, settings) as weights, kept:
            sum(losses(model, batches()[0])).backward()
            gradients.append({name: weight.grad for name, weight in weights.items()})
        # Attention is not run again.
        assert kept.attention == model.config.num_hidden_layers
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=name)


class Counted(TorchDispatchMode):
    """Counts how often attention runs."""

    attention = 0

    def __torch_dispatch__(self, operation, types, arguments=(), named=None):
        self.attention += operation in ATTENTION
        return operation(*arguments, **(named or {}))


def test_embeddings_can_be_left_alone():
    model = tiny_model(vocab_size=512)
    settings = TeacherSettings(steps=1, lengths=(LENGTH,), embeddings=False)
    with trainable(model, settings) as weights:
        assert weights
        assert not any("embed" in name or "lm_head" in name for name in weights)


def test_a_lora_begins_from_a_difference():
    model, other = tiny_model(vocab_size=512), tiny_model(vocab_size=512)
    name = "model.layers.0.mlp.up_proj.weight"
    before = dict(model.named_parameters())[name].detach().clone()
    up, down = torch.randn(len(before), 2), torch.randn(2, before.shape[1])
    with torch.no_grad():
        dict(other.named_parameters())[name].add_(up @ down)
    batch = batches()[0]
    settings = TeacherSettings(steps=1, lengths=(LENGTH,), lora_rank=2)
    with trainable(model, settings, {name: (up, down)}):
        for loss, expected in zip(losses(model, batch), losses(other, batch), strict=True):
            torch.testing.assert_close(loss, expected)
    merged = dict(model.named_parameters())[name]
    torch.testing.assert_close(merged, before + up @ down)


@pytest.mark.parametrize("lora_rank", [0, 2])
def test_an_interrupted_training_is_resumed(tmp_path, lora_rank):
    def trained(output, kind=Batches):
        model = tiny_model(vocab_size=512)
        made = batches(kind, per_step=2)
        settings = TeacherSettings(
            steps=4,
            lengths=made.lengths,
            learning_rate=1e-3,
            lora_rank=lora_rank,
            tokens=2 * made.tokens,
            tokens_at_once=made.tokens,
            gradient_checkpointing=True,
            checkpoint_every=1,
        )
        log = train(model, made, settings, tmp_path / output)
        steps = [entry["step"] for entry in log.entries()]
        assert steps == [1, 2, 3, 4]
        return model.state_dict()

    whole = trained("whole")
    with pytest.raises(KeyboardInterrupt):
        trained("cut", InterruptedBatches)
    for name, weight in trained("cut").items():
        torch.testing.assert_close(weight, whole[name])


def test_a_trained_lora_is_a_low_rank_difference(tmp_path):
    tiny_model(vocab_size=512).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    base = load_base_model(str(tmp_path / "base"))
    model = copy.deepcopy(base.model)
    made = batches()
    settings = TeacherSettings(
        steps=2, lengths=made.lengths, learning_rate=1e-2, lora_rank=2, warmup_steps=0,
        tokens=made.tokens, tokens_at_once=made.tokens,
    )  # fmt: skip
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    train(model, made, settings, tmp_path / "work")
    after = model.state_dict()
    assert set(after) == set(before)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert any("norm" in name for name in changed)
    assert any("q_proj" in name for name in changed)
    assert not any("embed" in name or "lm_head" in name for name in changed)
    assert save_difference(base, model, tmp_path / "difference", 2)["kept"] > 0.9999


def test_a_longer_context_is_saved_with_the_model(tmp_path):
    model = tiny_model(vocab_size=512)
    change_context(model, 4096, 1e6)
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    again = load_base_model(str(tmp_path)).model
    assert again.config.max_position_embeddings == 4096
    torch.testing.assert_close(
        again.base_model.rotary_emb.inv_freq, model.base_model.rotary_emb.inv_freq
    )
    assert model.base_model.rotary_emb.inv_freq[1] == pytest.approx(1e6 ** (-2 / 8))

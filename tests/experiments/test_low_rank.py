import copy

import pytest
import torch
from low_rank import save_difference, with_difference
from teacher_training import change_context

from rtpurbo.errors import RTPurboError
from rtpurbo.models.base import load_base_model
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

RANK = 3


@pytest.fixture
def base(tmp_path):
    tiny_model(vocab_size=512).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return load_base_model(str(tmp_path / "base"))


def changed(model, rank):
    """A model whose matrices differ by so low a rank, and whose context is longer."""
    torch.manual_seed(0)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            if weight.dim() == 2:
                weight += 0.1 * torch.randn(len(weight), rank) @ torch.randn(rank, weight.shape[1])
            else:
                weight += 0.1 * torch.randn_like(weight)
    change_context(other, 4096, 1e6)
    return other


def test_a_difference_of_that_rank_is_given_back(base, tmp_path):
    other = changed(base.model, RANK)
    found = save_difference(base, other, tmp_path / "difference", RANK)
    assert found["kept"] == pytest.approx(1, abs=1e-4)
    again = with_difference(base, tmp_path / "difference")
    ids = torch.randint(0, 512, (1, 300))
    with torch.no_grad():
        expected, got = other(ids).logits, again(ids).logits
    assert again.config.max_position_embeddings == 4096
    # The factors are kept in bfloat16.
    assert (got - expected).norm() < 0.03 * (base.model(ids).logits - expected).norm()


def test_more_rank_keeps_more_and_takes_more_room(base, tmp_path):
    other = changed(base.model, 8)
    found = [save_difference(base, other, tmp_path / f"r{rank}", rank) for rank in (1, 2, 4)]
    assert found[0]["kept"] < found[1]["kept"] < found[2]["kept"] < 1
    assert found[0]["bytes"] < found[1]["bytes"] < found[2]["bytes"]


def test_another_base_model_is_refused(base, tmp_path):
    other = changed(base.model, 1)
    save_difference(base, other, tmp_path / "difference", 1)
    with torch.no_grad():
        base.model.get_input_embeddings().weight.mul_(2)
    with pytest.raises(RTPurboError, match="belongs to other weights"):
        with_difference(base, tmp_path / "difference")

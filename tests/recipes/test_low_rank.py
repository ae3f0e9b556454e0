import copy
import json

import low_rank
import pytest
import torch
from low_rank import factors, save_difference, with_difference
from safetensors.torch import load_file, save_file
from teacher_training import change_context

from rtpurbo.errors import RTPurboError
from rtpurbo.models.base import load_base_model
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

RANK = 3


@pytest.fixture
def base(tmp_path):
    return loaded(tmp_path / "base")


def loaded(folder, **changes):
    tiny_model(vocab_size=512, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return load_base_model(str(folder))


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


def test_a_low_rank_difference_is_reproduced(base, tmp_path):
    other = changed(base.model, RANK)
    found = save_difference(base, other, tmp_path / "difference", RANK)
    assert 0.9995 < found["kept"] < 1
    again = with_difference(base, tmp_path / "difference")
    ids = torch.randint(0, 512, (1, 300))
    with torch.no_grad():
        expected, got = other(ids).logits, again(ids).logits
    assert again.config.max_position_embeddings == 4096
    # The factors are kept in 8 bits.
    assert (got - expected).norm() < 0.06 * (base.model(ids).logits - expected).norm()


def test_more_rank_keeps_more_and_takes_more_room(base, tmp_path):
    other = changed(base.model, 8)
    found = [save_difference(base, other, tmp_path / f"r{rank}", rank) for rank in (1, 2, 4)]
    assert found[0]["kept"] < found[1]["kept"] < found[2]["kept"] < 1
    assert found[0]["bytes"] < found[1]["bytes"] < found[2]["bytes"]


def test_factors_are_the_nearest_of_their_rank():
    torch.manual_seed(0)
    before, after = torch.randn(2, 20, 30)
    up, down = factors(before, after, RANK)
    assert (up.shape, down.shape) == ((20, RANK), (RANK, 30))
    assert up.dtype == down.dtype == torch.float32
    values = torch.linalg.svdvals((after - before).double())
    lost = (after - before - up @ down).square().sum()
    assert float(lost) == pytest.approx(float(values[RANK:].square().sum()), rel=1e-4)
    torch.testing.assert_close(up.norm(dim=0), down.norm(dim=1))


@pytest.mark.parametrize("rank", [4, 40])
def test_kept_is_the_share_of_the_squared_difference(base, tmp_path, rank):
    other = changed(base.model, 8)
    found = save_difference(base, other, tmp_path / "difference", rank)
    again = dict(with_difference(base, tmp_path / "difference").named_parameters())
    total = lost = 0.0
    for name, weight in base.model.named_parameters():
        after = dict(other.named_parameters())[name].double()
        total += (after - weight).square().sum()
        lost += (after - again[name]).square().sum()
    assert found["kept"] == pytest.approx(float(1 - lost / total), abs=1e-6)
    origin = json.loads((tmp_path / "difference" / "difference.json").read_text())
    assert origin == {
        "base_model": base.reference.name,
        "fingerprint": base.reference.fingerprint,
        "rank": rank,
        **found,
    }


def test_a_factor_takes_one_byte_per_entry(base, tmp_path):
    # So large a rank that square matrices are smaller whole.
    found = save_difference(base, changed(base.model, 8), tmp_path / "difference", 47)
    stored = load_file(tmp_path / "difference" / "difference.safetensors")
    expected = 0
    for name, weight in base.model.named_parameters():
        components = min(47, *weight.shape)
        if weight.dim() == 1:
            assert stored[name].dtype == torch.float32
            expected += 4 * weight.numel()
        elif weight.shape[0] == weight.shape[1]:
            assert stored[name].dtype == torch.bfloat16
            expected += 2 * weight.numel()
        else:
            assert stored[f"{name}.up"].dtype == stored[f"{name}.down"].dtype == torch.int8
            assert stored[f"{name}.up"].shape == (len(weight), components)
            expected += components * (sum(weight.shape) + 8)
    assert expected == sum(tensor.nbytes for tensor in stored.values())
    # The header takes about 100 bytes a tensor.
    assert expected < found["bytes"] < expected + 150 * len(stored)


def test_tied_embeddings_change_once(tmp_path):
    base = loaded(tmp_path / "base", tie_word_embeddings=True)
    other = changed(base.model, RANK)
    assert save_difference(base, other, tmp_path / "difference", RANK)["kept"] > 0.9995
    again = with_difference(base, tmp_path / "difference")
    embeddings = again.get_input_embeddings().weight
    assert again.get_output_embeddings().weight is embeddings
    change = other.get_input_embeddings().weight - base.model.get_input_embeddings().weight
    left = other.get_input_embeddings().weight - embeddings
    assert left.norm() < 0.02 * change.norm()


def test_unchanged_weights_are_not_stored(base, tmp_path):
    other = copy.deepcopy(base.model)
    weight = other.base_model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight += 0.1
        # Rounding as of a model that was saved in bfloat16 is no change.
        embedding = other.get_input_embeddings().weight
        embedding.copy_(embedding.bfloat16())
    save_difference(base, other, tmp_path / "difference", RANK)
    stored = load_file(tmp_path / "difference" / "difference.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert set(stored) == {f"{name}.{part}" for part in ("up", "up_scale", "down", "down_scale")}
    assert stored[f"{name}.up"].dtype == torch.int8
    assert stored[f"{name}.up"].shape == (len(weight), RANK)
    assert stored[f"{name}.down_scale"].shape == (RANK, 1)


def test_merged_weights_are_the_same_on_every_machine(base, tmp_path, monkeypatch):
    other = changed(base.model, 8)
    save_difference(base, other, tmp_path / "difference", 4)
    first = with_difference(base, tmp_path / "difference").to(torch.bfloat16).state_dict()

    def in_another_order(name, tensors):
        if name in tensors:
            return tensors[name].double()
        order = [3, 1, 0, 2]
        up = (tensors[f"{name}.up"].double() * tensors[f"{name}.up_scale"].double())[:, order]
        down = (tensors[f"{name}.down"].double() * tensors[f"{name}.down_scale"].double())[order]
        return sum(torch.outer(up[:, k], down[k]) for k in range(4))

    monkeypatch.setattr(low_rank, "_added", in_another_order)
    again = with_difference(base, tmp_path / "difference").to(torch.bfloat16).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("file", ["difference.json", "difference.safetensors"])
def test_damaged_files_are_refused(base, tmp_path, file):
    save_difference(base, changed(base.model, 1), tmp_path / "difference", 1)
    damaged = tmp_path / "difference" / file
    damaged.write_bytes(damaged.read_bytes()[:40])
    with pytest.raises(RTPurboError, match="no difference that can be read"):
        with_difference(base, tmp_path / "difference")
    damaged.unlink()
    with pytest.raises(RTPurboError, match="no difference that can be read"):
        with_difference(base, tmp_path / "difference")


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"fingerprint": ""}', "\x00"])
def test_an_incomplete_origin_is_refused(base, tmp_path, text):
    save_difference(base, changed(base.model, 1), tmp_path / "difference", 1)
    (tmp_path / "difference" / "difference.json").write_text(text)
    with pytest.raises(RTPurboError, match="no difference that can be read"):
        with_difference(base, tmp_path / "difference")


@pytest.mark.parametrize("part", ["up", "up_scale", "down", "down_scale"])
@pytest.mark.parametrize("damage", ["missing", "shorter", "nobody's"])
def test_tensors_that_do_not_fit_are_refused(base, tmp_path, part, damage):
    save_difference(base, changed(base.model, RANK), tmp_path / "difference", RANK)
    path = tmp_path / "difference" / "difference.safetensors"
    tensors, name = load_file(path), f"model.layers.0.mlp.up_proj.weight.{part}"
    stored = tensors.pop(name)
    if damage == "shorter":
        dim = 0 if part in ("up", "down_scale") else 1
        tensors[name] = stored.narrow(dim, 0, 2).contiguous()
    elif damage == "nobody's":
        tensors |= {name: stored, f"other.weight.{part}": stored.clone()}
    save_file(tensors, path)
    with pytest.raises(RTPurboError, match="does not fit its base model"):
        with_difference(base, tmp_path / "difference")


def test_another_base_model_is_refused(base, tmp_path):
    other = changed(base.model, 1)
    save_difference(base, other, tmp_path / "difference", 1)
    with torch.no_grad():
        base.model.get_input_embeddings().weight.mul_(2)
    with pytest.raises(RTPurboError, match="belongs to other weights"):
        with_difference(base, tmp_path / "difference")

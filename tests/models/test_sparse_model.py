import copy
import pickle

import accelerate
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel

from rtpurbo.errors import RTPurboError
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.sparse_layers import is_sparse
from rtpurbo.models.sparse_model import SparseModel
from rtpurbo.models.sparsify import restore, runtime, sparsify
from tests.tiny_models import (
    FAMILIES,
    logits_of,
    padded_batch,
    sparse_config,
    sparse_model,
    tiny_model,
)

COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


def logits(model, **options):
    return logits_of(model, *padded_batch(), **options)


def generated(model):
    ids, mask = padded_batch()
    return model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_a_copy_is_independent(how, family):
    model = sparse_model(family)
    expected, answer = logits(model), generated(model)
    twin = COPIES[how](model)
    assert torch.equal(logits(twin), expected)
    assert torch.equal(generated(twin), answer)

    twin.rtpurbo.set_rule(top_p=0.05, min_tokens=0)
    assert torch.equal(logits(model), expected)
    changed = logits(twin)
    assert not torch.equal(changed, expected)
    with twin.rtpurbo.rule(**vars(model.rtpurbo_config.attention)):
        assert torch.equal(logits(twin), expected)
    assert torch.equal(logits(twin), changed)

    restore(model)
    assert torch.equal(logits(twin), changed)
    assert isinstance(twin(*padded_batch()).past_key_values, HeadwiseCache)
    restore(twin)
    assert torch.equal(logits(twin), logits(model))
    assert not torch.equal(logits(twin), expected)


@pytest.mark.parametrize("how", COPIES)
def test_either_can_be_restored_first(how):
    model = sparse_model()
    expected, twin = logits(model, chunks=[30, 14]), COPIES[how](model)
    restore(twin)
    assert is_sparse(model)
    assert torch.equal(logits(model, chunks=[30, 14]), expected)
    assert isinstance(model(*padded_batch()).past_key_values, HeadwiseCache)


def test_a_copy_of_a_copy_and_a_restored_copy_can_be_made_sparse_again():
    model = sparse_model()
    expected = logits(model)
    twin = copy.deepcopy(copy.deepcopy(model))
    assert torch.equal(logits(twin), expected)
    dense = copy.deepcopy(restore(twin))
    assert torch.equal(logits(dense), logits(twin))
    sparsify(dense, model.rtpurbo_config)
    assert is_sparse(dense)
    assert not is_sparse(twin)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_class_is_a_subclass_while_the_model_is_sparse(family):
    model = tiny_model(family)
    dense = type(model)
    sparsify(model, sparse_config(model))
    assert isinstance(model, dense)
    assert isinstance(model, SparseModel)
    assert (type(model).__name__, type(model).__module__) == (dense.__name__, dense.__module__)
    restore(model)
    assert type(model) is dense


def test_two_models_share_their_sparse_class():
    assert type(sparse_model()) is type(sparse_model())
    assert type(sparse_model()) is not LlamaForCausalLM


@pytest.mark.parametrize("act", [lambda model: sparsify(model, None), restore, runtime])
@pytest.mark.parametrize("model", [tiny_model, sparse_model])
def test_a_peft_model_is_refused(act, model):
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    with pytest.raises(RTPurboError, match=r"PeftModel wraps.*get_base_model"):
        act(get_peft_model(model(), lora))


def quantised():
    return torch.ao.quantization.quantize_dynamic(tiny_model(), {nn.Linear}, dtype=torch.qint8)


def offloaded():
    model = tiny_model()
    accelerate.cpu_offload(model, torch.device("cpu"))
    return model


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LlamaModel(tiny_model().config), "a LlamaModel has no language-modelling head"),
        (lambda: LlamaForSequenceClassification(tiny_model().config), "no language-modelling"),
        (lambda: nn.Linear(2, 2), "a Linear has no language-modelling head"),
        (lambda: torch.compile(tiny_model()), "_orig_mod"),
        (lambda: nn.DataParallel(tiny_model()), "pass model.module"),
        (quantised, "was quantised in a way"),
        (offloaded, "are offloaded"),
    ],
)
def test_refused_models_are_named_and_unchanged(make, message):
    model = make()
    before = dict(model.named_modules())
    with pytest.raises(RTPurboError, match=message):
        sparsify(model, sparse_config(tiny_model()))
    after = dict(model.named_modules())
    assert before.keys() == after.keys()
    assert all(before[name] is after[name] for name in before)


def test_offloading_a_sparse_model_is_named():
    model = sparse_model()
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(RTPurboError, match="are offloaded"):
        logits(model)


def test_attention_weights_are_refused():
    model = sparse_model()
    ids, mask = padded_batch()
    with pytest.raises(RTPurboError, match="no attention weights"):
        model(ids, attention_mask=mask, output_attentions=True)
    with pytest.raises(RTPurboError, match="no attention weights"):
        model.generate(ids, output_attentions=True, return_dict_in_generate=True, max_new_tokens=2)


def test_another_attention_implementation_is_refused():
    model = sparse_model()
    expected = logits(model)
    with pytest.raises(RTPurboError, match="cannot be changed"):
        model.set_attn_implementation("eager")
    assert torch.equal(logits(model), expected)
    restore(model).set_attn_implementation("eager")


def test_adapters_on_top_of_a_sparse_model_train_and_leave_its_settings_within_reach():
    model = sparse_model(dtype=torch.float32)
    expected = logits(model)
    student = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    ids, _ = padded_batch((0,))
    student.train()(ids, labels=ids, use_cache=False).loss.backward()
    trained = [weight for weight in student.parameters() if weight.requires_grad]
    assert all(torch.isfinite(weight.grad).all() for weight in trained)
    assert any(weight.grad.abs().max() > 0 for weight in trained)
    student.eval()
    with student.rtpurbo.dense():
        assert not torch.equal(logits(student), expected)
    assert torch.equal(logits(student), expected)

"""Generation in batches."""

import pytest
import torch

from rtpurbo.training.generation import GREEDY, Sampling, generate_tokens
from tests.tiny_models import tiny_model
from tests.tiny_tokenizer import tiny_tokenizer
from tests.two_processes import run_in_two_processes

PROMPTS = [[5, 6, 7], [9, 10], [11, 12, 13, 14, 15]]


def writer():
    """A model with the tiny tokenizer's vocabulary."""
    return tiny_model("llama", vocab_size=len(tiny_tokenizer()))


def written(sampling, prompts=PROMPTS, model=None, **options):
    options = {"seed": 0, **options}
    return generate_tokens(model or writer(), tiny_tokenizer(), prompts, 12, sampling, **options)


def test_greedy_tokens_are_the_most_likely_ones_in_any_batch():
    model = writer()
    together = written(GREEDY, model=model)
    assert together == [written(GREEDY, [prompt], model)[0] for prompt in PROMPTS]
    for prompt, found in zip(PROMPTS, together, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *found]])).logits[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == found


def test_samples_depend_on_the_seed_and_leave_the_random_state():
    sampling = Sampling(1.0, 0.95)
    before = torch.get_rng_state()
    assert written(sampling) == written(sampling)
    assert written(sampling) != written(sampling, seed=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_tokens_end_with_the_first_stop():
    free = written(GREEDY)
    stop = free[0][4]
    found = written(GREEDY, stops=[stop])
    assert found[0] == free[0][: free[0].index(stop) + 1]
    for each, whole in zip(found, free, strict=True):
        assert each == (whole[: whole.index(stop) + 1] if stop in whole else whole)


def test_a_batch_that_is_too_large_is_halved(monkeypatch):
    model = writer()
    whole, sizes = written(GREEDY, model=model), []
    generate = model.generate

    def limited(input_ids, **options):
        sizes.append(len(input_ids))
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("too large")
        return generate(input_ids, **options)

    monkeypatch.setattr(model, "generate", limited)
    assert written(GREEDY, model=model) == whole
    assert sizes == [3, 1, 1, 1]
    monkeypatch.setattr(
        model, "generate", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError)
    )
    with pytest.raises(torch.OutOfMemoryError):
        written(GREEDY, model=model)


_SHARDED = """
import sys
import torch
from rtpurbo.models.base import load_base_model
from rtpurbo.processes import init_distributed
from rtpurbo.training.generation import GREEDY, Sampling, generate_tokens

processes = init_distributed(torch.device("cpu"), "fsdp")
whole, part = (load_base_model(sys.argv[1], **options)
               for options in ({}, {"processes": processes}))
prompts = [[5, 6, 7], [9, 10], [11, 12, 13, 14, 15]]

def written(base, sampling, count, **options):
    return generate_tokens(base.model, base.tokenizer, prompts[:count], 12, sampling, seed=0, **options)

# A stop token that the processes generate at different steps.
stop = written(whole, GREEDY, 3)[0][4]
for count in (1, 3):  # fewer prompts than processes, and not a multiple of them
    for stops in ([], [stop]):
        greedy = [written(base, GREEDY, count, stops=stops) for base in (whole, part)]
        assert greedy[0] == greedy[1], greedy
sampled = written(part, Sampling(1.0), 3)
assert processes.gather_objects(sampled) == [sampled] * 2
print("same", flush=True)
"""


def test_a_sharded_model_generates_the_same_as_the_whole_one(tiny_base, tmp_path):
    assert run_in_two_processes(_SHARDED, tmp_path, tiny_base).count("same") == 2

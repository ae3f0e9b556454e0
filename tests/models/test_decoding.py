"""Replayed steps say what steps say that run as usual; on a GPU they are captured for that."""

import copy
import gc
import inspect
import warnings

import pytest
import torch

from rtpurbo.config import HeadMap, IndexerSettings, RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.models import decoding, fused_append
from rtpurbo.models.architecture import convertible_layers
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.sparse_layers import headwise_modules
from rtpurbo.models.sparsify import observing, restore, runtime, set_selector
from tests.models.test_generation import WINDOW, generate, greedy_by_recomputation
from tests.models.test_slots import holes
from tests.models.zoo.configurations import EQUAL
from tests.tiny_models import (
    FAMILIES,
    HEADS,
    KEY_VALUE_HEADS,
    PADDING,
    any_model,
    assert_same_logits,
    logits_of,
    make_sparse,
    padded_batch,
    sparse_config,
    sparse_model,
    tiny_model,
)

BATCHES = {"one sequence": (0,), "left-padded batch": PADDING}
PROMPT = 24


class PlainStep:
    """Stands in for a graph: the same static step, run by Python every time."""

    prepared, runs = 0, 0
    failure: Exception | None = None

    def __init__(self, step, rewind, device):
        for _ in range(2):
            step()
            rewind()
        if PlainStep.failure is not None:
            step()
            raise PlainStep.failure
        self.step = step
        PlainStep.prepared += 1

    @staticmethod
    def supports(device):
        return True

    @staticmethod
    def refusal(modules):
        return None

    def __call__(self):
        PlainStep.runs += 1
        return self.step()


@pytest.fixture
def plain_steps(monkeypatch):
    """Static steps everywhere a GPU would replay graphs; counts them."""
    monkeypatch.setattr(decoding.GraphedDecoder, "graph_class", PlainStep)
    PlainStep.prepared = PlainStep.runs = 0
    PlainStep.failure = None
    return PlainStep


@pytest.fixture
def model():
    return sparse_model(**WINDOW)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("batch", BATCHES)
def test_greedy_equals_recomputation_in_every_family(plain_steps, family, batch):
    model, (ids, mask) = sparse_model(family), padded_batch(BATCHES[batch], PROMPT)
    expected, _ = greedy_by_recomputation(model, ids, mask, 60)
    assert torch.equal(generate(model, ids, mask), expected)
    assert plain_steps.prepared == 1
    assert plain_steps.runs == 59


@pytest.mark.parametrize("batch", BATCHES)
def test_beams_equal_recomputation(plain_steps, model, batch):
    ids, mask = padded_batch(BATCHES[batch], PROMPT)
    expected = generate(model, ids, mask, 30, num_beams=2, use_cache=False)
    assert torch.equal(generate(model, ids, mask, 30, num_beams=2), expected)
    assert plain_steps.prepared == 1
    assert plain_steps.runs >= 28


def test_sampling_with_a_seed_equals_steps_as_usual(plain_steps, model):
    ids, mask = padded_batch(PADDING, PROMPT)
    drawn = []
    for graphs in (True, False):
        model.rtpurbo_graphs = graphs
        torch.manual_seed(3)
        drawn.append(generate(model, ids, mask, 30, do_sample=True, top_k=8))
    assert torch.equal(*drawn)
    assert plain_steps.runs == 29


@pytest.mark.parametrize("batch", BATCHES)
def test_another_turn_continues_the_cache(plain_steps, model, batch):
    ids, mask = padded_batch(BATCHES[batch], PROMPT)
    first = generate(model, ids, mask, 20, return_dict_in_generate=True)
    question, _ = padded_batch((0,) * len(ids), 9, seed=5)
    ids = torch.cat([first.sequences, question], 1)
    mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)
    expected, _ = greedy_by_recomputation(model, ids, mask, 20)
    answer = generate(model, ids, mask, 20, past_key_values=first.past_key_values)
    assert torch.equal(answer, expected)
    assert plain_steps.runs == 2 * 19
    assert plain_steps.prepared == 1  # there was room for both turns


def test_a_cache_that_is_full_is_enlarged_and_captured_again(plain_steps, model, monkeypatch):
    monkeypatch.setattr(decoding, "roomy_capacity", lambda tokens, expected: tokens + 9)
    ids, mask = padded_batch(PADDING, PROMPT)
    expected, _ = greedy_by_recomputation(model, ids, mask, 60)
    assert torch.equal(generate(model, ids, mask), expected)
    assert plain_steps.prepared == 5  # ten tokens each, until what is left does not pay
    assert plain_steps.runs == 50


def test_assisted_decoding_equals_greedy(plain_steps, model):
    ids, mask = padded_batch((0,), 12)
    ids, mask = ids.repeat(1, 3), mask.repeat(1, 3)
    expected, _ = greedy_by_recomputation(model, ids, mask, 40)
    assert torch.equal(generate(model, ids, mask, 40, prompt_lookup_num_tokens=4), expected)
    assistant = tiny_model(seed=7)
    assert torch.equal(generate(model, ids, mask, 40, assistant_model=assistant), expected)
    assert plain_steps.runs > 0


def test_two_caches_take_turns(plain_steps, model):
    """As under guidance, which decodes two sequences of tokens side by side."""
    batches = [padded_batch((0,), 90, seed) for seed in (1, 2)]
    caches = [HeadwiseCache(model) for _ in batches]
    outputs = [[], []]
    for (ids, mask), cache in zip(batches, caches, strict=True):
        logits_of(model, ids[:, :PROMPT], mask[:, :PROMPT], [PROMPT], cache)
    for end in range(PROMPT + 1, 91):
        for (ids, mask), cache, output in zip(batches, caches, outputs, strict=True):
            output.append(logits_of(model, ids[:, end - 1 : end], mask[:, :end], [1], cache))
    for (ids, mask), output in zip(batches, outputs, strict=True):
        expected = logits_of(model, ids, mask)[:, PROMPT:]
        assert_same_logits(torch.cat(output, 1), expected, mask)
    assert plain_steps.prepared == 2
    assert plain_steps.runs == 2 * (90 - PROMPT - decoding.STEPS_BEFORE_CAPTURE)


def decoded(model, ids, mask, cache=None, steps=None):
    """Logits of one token after the other behind a prompt, in plain calls."""
    cache = HeadwiseCache(model) if cache is None else cache
    logits_of(model, ids[:, :PROMPT], mask[:, :PROMPT], [PROMPT], cache)
    return logits_of(model, ids[:, PROMPT:], mask, steps or [1] * (ids.shape[1] - PROMPT), cache)


def test_plain_calls_are_captured_after_several_steps(plain_steps, model):
    ids, mask = padded_batch(PADDING, 60)
    assert_same_logits(decoded(model, ids, mask), logits_of(model, ids, mask)[:, PROMPT:], mask)
    assert plain_steps.runs == 36 - decoding.STEPS_BEFORE_CAPTURE


def test_positions_are_optional(plain_steps, model):
    ids, mask = padded_batch((0, 0), 60)
    expected, cache = logits_of(model, ids, mask), HeadwiseCache(model)
    with torch.no_grad():
        model(ids[:, :PROMPT], past_key_values=cache)
        steps = [model(ids[:, i : i + 1], past_key_values=cache) for i in range(PROMPT, 60)]
    assert_same_logits(torch.cat([step.logits for step in steps], 1), expected[:, PROMPT:], mask)
    assert plain_steps.runs > 0
    assert all(step.past_key_values is cache for step in steps)
    assert steps[-1].logits.data_ptr() != steps[-2].logits.data_ptr()


def test_positions_that_follow_the_mask_are_optional(plain_steps):
    """OPT derives positions from the attention mask, which a captured step does not read."""
    model = any_model("opt", **EQUAL["OPT"][1]).double()
    ids, mask = padded_batch(PADDING, 40)

    def steps(model):
        cache, found = None, []
        for start, end in ((0, 24), *((i, i + 1) for i in range(24, 40))):
            output = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = output.past_key_values
            found.append(output.logits)
        return torch.cat(found, 1)

    with torch.no_grad():
        expected = steps(model)
        make_sparse(model, sparse_config(model, sliding_window=64))
        assert_same_logits(steps(model), expected, mask)
        assert plain_steps.runs == 0
    assert_same_logits(decoded(model, ids, mask), expected[:, PROMPT:], mask)
    assert plain_steps.runs > 0


def test_a_prompt_of_single_token_forwards(plain_steps, model):
    """Padding may go on while some sequences have begun."""
    ids, mask = padded_batch(PADDING, 60)
    cache = HeadwiseCache(model)
    logits = logits_of(model, ids, mask, [1] * 60, cache)
    assert_same_logits(logits, logits_of(model, ids, mask), mask)
    assert 0 < plain_steps.runs <= 60 - max(PADDING)


def test_short_answers_are_not_captured(plain_steps, model):
    ids, mask = padded_batch(PADDING, PROMPT)
    generate(model, ids, mask, decoding.CAPTURE_COST_IN_STEPS)
    assert plain_steps.prepared == 0
    generate(model, ids, mask, decoding.CAPTURE_COST_IN_STEPS + 1)
    assert plain_steps.prepared == 1


@pytest.mark.parametrize("chunks", [[1] * 10 + [7, 1, 1, 1, 30, 1, 1, 14]], ids=str)
def test_several_tokens_in_one_step(plain_steps, model, chunks):
    ids, mask = padded_batch(PADDING, 90)
    cache = HeadwiseCache(model)
    logits = decoded(model, ids, mask, cache, chunks)
    assert_same_logits(logits, logits_of(model, ids, mask)[:, PROMPT:], mask)
    assert plain_steps.prepared == 1


def test_rearranged_caches_continue(plain_steps, model):
    ids, mask = padded_batch(PADDING, 90)
    cache = HeadwiseCache(model)
    decoded(model, ids[:, :40], mask[:, :40], cache)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    ids, mask = ids[order], mask[order]
    logits_of(model, ids[:, 40:50], mask[:, :50], [1] * 10, cache)
    assert plain_steps.prepared == 1
    cache.crop(-6)
    logits_of(model, ids[:, 44:50], mask[:, :50], [1] * 6, cache)
    assert plain_steps.prepared == 1
    cache.batch_select_indices(torch.tensor([0, 1]))
    ids, mask = ids[:2], mask[:2]
    logits = logits_of(model, ids[:, 50:], mask, [1] * 40, cache)
    assert plain_steps.prepared == 2
    assert_same_logits(logits, logits_of(model, ids, mask)[:, 50:], mask)
    cache.reset()
    logits = decoded(model, ids, mask, cache)
    assert_same_logits(logits, logits_of(model, ids, mask)[:, PROMPT:], mask)
    assert plain_steps.prepared == 3


def test_a_changed_rule_is_captured_again(plain_steps, model):
    ids, mask = padded_batch(PADDING, 60)
    cache = HeadwiseCache(model)
    decoded(model, ids[:, :40], mask[:, :40], cache)
    model.rtpurbo.set_rule(top_p=0.3)
    logits_of(model, ids[:, 40:], mask, [1] * 20, cache)
    assert plain_steps.prepared == 2


def test_observers_receive_every_step(plain_steps, model):
    ids, mask = padded_batch((0,), 60)
    cache, seen = HeadwiseCache(model), []
    decoded(model, ids[:, :40], mask[:, :40], cache)
    runs = plain_steps.runs
    with observing(model, seen.append, dense=False):
        logits_of(model, ids[:, 40:45], mask[:, :45], [1] * 5, cache)
    with model.rtpurbo.counting() as statistics:
        logits_of(model, ids[:, 45:50], mask[:, :50], [1] * 5, cache)
    assert len(seen) == 10
    assert statistics.queries > 0
    set_selector(model, lambda rows: torch.zeros_like(rows.logits, dtype=torch.bool))
    other = HeadwiseCache(model)
    decoded(model, ids[:, :40], mask[:, :40], other)
    set_selector(model, None)
    assert plain_steps.runs == runs
    logits = logits_of(model, ids[:, 50:], mask, [1] * 10, cache)
    assert plain_steps.runs == runs + 10
    assert_same_logits(logits, logits_of(model, ids, mask)[:, 50:], mask)


@pytest.mark.parametrize(
    "asked",
    [
        {"output_hidden_states": True},
        {"return_dict": False},
        {"logits_to_keep": torch.tensor([0])},
        {"labels": torch.zeros(1, 1, dtype=torch.int64)},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_steps_that_ask_for_more_run_as_usual(plain_steps, model, asked):
    ids, mask = padded_batch((0,), 60)
    cache = HeadwiseCache(model)
    decoded(model, ids[:, :59], mask[:, :59], cache)
    runs = plain_steps.runs
    with torch.no_grad():
        output = model(ids[:, 59:], past_key_values=cache, **asked)
    assert plain_steps.runs == runs > 0
    logits = output.logits if asked.get("return_dict", True) else output[0]
    if "labels" not in asked:
        assert_same_logits(logits, logits_of(model, ids, mask)[:, 59:], mask)


def test_steps_with_gradients_run_as_usual(plain_steps, model):
    ids, mask = padded_batch((0,), 60)
    cache = HeadwiseCache(model)
    decoded(model, ids[:, :59], mask[:, :59], cache)
    runs = plain_steps.runs
    model(ids[:, 59:], past_key_values=cache)
    assert plain_steps.runs == runs > 0


def test_the_switch_turns_it_off(plain_steps, model):
    ids, mask = padded_batch((0,), 60)
    model.rtpurbo_graphs = False
    decoded(model, ids, mask)
    assert plain_steps.prepared == 0
    model.rtpurbo_graphs = True
    decoded(model, ids, mask)
    assert plain_steps.prepared == 1


def test_padding_between_tokens_warns_once(plain_steps, model):
    ids, mask = padded_batch(PADDING, 60)
    cache = HeadwiseCache(model)
    logits_of(model, ids[:, :PROMPT], holes(mask)[:, :PROMPT], [PROMPT], cache)
    with pytest.warns(UserWarning, match="between its tokens") as warned:
        logits_of(model, ids[:, PROMPT:], holes(mask), [1] * 36, cache)
    assert len(warned) == 1
    assert plain_steps.prepared == 0


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_failed_capture_warns_once_and_is_cleaned_up(plain_steps, family):
    model, (ids, mask) = sparse_model(family), padded_batch(PADDING, PROMPT)
    expected, _ = greedy_by_recomputation(model, ids, mask, 40)
    plain_steps.failure = RuntimeError("no graphs today.\nSecond line.")
    with pytest.warns(UserWarning, match=r"slower: RuntimeError: no graphs today\.$") as warned:
        results = [generate(model, ids, mask, 40) for _ in range(2)]
    assert all(torch.equal(result, expected) for result in results)
    assert len(warned) == 1
    plain_steps.failure = None
    generate(model, ids, mask, 40)
    assert plain_steps.prepared == 0


def test_a_capture_that_runs_out_of_memory_falls_back(plain_steps, model):
    ids, mask = padded_batch(PADDING, PROMPT)
    plain_steps.failure = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.warns(UserWarning, match="out of memory"):
        generate(model, ids, mask, 40)
    plain_steps.failure = None
    generate(model, ids, mask, 40)
    assert plain_steps.prepared == 1


def test_attention_without_kernels_is_reported(plain_steps, model, monkeypatch):
    monkeypatch.setattr(PlainStep, "refusal", decoding.CudaGraph.refusal)
    ids, mask = padded_batch(PADDING, PROMPT)
    expected, _ = greedy_by_recomputation(model, ids, mask, 40)
    with pytest.warns(UserWarning, match="without kernels") as warned:
        assert torch.equal(generate(model, ids, mask, 40), expected)
    assert len(warned) == 1
    assert plain_steps.prepared == 0


def test_a_rule_wider_than_the_cache_is_refused(plain_steps, model):
    ids, mask = padded_batch(PADDING, 60)
    cache = HeadwiseCache(model)
    decoded(model, ids[:, :40], mask[:, :40], cache)
    with runtime(model).rule(sliding_window=32), pytest.raises(RTPurboError, match="new cache"):
        logits_of(model, ids[:, 40:41], mask[:, :41], [1], cache)
    logits = logits_of(model, ids[:, 40:], mask, [1] * 20, cache)
    assert_same_logits(logits, logits_of(model, ids, mask)[:, 40:], mask)


def test_a_rotary_embedding_that_depends_on_the_length_is_reported(plain_steps):
    model = tiny_model(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    make_sparse(model, sparse_config(model))
    ids, mask = padded_batch((0,), PROMPT)
    with pytest.warns(UserWarning, match="depends on the length"):
        generate(model, ids, mask, 40)
    assert plain_steps.prepared == 0


def test_hooks_within_the_model_are_reported(plain_steps, model):
    ids, mask, calls = *padded_batch((0,), PROMPT), []
    hook = model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="a Linear within the model has a hook"):
        generate(model, ids, mask, 40)
    hook.remove()
    assert len(calls) == 40


def test_copies_decode_with_their_own_weights(plain_steps, model):
    ids, mask = padded_batch((0,), PROMPT)
    generate(model, ids, mask, 40)
    twin = copy.deepcopy(model)
    twin.lm_head.weight.data.neg_()
    expected, _ = greedy_by_recomputation(twin, ids, mask, 40)
    assert torch.equal(generate(twin, ids, mask, 40), expected)
    assert not torch.equal(generate(model, ids, mask, 40), expected)


def test_a_graph_is_freed_with_its_cache(plain_steps, model, monkeypatch):
    class Nothing(PlainStep):
        def __init__(self, step, rewind, device):
            self.logits = step()
            rewind()

        def __call__(self):
            return self.logits

    monkeypatch.setattr(decoding.GraphedDecoder, "graph_class", Nothing)
    ids, mask = padded_batch((0,), PROMPT)
    result = generate(model, ids, mask, 40, return_dict_in_generate=True)
    gc.collect()
    assert len(model._rtpurbo_decoder._prepared) == 1
    del result
    gc.collect()
    assert len(model._rtpurbo_decoder._prepared) == 0


def test_graphs_of_many_caches_are_few(plain_steps, model):
    ids, mask = padded_batch((0,), 40)
    caches = [HeadwiseCache(model) for _ in range(decoding.MOST_GRAPHS + 2)]
    for cache in caches:
        decoded(model, ids, mask, cache)
    assert list(model._rtpurbo_decoder._prepared) == caches[2:]


def test_the_forward_keeps_its_signature_and_is_restored(model):
    assert inspect.signature(model.forward) == inspect.signature(tiny_model().forward)
    restore(model)
    assert "forward" not in vars(model)


def test_a_forward_replaced_by_others_is_kept():
    model, calls = tiny_model(), []
    own = model.forward

    def counted(*args, **kwargs):
        calls.append(1)
        return own(*args, **kwargs)

    model.forward = counted
    make_sparse(model, sparse_config(model))
    ids, mask = padded_batch()
    logits_of(model, ids, mask)
    assert calls == [1]
    restore(model)
    assert model.forward is counted


def test_without_a_gpu_nothing_is_captured_or_reported(model):
    ids, mask = padded_batch(PADDING, PROMPT)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = generate(model, ids, mask, 40, return_dict_in_generate=True)
    assert not result.past_key_values.is_static


# What follows needs a GPU.


def gpu_model(family="llama", **changes):
    """A tiny model in half precision whose attention has kernels."""
    model = tiny_model(family, head_dim=64, **changes).to("cuda", torch.bfloat16)
    head_map = HeadMap.uniform((1, 4), convertible_layers(model.config), HEADS, KEY_VALUE_HEADS)
    rule = sparse_config(model, block_size=16, sliding_window=32, top_p=0.6).attention
    config = RTPurboConfig(head_map, rule, IndexerSettings(index_dim=16))
    return make_sparse(model, config)


@pytest.fixture
def gpu_batch():
    def batch(padding, length=60):
        return tuple(part.cuda() for part in padded_batch(padding, length))

    return batch


def captures(model):
    return len(model._rtpurbo_decoder._prepared)


def in_both_ways(model, monkeypatch, run):
    """Results of a run with graphs, and with the same static steps run by Python."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="decoding runs without")
        graphed = run()
    with monkeypatch.context() as patched:
        patched.setattr(decoding.GraphedDecoder, "graph_class", PlainStep)
        model._rtpurbo_decoder = decoding.GraphedDecoder()
        plain = run()
    model._rtpurbo_decoder = decoding.GraphedDecoder()
    return graphed, plain


@pytest.mark.gpu
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen3_moe"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("batch", BATCHES)
def test_graphs_give_the_same_tokens_as_their_steps(family, options, batch, gpu_batch, monkeypatch):
    model, (ids, mask) = gpu_model(family), gpu_batch(BATCHES[batch])
    results, appended = [], []

    def counted(module, *arguments):
        appended.append(module)
        return append_fused(module, *arguments)

    append_fused = fused_append.append_fused
    monkeypatch.setattr(fused_append, "append_fused", counted)

    def run():
        appended.clear()
        result = generate(model, ids, mask, return_dict_in_generate=True, **options)
        results.append((captures(model), result.past_key_values.is_static))
        assert set(appended) == set(headwise_modules(model))  # by its kernel
        return result.sequences

    graphed, plain = in_both_ways(model, monkeypatch, run)
    assert torch.equal(graphed, plain)
    assert results == [(1, True)] * 2


@pytest.mark.gpu
@pytest.mark.parametrize("batch", BATCHES)
def test_graphs_are_as_exact_as_steps_as_usual(batch, gpu_batch):
    model, (ids, mask) = gpu_model(), gpu_batch(BATCHES[batch], 200)
    # All that is far is selected, and has mass: a key at the edge may fall to either side.
    for module in headwise_modules(model):
        module.indexer.query_weight.data.mul_(0.005)
    steps = [1] * 60 + [9] + [1] * 107
    logits = []
    with runtime(model).rule(min_tokens=ids.shape[1]):
        for graphs in (True, False):
            model.rtpurbo_graphs = graphs
            cache = HeadwiseCache(model)
            logits.append(decoded(model, ids, mask, cache, steps).float())
            assert cache.is_static == graphs
        exact = decoded(model.float(), ids, mask, HeadwiseCache(model), steps)
    real = mask[:, -exact.shape[1] :].bool()
    # Half precision alone moves logits of these random weights by several percent at places.
    by_graphs, as_usual = ((found - exact)[real] for found in logits)
    assert as_usual.norm() < 0.1 * exact[real].norm()
    assert by_graphs.norm() < 1.2 * as_usual.norm()
    assert by_graphs.abs().max() < 2 * as_usual.abs().max()


@pytest.mark.gpu
def test_sampling_works_with_graphs(gpu_batch, monkeypatch):
    model, (ids, mask) = gpu_model(), gpu_batch(PADDING)

    def run():
        torch.manual_seed(3)
        return generate(model, ids, mask, do_sample=True, top_k=8)

    assert torch.equal(*in_both_ways(model, monkeypatch, run))


@pytest.mark.gpu
def test_graphs_are_captured_again_where_a_cache_grows(gpu_batch, monkeypatch):
    monkeypatch.setattr(decoding, "roomy_capacity", lambda tokens, expected: tokens + 9)
    model, (ids, mask) = gpu_model(), gpu_batch(PADDING)
    assert torch.equal(*in_both_ways(model, monkeypatch, lambda: generate(model, ids, mask)))


@pytest.mark.gpu
def test_another_turn_and_another_batch(gpu_batch, monkeypatch):
    model = gpu_model()

    def run():
        ids, mask = gpu_batch(PADDING)
        first = generate(model, ids, mask, 20, return_dict_in_generate=True)
        question, _ = gpu_batch((0,) * len(ids), 9)
        ids = torch.cat([first.sequences, question], 1)
        mask = torch.cat([mask, mask.new_ones(len(mask), ids.shape[1] - mask.shape[1])], 1)
        second = generate(model, ids, mask, 20, past_key_values=first.past_key_values)
        return torch.cat([second.flatten(), generate(model, *gpu_batch((0,))).flatten()])

    assert torch.equal(*in_both_ways(model, monkeypatch, run))


@pytest.mark.gpu
def test_memory_of_graphs_is_freed(gpu_batch):
    model, (ids, mask) = gpu_model(), gpu_batch(PADDING)
    held = []
    for _ in range(4):
        generate(model, ids, mask)
        gc.collect()
        held.append(torch.cuda.memory_allocated())
    assert held[-1] == held[1]


def waiting_head(model):
    """Makes every forward wait for the device."""
    original = model.lm_head.forward

    def forward(hidden):
        logits = original(hidden)
        return logits + 0 * logits.sum().item()

    model.lm_head.forward = forward


@pytest.mark.gpu
@pytest.mark.parametrize("is_seen_before", [True, False])
def test_a_step_that_synchronises_is_reported(gpu_batch, monkeypatch, is_seen_before):
    model, (ids, mask) = gpu_model(), gpu_batch(PADDING)
    waiting_head(model)
    if not is_seen_before:  # it breaks the capture then
        monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: None)
    stream = torch.cuda.current_stream()
    with pytest.warns(UserWarning, match="without a CUDA graph") as warned:
        results = [generate(model, ids, mask) for _ in range(2)]
    assert torch.equal(*results)
    assert len(warned) == 1
    assert torch.cuda.current_stream() == stream
    # Sampling and the allocator are as before.
    assert generate(model, ids, mask, do_sample=True).shape == results[0].shape
    torch.cuda.empty_cache()
    # Another model is not concerned.
    other = gpu_model()
    generate(other, ids, mask)
    assert captures(other) == 0  # its cache is gone
    kept = generate(other, ids, mask, return_dict_in_generate=True)
    assert captures(other) == 1
    assert kept.past_key_values.is_static


@pytest.mark.gpu
def test_full_precision_is_reported(gpu_batch):
    model, (ids, mask) = sparse_model(dtype=torch.float32).cuda(), gpu_batch(PADDING)
    with pytest.warns(UserWarning, match="without kernels"):
        generate(model, ids, mask)

import pytest
import torch

from rtpurbo.benchmarks import artifact_model
from rtpurbo.benchmarks.artifact_model import HeldOutText, bench_artifact
from rtpurbo.benchmarks.model_case import USABLE_MEMORY
from rtpurbo.benchmarks.sparse_model import read_prompts
from rtpurbo.benchmarks.timing import max_calls
from rtpurbo.data.texts import TextCorpus
from rtpurbo.errors import RTPurboError
from rtpurbo.models.architecture import attention_shapes
from rtpurbo.models.artifact import load
from rtpurbo.models.cache import HeadwiseCache
from tests.benchmarks.support import FakeClock, found, session
from tests.tiny_artifact import save_tiny_artifact, save_tiny_base
from tests.tiny_tokenizer import tiny_tokenizer

LENGTH = 160


class RepeatingClock(FakeClock):
    """Runs the calls that are timed, as a real clock does."""

    def times(self, call, repeats):
        for _ in range(repeats):
            call()
        return super().times(call, repeats)


def loading_with(rule):
    """`load` of an artifact whose rule has other values."""

    def loaded(*args, **options):
        model, tokenizer = load(*args, **options)
        model.rtpurbo.set_rule(**rule)
        return model, tokenizer

    return loaded


def run(artifact, *phases, batches=(1,), lengths=(LENGTH,), **options):
    made = session(repeats=3, clock=RepeatingClock(), **options)
    bench_artifact(made, artifact, phases, lengths, batches, torch.float32)
    return made


def test_decode_steps_run_the_rule_of_the_artifact_at_every_batch_size(tiny_artifact):
    made = run(tiny_artifact, "decode", batches=(1, 3))
    assert not made.results.errors
    records = made.results.records
    kinds = [(record.implementation, record.batch_size) for record in records]
    assert kinds == [("sdpa-flash", 1), ("sdpa-flash", 3), ("rtpurbo", 1), ("rtpurbo", 3)]
    assert {record.model for record in records} == {"artifact artifact, 2 layers"}
    assert {record.context_length for record in records} == {LENGTH}
    assert {(record.num_retrieval_heads, record.sliding_window) for record in records} == {(4, 32)}
    assert {record.density for record in records if record.implementation == "sdpa-flash"} == {1}
    sparse = found(made)["rtpurbo"]
    assert "own rule on held-out text (distinct prompts: 3)" in sparse.note
    assert "forced" not in sparse.note


@pytest.mark.parametrize(
    ("rule", "keys"),
    # Near ones are the window of 32 and the sinks: the others are far.
    [({"top_p": 1.0}, LENGTH - 32 - 4), ({"top_p": 1e-6, "min_tokens": 8}, 8)],
)
def test_the_density_of_decode_steps_is_what_their_selections_read(
    tiny_artifact, monkeypatch, rule, keys
):
    monkeypatch.setattr(artifact_model, "load", loading_with(rule))
    record = found(run(tiny_artifact, "decode", wanted=("rtpurbo",)))["rtpurbo"]
    # Steps before the last one have fewer far keys.
    assert record.density == pytest.approx(keys / LENGTH, abs=0.02)


def test_a_prompt_with_dense_retrieval_heads(tiny_artifact):
    records = found(run(tiny_artifact, "prefill", batches=(4,)))
    assert set(records) == {"sdpa-flash", "rtpurbo-dense-retrieval"}
    assert {record.density for record in records.values()} == {1}
    assert {record.batch_size for record in records.values()} == {1}


def test_a_prompt_with_sparse_retrieval_heads_has_its_own_density(tiny_artifact, monkeypatch):
    rule = {"prefill_mode": "row_peak", "block_size": 16, "query_block_size": 32}
    monkeypatch.setattr(artifact_model, "load", loading_with(rule))
    records = found(run(tiny_artifact, "prefill"))
    assert set(records) == {"sdpa-flash", "rtpurbo"}
    near = sum(min(query + 1, 32) for query in range(LENGTH)) / (LENGTH * (LENGTH + 1) / 2)
    assert near < records["rtpurbo"].density < 1


@pytest.mark.parametrize("dense_prompt_queries", [0, 64])
def test_a_batch_of_prompts_decodes_as_each_of_them_does(tiny_artifact, dense_prompt_queries):
    model, _ = load(tiny_artifact)
    model.rtpurbo.set_rule(dense_prompt_queries=dense_prompt_queries)
    torch.manual_seed(0)
    ids = torch.randint(512, (3, 120))
    with torch.no_grad():
        together = read_prompts(model, ids[:, :100], 120, 5)
        order = torch.tensor([0, 1, 2, 0, 1])
        for position in range(100, 120):
            tokens = ids[order, position : position + 1]
            logits = model(tokens, past_key_values=together).logits
        for sequence in range(3):
            alone = HeadwiseCache(model)
            model(ids[sequence : sequence + 1, :100], past_key_values=alone)
            for position in range(100, 120):
                token = ids[sequence : sequence + 1, position : position + 1]
                expected = model(token, past_key_values=alone).logits
            for found_logits in logits[order == sequence]:
                torch.testing.assert_close(found_logits, expected[0], atol=1e-3, rtol=1e-4)


def test_the_steps_of_a_measurement_end_within_the_context(tiny_artifact):
    made = run(tiny_artifact, "decode", lengths=(1024,), wanted=("rtpurbo",))
    assert not made.results.errors
    assert made.clock.repeats == [3, 3]
    assert max_calls(3) >= 2 + sum(made.clock.repeats)


def test_without_lengths_the_usual_ones_within_the_context(tiny_artifact):
    made = run(tiny_artifact, "prefill", lengths=None, wanted=("sdpa-flash",))
    assert [record.context_length for record in made.results.records] == [1024]


@pytest.mark.parametrize(
    ("lengths", "message"),
    [((160, 1025), "--length 1025 is above the context"), ((20,), "leaves no prompt")],
)
def test_lengths_that_cannot_be_measured(tiny_artifact, lengths, message):
    with pytest.raises(RTPurboError, match=message):
        run(tiny_artifact, "decode", lengths=lengths)


def test_layers_without_full_attention_are_refused(tmp_path):
    base = save_tiny_base(tmp_path / "base", family="gemma3_text")
    artifact = save_tiny_artifact(tmp_path / "artifact", base)
    with pytest.raises(RTPurboError, match="layers without full attention"):
        run(artifact, "decode")


def test_every_sequence_reads_another_passage():
    documents = tuple(" ".join(map(str, range(first, first + 400))) for first in range(20))
    text = HeldOutText(TextCorpus("test", documents), tiny_tokenizer(), 50)
    passages = text.passages(3, 50)
    assert passages.shape == (3, 50)
    assert len({tuple(passage) for passage in passages.tolist()}) == 3
    assert torch.equal(text.passages(2, 30), passages[:2, :30])
    alone = HeldOutText(TextCorpus("test", ("word " * 400,)), tiny_tokenizer(), 300)
    with pytest.raises(RTPurboError, match="no 4 different passages of 300 tokens"):
        alone.passages(4, 300)


def test_more_sequences_of_the_sparse_model_fit_into_a_memory(tiny_artifact, monkeypatch):
    monkeypatch.setattr(artifact_model, "MAX_PASSAGES", 2)
    model, _ = load(tiny_artifact)
    weights = sum(weight.nbytes for weight in [*model.parameters(), *model.buffers()])
    [(kv_heads, head_dim)] = {
        (shape.num_key_value_heads, shape.head_dim)
        for shape in attention_shapes(model.config).values()
    }
    length, layers = 800, model.config.num_hidden_layers
    dense_bytes = 2 * length * kv_heads * head_dim * 4 * layers
    memory = (weights + 2.5 * dense_bytes) / USABLE_MEMORY / 1e9
    made = session(repeats=3, clock=RepeatingClock())
    bench_artifact(made, tiny_artifact, ["decode"], [length], [1], torch.float32, memory_gb=memory)
    assert not made.results.errors
    found_at = {
        (record.implementation, record.batch_size): record for record in made.results.records
    }
    for (_, batch), record in found_at.items():
        assert record.tokens_per_second == pytest.approx(1000 * batch / record.milliseconds, abs=1)
    filling = {name: batch for (name, batch), record in found_at.items() if record.memory_gb}
    cache = read_prompts(model, torch.ones(1, length, dtype=torch.int64), length, 1)
    expected = int((USABLE_MEMORY * memory * 1e9 - weights) // cache.num_bytes())
    assert filling == {"sdpa-flash": 2, "rtpurbo": expected}
    assert expected > 2
    assert "distinct prompts: 2" in found_at["rtpurbo", expected].note


def test_a_memory_that_is_too_small_is_a_note(tiny_artifact):
    made = session(repeats=3)
    bench_artifact(made, tiny_artifact, ["decode"], [LENGTH], [1], torch.float32, memory_gb=1e-5)
    assert {record.batch_size for record in made.results.records} == {1}
    assert any("not one sequence of 160 tokens fits" in note for note in made.results.notes)

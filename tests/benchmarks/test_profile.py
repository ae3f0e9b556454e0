import pytest
import torch

from rtpurbo.benchmarks.profile import bench_profile, observe, repeated
from rtpurbo.errors import RTPurboError
from tests.benchmarks.support import CPU, RULE, found, session
from tests.tiny_artifact import save_tiny_artifact
from tests.tiny_models import make_sparse, sparse_config, tiny_model


@pytest.fixture(scope="module")
def artifact(tiny_base):
    return save_tiny_artifact(tiny_base.with_name("profiled"), tiny_base, heads=(1, 4))


def test_states_are_the_document_s_again_and_again(artifact):
    case = observe(artifact, RULE, 100, torch.float16, CPU)
    states = case.states
    assert states.queries.shape == (1, 6, 100, 8)
    assert states.index_keys.shape[:3] == (1, 2, 100)
    assert case.shape.retrieval_heads == (1, 4)
    assert "100 tokens" in case.note
    longer = repeated(states, 250)
    assert torch.equal(longer.keys[:, :, 200:], states.keys[:, :, :50])
    assert torch.equal(longer.index_queries[:, :, 100:200], states.index_queries)


def test_the_density_is_that_of_the_index(artifact):
    made = session(wanted=("rtpurbo", "sdpa-flash"))
    bench_profile(made, artifact, RULE, [150], torch.float16)
    assert not made.results.errors
    records = found(made)
    ours = records["rtpurbo"]
    assert 0 < ours.density < 1
    assert "density as selected by the index" in ours.note
    assert "from a document of 150 tokens" in records["sdpa-flash"].note
    assert (ours.num_attention_heads, ours.head_dim) == (6, 8)


def test_an_artifact_without_retrieval_heads_is_refused(tiny_base, monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(
        "rtpurbo.benchmarks.profile.load",
        lambda *args, **options: (make_sparse(model, sparse_config(model, ())), None),
    )
    with pytest.raises(RTPurboError, match="no retrieval heads"):
        observe("empty", RULE, 100, torch.float16, CPU)

from types import SimpleNamespace

import pytest

from rtpurbo.errors import RTPurboError
from rtpurbo.models.artifact_config import FORMAT_VERSION
from rtpurbo.serving.vllm.checkpoint import read_config
from tests.tiny_models import sparse_config, tiny_model


def hf_config(**changes):
    """A configuration as an export has it."""
    model = tiny_model()
    entry = {"format_version": FORMAT_VERSION, **sparse_config(model).to_dict()}
    entry["indexer"]["min_wavelength"] = 256.0
    for name, value in changes.pop("entry", {}).items():
        entry[name] = {**entry[name], **value} if isinstance(value, dict) else value
    own = {**model.config.to_dict(), "rtpurbo": entry, "rswa_window": 1}
    return SimpleNamespace(**own | changes)


def test_the_loader_reads_an_export():
    config = read_config(hf_config())
    assert config.head_map.retrieval_heads == ((1, 4), (1, 4))
    assert config.indexer.min_wavelength == 256


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"rtpurbo": None}, "lacks the entry 'rtpurbo'"),
        ({"rswa_window": None}, "or 'rswa_window'"),
        ({"entry": {"format_version": FORMAT_VERSION + 1}}, "has format version 2"),
        ({"num_hidden_layers": 3}, "the head map belongs to another model"),
        ({"num_key_value_heads": 2}, "the head map belongs to another model"),
        ({"entry": {"attention": {"prefill_mode": "row_share"}}}, "change it to 'dense'"),
        ({"entry": {"attention": {"top_q": 1}}}, "holds an unknown field"),
        ({"entry": {"indexer": {"min_wavelength": None}}}, "lacks min_wavelength"),
        (
            {
                "layer_types": ["linear_attention", "full_attention"],
                "entry": {"head_map": {"retrieval_heads": [None, [1, 4]]}},
            },
            r"layers of the type \['linear_attention'\], but only layers with full attention",
        ),
        ({"llama_4_scaling": {"beta": 1}}, "models with llama_4_scaling are not supported"),
    ],
)
def test_refuses(changes, sentence):
    with pytest.raises(RTPurboError, match=sentence):
        read_config(hf_config(**changes))

"""Names and signatures of vLLM that the plugin relies on; run with every version in `TESTED`."""

import inspect
from dataclasses import fields
from importlib import import_module

import pytest
import torch
from vllm.model_executor.layers.layernorm import GemmaRMSNorm
from vllm.model_executor.layers.rotary_embedding import RotaryEmbedding
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.kv_cache_interface import KVCacheSpec

from rtpurbo.serving.vllm.layout import BLOCK_SIZES
from rtpurbo.serving.vllm.metadata import HeadwiseBackend, HeadwiseMetadataBuilder
from rtpurbo.serving.vllm.specs import OwnBlocksManager, SinkWindowManager
from rtpurbo.serving.vllm.versions import block_table_width

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    "cls", [SinkWindowManager, OwnBlocksManager, HeadwiseMetadataBuilder, HeadwiseBackend]
)
def test_overrides_accept_the_arguments_of_vllm(cls):
    base = cls.__bases__[0]
    compared = 0
    for name, ours in vars(cls).items():
        theirs = inspect.getattr_static(base, name, None)
        if theirs is None or name == "__init__":
            continue
        ours, theirs = (getattr(part, "__func__", part) for part in (ours, theirs))
        if not inspect.isfunction(ours):
            continue
        parameters = inspect.signature(theirs).parameters.values()
        variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        inspect.signature(ours).bind(
            **{part.name: None for part in parameters if part.kind not in variable}
        )
        compared += 1
    assert compared >= 2


def test_metadata_has_the_fields_that_the_builder_reads():
    names = {field.name for field in fields(CommonAttentionMetadata)}
    assert names >= {
        "query_start_loc_cpu", "seq_lens", "seq_lens_cpu_upper_bound", "rswa_prefix_lens",
        "block_table_tensor", "slot_mapping", "max_query_len", "num_reqs",
    }  # fmt: skip


def test_the_second_model_runner_calls_the_model_state():
    assert "prompt_len" in dir(NewRequestData) or "prompt_len" in {
        field.name for field in fields(NewRequestData)
    }
    batch = import_module("vllm.v1.worker.gpu.input_batch").InputBatch
    assert {"prompt_lens", "idx_mapping_np"} <= {field.name for field in fields(batch)}
    states = import_module("vllm.v1.worker.gpu.model_states.default").DefaultModelState
    assert list(inspect.signature(states.add_request).parameters) == [
        "self", "req_index", "new_req_data",
    ]  # fmt: skip
    assert list(inspect.signature(states.prepare_attn).parameters)[1] == "input_batch"
    resolve = import_module("vllm.v1.worker.gpu.model_states").resolve_model_state_cls
    assert "get_model_state_cls" in inspect.getsource(resolve)


def test_groups_may_have_no_part_in_prefixes():
    coordinator = import_module("vllm.v1.core.kv_cache_coordinator").HybridKVCacheCoordinator
    assert "prefix_cacheable" in inspect.getsource(coordinator.verify_and_split_kv_cache_groups)
    assert isinstance(inspect.getattr_static(KVCacheSpec, "prefix_cacheable"), property)
    manager = import_module("vllm.v1.core.kv_cache_manager").KVCacheManager
    assert "request.skip_reading_prefix_cache" in inspect.getsource(manager)


def test_rotary_embeddings_have_tables():
    rotary = RotaryEmbedding.__init__
    assert {"head_size", "rotary_dim", "is_neox_style"} <= set(inspect.signature(rotary).parameters)
    assert "cos_sin_cache" in inspect.getsource(RotaryEmbedding.forward_native)


def test_attention_layers_have_cache_scales():
    attention = import_module("vllm.model_executor.layers.attention.attention")
    source = inspect.getsource(attention.set_default_quant_scales)
    assert "layer._k_scale_float = 1.0" in source
    assert "layer._v_scale_float = 1.0" in source
    assert issubclass(GemmaRMSNorm, torch.nn.Module)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("max_model_len", [1000, 1024, 131072])
def test_block_tables_are_as_wide_as_those_of_the_model_runners(block_size, max_model_len):
    width = import_module("vllm.v1.worker.block_table").get_block_table_width
    expected = width(-(-max_model_len // block_size), block_size)
    assert block_table_width(block_size, max_model_len) == expected

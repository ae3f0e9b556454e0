"""Every kernel is compiled before the first request: requests launch no combination of arguments that is new."""

import pytest

from tests.vllm.checkpoints import HEAVY_HITTERS, random_prompts, save_checkpoint
from tests.vllm.scripts import result_of

pytestmark = pytest.mark.vllm

# Launches are recorded instead of executed, under the keys by which Triton compiles kernels for an H100.
SCRIPT = """
import json, sys
from types import SimpleNamespace
from vllm import LLM
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from rtpurbo.serving.vllm import attention, caches, cuda
from rtpurbo.serving.vllm.metadata import HeadwiseMetadataBuilder
from tests.vllm.engines import OPTIONS, answers

class Driver:
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

binders, recorded = {}, set()

def record(self, *arguments, grid, warmup, **options):
    if self not in binders:
        binders[self] = self.create_binder()[-1]
    options.setdefault("debug", False)
    _, specialization, options = binders[self](*arguments, **options)
    recorded.add((self.__name__, str(specialization), str(options)))

def with_uniform_steps(make):
    def init(self, *arguments):
        make(self, *arguments)
        self._serves_uniform = True
    return init

def main():
    checkpoint, prompts, new, fused, options = json.loads(sys.argv[1])
    if not fused:
        attention.rotary_table = lambda *arguments: None
    driver.set_active(Driver())
    JITFunction.run = record
    attention.current_platform = caches.current_platform = SimpleNamespace(is_cuda=lambda: True)
    HeadwiseMetadataBuilder.__init__ = with_uniform_steps(HeadwiseMetadataBuilder.__init__)
    # So that the batches of the test exceed the workspace.
    cuda.HISTOGRAM_BATCH = 2
    llm = LLM(checkpoint, **{**OPTIONS, **options})
    before = recorded.copy()
    recorded.clear()
    for batch in (prompts, prompts[:1], prompts):
        answers(llm, batch, new)
    names = sorted({name for name, *_ in recorded})
    late = sorted(recorded - before)
    result = {"before": len(before), "launched": len(recorded), "late": late, "names": names}
    print("RESULT " + json.dumps(result))

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("family", "rule", "shared_keys", "fused", "options"),
    [
        ("gpt_oss", {"dense_prompt_queries": 24}, True, True, {"kv_cache_dtype": "fp8"}),
        pytest.param("llama", {}, False, True, {}, marks=pytest.mark.slow),
        pytest.param("llama", HEAVY_HITTERS, False, True, {}, marks=pytest.mark.slow),
        # As with a rotary embedding that is not a table.
        pytest.param("qwen3", {"reading": "paper"}, True, False, {}, marks=pytest.mark.slow),
    ],
)
def test_requests_compile_no_kernel(family, rule, shared_keys, fused, options, tmp_path):
    # Every other layer of gpt-oss keeps its own window: here one has a single retrieval head, one has groups.
    layers = ((), (5,), (), tuple(range(8)))
    checkpoint = save_checkpoint(
        tmp_path, family, rule=rule, layers=layers, shared_keys=shared_keys
    )
    prompts = random_prompts((10, 70, 200, 333, 129, 17, 1))
    options = {"max_num_batched_tokens": 128, "enable_prefix_caching": True, **options}
    result = result_of(
        SCRIPT,
        tmp_path,
        str(checkpoint),
        prompts,
        5,
        fused,
        options,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        TRITON_INTERPRET="0",
    )
    assert result["late"] == []
    assert result["before"] >= result["launched"] >= 12
    kernels = {
        "combine_kernel", "selected_attention_kernel", "top_p_kernel", "window_and_scores_kernel",
        "window_kernel", "compact_groups_kernel", "lowest_levels_kernel",
        "selected_group_attention_kernel",
    }  # fmt: skip
    assert set(result["names"]) == kernels | ({"fused_append_kernel"} if fused else set())

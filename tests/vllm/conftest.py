"""vLLM is no dependency: without it, nothing here is collected."""

import os
from importlib.util import find_spec

import pytest
import torch

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

# Set before anything imports vLLM. Two cores are shared by all processes, and no network is used.
os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    # Engine and worker in this process, where a test can look at the scheduler's blocks.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}

from rtpurbo.models import fused_append  # noqa: E402
from rtpurbo.models.cache_layers import HeadwiseLayer  # noqa: E402
from tests.vllm.checkpoints import (  # noqa: E402
    LENGTHS,
    NEW,
    expected_answers,
    load_reference,
    random_prompts,
    save_checkpoint,
)

# Modules replace some of these fixtures, so all of them have the scope of a module.


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Exported small sparse Llama."""
    return save_checkpoint(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def reference(llama):
    """The same model in transformers."""
    return load_reference(llama)


@pytest.fixture(scope="module")
def prompts():
    """Token ids of random prompts."""
    return random_prompts(LENGTHS)


@pytest.fixture(scope="module")
def expected(reference, prompts):
    """Answers of transformers to the prompts."""
    return expected_answers(reference, prompts, NEW)


@pytest.fixture
def round_cache(monkeypatch):
    """A function that makes caches of transformers round keys and values to float8 with these scales."""
    append = HeadwiseLayer.append

    def rounded(states, scale):
        scaled = (states * (1 / scale)).clamp(-448, 448)
        return scaled.to(torch.float8_e4m3fn).to(states.dtype) * scale

    def patch(key_scale, value_scale):
        def rounding(self, keys, values, *arguments):
            return append(self, rounded(keys, key_scale), rounded(values, value_scale), *arguments)

        monkeypatch.setattr(HeadwiseLayer, "append", rounding)
        # The fused KV append of a GPU writes keys and values itself.
        monkeypatch.setattr(fused_append, "supports_fused_append", lambda *_: False)

    return patch

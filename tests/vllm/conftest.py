"""vLLM is no dependency: without it, nothing here is collected."""

import os
from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("vllm") else ["test_*.py"]

# Told before anything imports vLLM. Two cores are shared by all of it, and nothing is asked of a network.
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

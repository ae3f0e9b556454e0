"""vLLM engines in this process, with a look at their blocks."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams
from vllm.compilation.monitor import set_cudagraph_capturing_enabled
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.v1.core.sched.scheduler import Scheduler

OPTIONS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "seed": 0,
}

# Options of an engine on a GPU: a share of the memory that leaves room for other engines on the same one.
ON_GPU = {"kv_cache_memory_bytes": 1 << 30, "gpu_memory_utilization": 0.2}


@contextmanager
def running(checkpoint: Path, **options: Any) -> Iterator[LLM]:
    """An engine in fp32, gone afterwards."""
    # The first model runner leaves capturing disabled, and the second one, in the same process, never enables it.
    set_cudagraph_capturing_enabled(True)
    llm = LLM(str(checkpoint), **{**OPTIONS, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def greedy(max_tokens: int) -> SamplingParams:
    """So many tokens, always the likeliest one."""
    return SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)


def answers(llm: LLM, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Greedy answers of the engine, all prompts at once."""
    return [list(output.outputs[0].token_ids) for output in outputs(llm, prompts, max_tokens)]


def outputs(llm: LLM, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Any]:
    """The same with everything that vLLM tells about each request."""
    given = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    return llm.generate(given, greedy(max_tokens), use_tqdm=False)


def assert_same_answers_twice(
    llm: LLM,
    reference: Any,
    prompts: Sequence[Sequence[int]],
    expected: Sequence[Sequence[int]],
    **options: Any,
) -> list[list[Any]]:
    """Compares the answers of two passes, the second from the prefix cache, after which every block is free again.

    Returns:
        Outputs of vLLM for each prompt, of both passes.
    """
    # Imported here: a script that serves a dense model imports this module and checks that rtpurbo is not imported.
    from tests.vllm.checkpoints import assert_same_answers

    free = free_blocks(llm)
    passes = [outputs(llm, prompts, len(expected[0])) for _ in range(2)]
    for found in passes:
        tokens = [list(output.outputs[0].token_ids) for output in found]
        assert_same_answers(reference, prompts, tokens, expected, **options)
    assert free_blocks(llm) == free
    return passes


def scheduler(llm: LLM) -> Any:
    """Of the engine, which runs in this process."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def counted_preemptions(monkeypatch: Any) -> list[str]:
    """A list that gets the name of every request that has to give its blocks back."""
    preemptions: list[str] = []
    preempt = Scheduler._preempt_request

    def counted(self: Scheduler, request: Any, *arguments: Any, **options: Any) -> Any:
        preemptions.append(request.request_id)
        return preempt(self, request, *arguments, **options)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    return preemptions


def free_blocks(llm: LLM) -> int:
    """Blocks that no request holds."""
    return scheduler(llm).kv_cache_manager.block_pool.get_num_free_blocks()

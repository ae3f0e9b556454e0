"""Engines in processes of their own: tensor and data parallelism, a killed worker, and dense models."""

import pytest

from tests.vllm.checkpoints import (
    HEAVY_HITTERS,
    assert_same_answers,
    expected_answers,
    load_reference,
    random_prompts,
    save_checkpoint,
)
from tests.vllm.scripts import result_of, run

pytestmark = pytest.mark.vllm

NEW = 24
# Ranks of two have different numbers of full KV heads and of retrieval heads; in the second layer only
# the second rank has any, in the third one neither.
UNEVEN = ((0, 1, 2, 6), (5, 7), (), (0, 1, 2, 3, 4, 5, 6, 7), (4,))

GENERATE = """
import json, sys
from vllm import LLM
from tests.vllm.engines import OPTIONS, answers

def main():
    checkpoint, prompts, new, options = json.loads(sys.argv[1])
    llm = LLM(checkpoint, **{**OPTIONS, **options})
    found = [answers(llm, prompts, new) for _ in range(2)]
    tokens = llm.llm_engine.vllm_config.cache_config.kv_cache_size_tokens
    ours = sorted(name for name in sys.modules if name.startswith("rtpurbo"))
    print("RESULT " + json.dumps({"answers": found, "tokens": tokens, "modules": ours}))

if __name__ == "__main__":
    main()
"""

DATA_PARALLEL = """
import asyncio, json, sys
from vllm import AsyncEngineArgs, AsyncLLMEngine
from tests.vllm.engines import OPTIONS, greedy

async def answer(engine, number, prompt, new):
    async for output in engine.generate({"prompt_token_ids": prompt}, greedy(new), str(number)):
        last = output
    return list(last.outputs[0].token_ids)

async def main():
    checkpoint, prompts, new = json.loads(sys.argv[1])
    engine = AsyncLLMEngine.from_engine_args(
        AsyncEngineArgs(checkpoint, data_parallel_size=2, **OPTIONS)
    )
    tasks = [answer(engine, number, prompt, new) for number, prompt in enumerate(prompts)]
    print("RESULT " + json.dumps(await asyncio.gather(*tasks)), flush=True)
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main())
"""

KILL = """
import asyncio, os, signal, sys, time
import psutil
from vllm import AsyncEngineArgs, AsyncLLMEngine
from vllm.v1.engine.exceptions import EngineDeadError
from tests.vllm.engines import OPTIONS, greedy

async def main():
    engine = AsyncLLMEngine.from_engine_args(
        AsyncEngineArgs(sys.argv[1], tensor_parallel_size=2, **OPTIONS)
    )
    killed = None
    try:
        stream = engine.generate({"prompt_token_ids": list(range(5, 50))}, greedy(900), "request")
        async for output in stream:
            if killed is None and len(output.outputs[0].token_ids) > 5:
                # Workers are the engine's children, and it is ours.
                family = psutil.Process().children(recursive=True)
                worker = next(p for p in family if "Worker" in p.name() or "Worker" in " ".join(p.cmdline()))
                os.kill(worker.pid, signal.SIGKILL)
                killed = time.monotonic()
    except EngineDeadError as error:
        print(f"DEAD after {time.monotonic() - killed:.1f} s", flush=True)
    engine.shutdown()

if __name__ == "__main__":
    asyncio.run(main())
"""


def generated(tmp_path, checkpoint, prompts, environment=None, **options):
    """Answers of a separate engine, generated twice, and the figures that it reports."""
    return result_of(
        GENERATE, tmp_path, str(checkpoint), prompts, NEW, options, **(environment or {})
    )


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("uneven"), layers=UNEVEN)


@pytest.fixture(scope="module")
def prompts():
    return random_prompts((10, 70, 333, 150))


@pytest.mark.parametrize(
    ("shared_keys", "rule", "chunk"),
    [(False, {}, 64), (True, {}, 64), (False, HEAVY_HITTERS, 1024)],
)
def test_two_ranks_with_different_heads(shared_keys, rule, chunk, prompts, tmp_path):
    uneven = save_checkpoint(tmp_path, layers=UNEVEN, shared_keys=shared_keys, rule=rule)
    reference = load_reference(uneven)
    wanted = expected_answers(reference, prompts, NEW)
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    options = {"tensor_parallel_size": 2, "max_num_batched_tokens": chunk}
    for answers in generated(tmp_path, uneven, prompts, binding, **options)["answers"]:
        assert_same_answers(reference, prompts, answers, wanted)


def test_two_engines_of_data_parallelism(uneven, prompts, tmp_path):
    reference = load_reference(uneven)
    wanted = expected_answers(reference, prompts, NEW)
    found = result_of(DATA_PARALLEL, tmp_path, str(uneven), prompts, NEW)
    assert_same_answers(reference, prompts, found, wanted)


def test_an_engine_in_another_process(uneven, prompts, tmp_path):
    """It unpickles specs that the plugin did not register there."""
    reference = load_reference(uneven)
    wanted = expected_answers(reference, prompts, NEW)
    for answers in generated(tmp_path, uneven, prompts)["answers"]:
        assert_same_answers(reference, prompts, answers, wanted)


def test_a_killed_worker_ends_the_engine(uneven, tmp_path):
    printed = run(KILL, tmp_path, str(uneven), VLLM_CPU_OMP_THREADS_BIND="0|1")
    (line,) = [line for line in printed.splitlines() if line.startswith("DEAD after ")]
    assert float(line.split()[2]) < 30


def test_a_dense_model_is_as_it_was(uneven, prompts, tmp_path):
    base = uneven.parent / "base"
    with_plugin = generated(tmp_path, base, prompts)
    without = generated(tmp_path, base, prompts, {"VLLM_PLUGINS": ""})
    assert with_plugin["answers"] == without["answers"]
    assert with_plugin["tokens"] == without["tokens"]
    assert "rtpurbo.serving.vllm.plugin" in with_plugin["modules"]
    # The plugin, and the registration with transformers' Auto classes.
    assert set(with_plugin["modules"]) <= {
        "rtpurbo", "rtpurbo.errors", "rtpurbo.models", "rtpurbo.models.auto",
        "rtpurbo.models.model_config", "rtpurbo.serving", "rtpurbo.serving.vllm",
        "rtpurbo.serving.vllm.plugin", "rtpurbo.version",
    }  # fmt: skip
    assert without["modules"] == []

"""Many clients at once, some of whom hang up: answers stay right, and nothing is lost."""

import gc
import os
import random
from pathlib import Path

import pytest
import torch

from tests.vllm.checkpoints import (
    assert_same_answers,
    load_reference,
    random_prompts,
    save_checkpoint,
)
from tests.vllm.engines import ON_GPU, answers, free_blocks, greedy, running

pytestmark = pytest.mark.vllm

CLIENTS, REQUESTS, LONGEST_ANSWER = 32, 500, 48
PAGE = os.sysconf("SC_PAGE_SIZE")


def in_use():
    """Resident bytes and tensors."""
    gc.collect()
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * PAGE
    return resident, sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
            ],
        ),
    ],
)
def test_five_hundred_requests_of_thirty_two_clients(device, tmp_path):
    checkpoint = save_checkpoint(tmp_path)
    generator = random.Random(0)
    prompts = random_prompts([generator.randrange(1, 400) for _ in range(40)])
    # Some begin as another does.
    prompts += [
        prompts[number][: generator.randrange(1, 200)] + prompts[number + 1][:50]
        for number in range(20)
    ]
    with running(
        checkpoint,
        max_num_seqs=CLIENTS,
        max_num_batched_tokens=256,
        max_model_len=512,
        # Too few for all: some requests have to give their blocks back.
        num_gpu_blocks_override=500,
        **(ON_GPU if device == "cuda" else {}),
    ) as llm:
        engine, free = llm.llm_engine, free_blocks(llm)
        single = [answers(llm, [prompt], LONGEST_ANSWER)[0] for prompt in prompts]
        llm.reset_prefix_cache()
        wanted, done, aborted, memory = {}, {}, set(), []
        sent = 0
        while len(done) + len(aborted) < REQUESTS:
            while sent < REQUESTS and len(wanted) - len(done) - len(aborted) < CLIENTS:
                number, length = generator.randrange(len(prompts)), generator.randrange(1, 49)
                name = str(sent)
                wanted[name] = (number, length)
                engine.add_request(name, {"prompt_token_ids": prompts[number]}, greedy(length))
                sent += 1
            for output in engine.step():
                if output.finished and output.request_id not in aborted:
                    done[output.request_id] = list(output.outputs[0].token_ids)
            running_now = [name for name in wanted if name not in done and name not in aborted]
            # As many steps as a request takes, about, and a tenth of the requests.
            if running_now and generator.random() < 0.1 * REQUESTS / 600:
                name = generator.choice(running_now)
                engine.abort_request([name])
                aborted.add(name)
            if len(done) // 100 > len(memory):
                memory.append(in_use())
        while engine.has_unfinished_requests():
            engine.step()
        print(f"{len(done)} done, {len(aborted)} aborted; (bytes, tensors): {memory}")
        assert len(aborted) > REQUESTS / 12
        assert free_blocks(llm) == free
        (bytes_before, tensors_before), *_, (bytes_after, tensors_after) = memory
        # vLLM itself takes some more with every new shape, with a dense model 9 % from the first hundred
        # requests to the fifth, and nothing more from the thirteenth on.
        assert bytes_after < bytes_before * 1.1
        assert tensors_after <= tensors_before
    reference = load_reference(checkpoint, device)
    names = list(done)
    assert_same_answers(
        reference,
        [prompts[wanted[name][0]] for name in names],
        [done[name] for name in names],
        [single[wanted[name][0]][: wanted[name][1]] for name in names],
    )

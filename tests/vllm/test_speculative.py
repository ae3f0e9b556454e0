"""Drafts from n-grams of the request: the tokens are those without drafts."""

import pytest

from tests.vllm.checkpoints import (
    HEAVY_HITTERS,
    assert_same_answers,
    expected_answers,
    load_reference,
    random_prompts,
    save_checkpoint,
)
from tests.vllm.scripts import result_of

pytestmark = pytest.mark.vllm

NEW = 40
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 3,
    "prompt_lookup_max": 3,
    "prompt_lookup_min": 1,
}
# A process of its own: a second engine in a process does not start after numba was imported.
SCRIPT = """
import json, sys
from vllm import LLM
from vllm.v1.core.sched.scheduler import Scheduler
from tests.vllm.engines import OPTIONS, answers, free_blocks

counts = [0, 0]
make = Scheduler.make_spec_decoding_stats

def counted(self, *arguments, **options):
    counts[0] += options["num_draft_tokens"]
    counts[1] += options["num_accepted_tokens"]
    return make(self, *arguments, **options)

def main():
    Scheduler.make_spec_decoding_stats = counted
    checkpoint, prompts, new, options = json.loads(sys.argv[1])
    llm = LLM(checkpoint, **{**OPTIONS, **options})
    free = free_blocks(llm)
    found = [answers(llm, prompts, new) for _ in range(2)]
    print("RESULT " + json.dumps({"answers": found, "counts": counts, "lost": free - free_blocks(llm)}))

if __name__ == "__main__":
    main()
"""


@pytest.mark.parametrize(
    ("rule", "chunk"), [({"dense_prompt_queries": 24}, 128), (HEAVY_HITTERS, 2048)]
)
def test_answers_with_drafts(rule, chunk, tmp_path):
    checkpoint = save_checkpoint(tmp_path, rule=rule)
    reference = load_reference(checkpoint)
    # Of few distinct tokens, so that n-grams repeat; some drafts are accepted and most are not.
    prompts = random_prompts((10, 70, 200, 333, 600, 17), vocabulary=12)
    wanted = expected_answers(reference, prompts, NEW)
    options = {"speculative_config": NGRAM, "max_num_batched_tokens": chunk}
    found = result_of(
        SCRIPT,
        tmp_path,
        str(checkpoint),
        prompts,
        NEW,
        options,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    for answers in found["answers"]:
        assert_same_answers(reference, prompts, answers, wanted)
    drafts, accepted = found["counts"]
    assert drafts > accepted > 0
    assert found["lost"] == 0

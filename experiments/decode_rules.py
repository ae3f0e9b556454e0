"""What a decoding step may skip: needle questions under many selection rules over one prefill.

    python experiments/decode_rules.py ARTIFACT --data books.jsonl.gz --length 7500 --samples 12 --output decode_rules.json

Retrieval heads are dense in prefill, so every rule starts from the same cache; only the rows that write the answer differ.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import torch

from rtpurbo.data.needles import is_correct, make_retrieval_example
from rtpurbo.data.texts import load_texts
from rtpurbo.files import write_json_atomically
from rtpurbo.models.artifact import load
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.sparsify import counting, using_rule
from rtpurbo.models.text import stop_tokens

RULES: dict[str, dict[str, Any]] = {
    "dense": {"top_p": 1.0},
    "residual .90": {"reading": "residual", "top_p": 0.90},
    "residual .95": {"reading": "residual", "top_p": 0.95},
    "residual .98": {"reading": "residual", "top_p": 0.98},
    "far .80": {"reading": "far", "top_p": 0.80, "far_floor": 0.02},
    "far .90": {"reading": "far", "top_p": 0.90, "far_floor": 0.02},
    "far .95": {"reading": "far", "top_p": 0.95, "far_floor": 0.02},
    "residual .95, blocks of 16": {
        "reading": "residual",
        "top_p": 0.95,
        "granularity": "block",
        "block_size": 16,
    },
    "residual .95, blocks of 64": {
        "reading": "residual",
        "top_p": 0.95,
        "granularity": "block",
        "block_size": 64,
    },
}
TASKS = {"single": 1, "multikey": 4}


@torch.no_grad()
def main() -> None:
    """Answers every question under every rule and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--length", type=int, default=7500)
    parser.add_argument("--samples", type=int, default=12)
    parser.add_argument("--rules", nargs="+", default=list(RULES))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()

    model, tokenizer = load(arguments.artifact, device=arguments.device)
    corpus = load_texts(arguments.data, "heldout")
    stops = stop_tokens(model, tokenizer)
    right: dict[tuple[str, str], int] = {}
    read: dict[tuple[str, str], list[float]] = {}
    began = time.time()
    for number in range(arguments.samples):
        for task, num_keys in TASKS.items():
            rng = random.Random(f"decode-rules-{task}-{arguments.length}-{arguments.seed}-{number}")
            example = make_retrieval_example(
                tokenizer, corpus, arguments.length, rng, num_keys=num_keys
            )
            cache = HeadwiseCache(model)
            prompt = torch.tensor([example.prompt_ids], device=model.device)
            model(prompt[:, :-1], past_key_values=cache, logits_to_keep=1)
            for name in arguments.rules:
                written: list[int] = []
                with using_rule(model, **RULES[name]), counting(model) as statistics:
                    token = prompt[:, -1:]
                    while len(written) < len(example.answer_ids) + 8:
                        token = (
                            model(token, past_key_values=cache)
                            .logits[:, -1]
                            .argmax(-1, keepdim=True)
                        )
                        written.append(int(token))
                        if written[-1] in stops:
                            break
                cache.crop(-len(written))
                text = str(tokenizer.decode(written, skip_special_tokens=True))
                right[name, task] = right.get((name, task), 0) + is_correct(example, text)
                read.setdefault((name, task), []).append(statistics.share_read or 0.0)
        print(f"{number + 1} of {arguments.samples} ({time.time() - began:.0f} s)", flush=True)
        for name in arguments.rules:
            line = "  ".join(
                f"{task} {right[name, task]:3d} read {sum(read[name, task]) / len(read[name, task]):.3f}"
                for task in TASKS
            )
            print(f"  {name:28s} {line}", flush=True)
    records = [
        {
            "rule": name,
            "task": task,
            "context_length": arguments.length,
            "samples": arguments.samples,
            "score": 100 * right[name, task] / arguments.samples,
            "far_tokens_read": sum(read[name, task]) / len(read[name, task]),
        }
        for name, task in right
    ]
    write_json_atomically(arguments.output, {"artifact": arguments.artifact, "records": records})


if __name__ == "__main__":
    main()

"""What a decoding step may skip: answers to needle questions under many selection rules.

    python experiments/decode_rules.py ARTIFACT --data books.jsonl.gz --output decode_rules.json

The prompt is dense for retrieval heads, so that every rule starts from one cache. The answer's
tokens are given (teacher forcing); each rule is charged with the divergence of its predictions from
those of dense decoding, in nats a token, and with the far tokens that it reads.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import torch

from rtpurbo.data.needles import make_retrieval_example
from rtpurbo.data.texts import load_texts
from rtpurbo.files import write_json_atomically
from rtpurbo.models.artifact import load
from rtpurbo.models.cache import HeadwiseCache
from rtpurbo.models.sparsify import counting, using_rule

# Every row of the answer selects for itself, as a decoding step does.
BASE: dict[str, Any] = {"prefill_mode": "top_p", "min_tokens": 0}
BLOCKS = {"granularity": "block"}
RULES: dict[str, dict[str, Any]] = {
    "residual .90": {"top_p": 0.90},
    "residual .95": {"top_p": 0.95},
    "residual .97": {"top_p": 0.97},
    "residual .98": {"top_p": 0.98},
    "residual .99": {"top_p": 0.99},
    "residual .80, at least 128": {"top_p": 0.80, "min_tokens": 128},
    "residual .90, at least 64": {"top_p": 0.90, "min_tokens": 64},
    "residual .90, at least 128": {"top_p": 0.90, "min_tokens": 128},
    "residual .95, at least 16": {"top_p": 0.95, "min_tokens": 16},
    "residual .95, at least 64": {"top_p": 0.95, "min_tokens": 64},
    "residual .95, at least 128": {"top_p": 0.95, "min_tokens": 128},
    "residual .95, at least 256": {"top_p": 0.95, "min_tokens": 256},
    "residual .97, at least 128": {"top_p": 0.97, "min_tokens": 128},
    "residual .97, at least 512": {"top_p": 0.97, "min_tokens": 512},
    "far .80": {"reading": "far", "top_p": 0.80, "far_floor": 0.01},
    "far .90": {"reading": "far", "top_p": 0.90, "far_floor": 0.01},
    "far .95": {"reading": "far", "top_p": 0.95, "far_floor": 0.01},
    "residual .95, blocks of 16": {"top_p": 0.95, "block_size": 16, **BLOCKS},
    "residual .95, blocks of 64": {"top_p": 0.95, "block_size": 64, **BLOCKS},
    "near keys only": {"reading": "far", "far_floor": 0.9999},
}


@torch.no_grad()
def main() -> None:
    """Scores every rule on every question and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact")
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--length", type=int, default=7500)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--keys", type=int, default=1)
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()

    model, tokenizer = load(arguments.artifact, device=arguments.device)
    corpus = load_texts(arguments.data, "heldout")
    figures: dict[str, list[tuple[float, float, bool]]] = {name: [] for name in ("dense", *RULES)}
    began = time.time()
    for number in range(arguments.samples):
        example = make_retrieval_example(
            tokenizer,
            corpus,
            arguments.length,
            random.Random(f"decode-rules-{arguments.length}-{number}"),
            num_keys=arguments.keys,
            depth=(number + 0.5) / arguments.samples,
        )
        prompt = torch.tensor([example.prompt_ids], device=model.device)
        answer = torch.tensor([example.answer_ids], device=model.device)
        cache = HeadwiseCache(model)
        first = model(prompt, past_key_values=cache, logits_to_keep=1).logits
        dense = None
        for name, rule in {"dense": {"top_p": 1.0}, **RULES}.items():
            with using_rule(model, **{**BASE, **rule}), counting(model) as statistics:
                logits = model(answer[:, :-1], past_key_values=cache).logits
            cache.crop(-(answer.shape[1] - 1))
            predicted = torch.cat([first, logits], 1).log_softmax(-1)[0]
            dense = predicted if dense is None else dense
            divergence = (dense.exp() * (dense - predicted)).sum(-1)[1:].mean()
            right = bool((predicted.argmax(-1) == answer[0]).all())
            figures[name].append((float(divergence), statistics.share_read or 0.0, right))
        print(f"{number + 1} of {arguments.samples} ({time.time() - began:.0f} s)", flush=True)
    records = []
    for name, values in figures.items():
        divergence, read, right = (sum(part) / len(values) for part in zip(*values, strict=True))
        records.append(
            {"rule": name, "divergence": divergence, "far_tokens_read": read, "score": 100 * right}
        )
        print(f"{name:28s} divergence {divergence:.4f}  read {read:.4f}  right {100 * right:.0f} %")
    write_json_atomically(
        arguments.output,
        {
            "artifact": arguments.artifact,
            "context_length": arguments.length,
            "keys": arguments.keys,
            "samples": arguments.samples,
            "records": records,
        },
    )


if __name__ == "__main__":
    main()

"""Which space the index lives in, which reading, which start: stage 1 alone, judged on held-out prose.

    python experiments/index_space.py --data books.jsonl.gz --device cuda --output index_space.json

Prints, for each variant: KL before and after training, far tokens selected and attention mass kept
(mean over the second half of held-out windows, all retrieval heads), and what the same rule would
select from exact scores.
"""

from __future__ import annotations

import argparse
import random
import time
from dataclasses import replace

import torch

from rtpurbo.calibration.calibrate import calibrate
from rtpurbo.config import AttentionRule, IndexerSettings, RTPurboConfig
from rtpurbo.data.texts import load_texts
from rtpurbo.files import write_json_atomically
from rtpurbo.models.base import WHEEL_MODEL, load_base_model
from rtpurbo.models.sparsify import sparsify
from rtpurbo.settings import CalibrationSettings, IndexerTrainingSettings
from rtpurbo.training.capture import capture_heads
from rtpurbo.training.indexer_loss import selection_quality
from rtpurbo.training.stage1 import train_indexers

# name: (index space, shortest wavelength, reading, start, index_dim, trained at)
VARIANTS = {
    "pre residual": ("pre_rope", None, "residual", "covariance", 16, 8192),
    "post residual": ("post_rope", None, "residual", "covariance", 16, 8192),
    "low 8K residual": ("low_frequency", 8192.0, "residual", "covariance", 16, 8192),
    "low 16K residual": ("low_frequency", 16384.0, "residual", "covariance", 16, 8192),
    "pre paper": ("pre_rope", None, "paper", "covariance", 16, 8192),
    "low 8K paper": ("low_frequency", 8192.0, "paper", "covariance", 16, 8192),
    "low 8K residual, weight start": ("low_frequency", 8192.0, "residual", "weight", 16, 8192),
    "low 8K residual, random start": ("low_frequency", 8192.0, "residual", "random", 16, 8192),
    "pre residual, trained at 2K": ("pre_rope", None, "residual", "covariance", 16, 2048),
    "post residual, trained at 2K": ("post_rope", None, "residual", "covariance", 16, 2048),
    "low 8K residual, trained at 2K": ("low_frequency", 8192.0, "residual", "covariance", 16, 2048),
    "low 16K residual, trained at 2K": (
        "low_frequency",
        16384.0,
        "residual",
        "covariance",
        16,
        2048,
    ),
}
READ_AT = {"paper": (0.9, 0.95), "residual": (0.9, 0.95), "far": (0.8, 0.9)}


def main() -> None:
    """Runs every variant and writes one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=WHEEL_MODEL)
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--output", required=True)
    arguments = parser.parse_args()

    base = load_base_model(arguments.model, device=arguments.device)
    train, held_out = load_texts(arguments.data, "train"), load_texts(arguments.data, "heldout")
    found = calibrate(
        base.model, base.tokenizer, train, CalibrationSettings(length=4096, num_documents=6)
    )
    print(f"stability over documents: {found.stability}")
    windows = [
        held_out.sample_tokens(base.tokenizer, arguments.length, random.Random(f"probe-{number}"))
        for number in range(2)
    ]
    rows = torch.arange(arguments.length // 2, arguments.length, 16, device=arguments.device)
    results = []
    for name in arguments.variants:
        space, wavelength, reading, start, index_dim, trained_at = VARIANTS[name]
        rule = AttentionRule(sliding_window=512, reading=reading)
        config = RTPurboConfig(found.head_map, rule, IndexerSettings(index_dim, space, wavelength))
        sparsify(base.model, config)
        began = time.time()
        losses: list[float] = []
        train_indexers(
            base.model,
            base.tokenizer,
            train,
            held_out,
            IndexerTrainingSettings(
                steps=arguments.steps, lengths=(trained_at,), init=start, probe_every=10_000
            ),
            progress=lambda stage, done, total, figures, losses=losses: losses.append(
                figures["loss"]
            ),
        )
        seconds = time.time() - began
        captured = [seen for window in windows for seen in capture_heads(base.model, window)]
        for read in ("residual", "far") if reading == "residual" else ("paper",):
            for top_p in READ_AT[read]:
                asked = replace(rule, reading=read, top_p=top_p)
                parts = [selection_quality(seen, rows, asked) for seen in captured]
                means = {
                    field: float(torch.cat([getattr(part, field) for part in parts]).mean())
                    for field in ("divergence", "tokens", "oracle_tokens", "recall")
                }
                results.append(
                    {
                        "variant": name,
                        "reading": read,
                        "top_p": top_p,
                        "first_loss": sum(losses[:8]) / 8,
                        **means,
                    }
                )
                print(
                    f"{name:34s} {read:8s} p={top_p:.2f} loss {sum(losses[:8]) / 8:.3f} -> {means['divergence']:.3f} "
                    f"tokens {means['tokens']:7.1f} oracle {means['oracle_tokens']:6.1f} "
                    f"recall {means['recall']:.3f} ({seconds:.0f} s)",
                    flush=True,
                )
    write_json_atomically(arguments.output, {"length": arguments.length, "records": results})


if __name__ == "__main__":
    main()

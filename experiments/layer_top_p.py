"""Gives an artifact a top-p for each layer that reads as much as its one top-p and changes the answers less.

    python experiments/layer_top_p.py ARTIFACT -o OUT --data books.jsonl.gz

OUT is a copy of the artifact with `attention.layer_top_p`; OUT/layer_top_p.json holds the costs of every value in
every layer. See `rtpurbo.calibration.layer_top_p`.
"""

from __future__ import annotations

import argparse
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import torch

import rtpurbo
from rtpurbo.calibration.gate_sequences import GateSequences
from rtpurbo.calibration.layer_top_p import TOP_P, choose_top_p, mean_share_read, measure_costs
from rtpurbo.data.texts import load_texts
from rtpurbo.files import write_json_atomically
from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.models.sparsify import set_rule


def main() -> None:
    """Measures, chooses and writes the copy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--output", "-o", type=Path, required=True)
    parser.add_argument("--data", action="append")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sequences", type=int, default=24)
    parser.add_argument("--length", type=int, help="tokens of a sequence; as in the calibration")
    parser.add_argument("--window", type=int, help="another window than the artifact's")
    parser.add_argument("--values", type=float, nargs="+", default=list(TOP_P))
    parser.add_argument("--share-read", type=float, help="mean share of far keys read")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()

    stored = ArtifactConfig.read(arguments.artifact)
    rule, head_map = stored.config.attention, stored.config.head_map
    dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
    model, tokenizer = rtpurbo.load(str(arguments.artifact), device=arguments.device, dtype=dtype)
    if arguments.window:
        set_rule(model, sliding_window=arguments.window)
    length = arguments.length or stored.settings["calibration"]["length"]
    sequences = GateSequences(
        tokenizer, load_texts(arguments.data, "train"), (length,), arguments.seed
    )
    values = sorted({*arguments.values, rule.top_p})
    costs = measure_costs(
        model, sequences, arguments.sequences, values=values,
        progress=lambda stage, done, total, _: print(stage, done, total, flush=True),
    )  # fmt: skip
    weights = {layer: len(head_map.retrieval_heads[layer] or ()) for layer in costs}
    one = dict.fromkeys(costs, rule.top_p)
    share_read = arguments.share_read or mean_share_read(costs, weights, one)
    chosen = choose_top_p(costs, weights, share_read)
    for name, each in (("one", one), ("by layer", chosen)):
        divergence = sum(costs[layer][top_p].divergence for layer, top_p in each.items())
        share = mean_share_read(costs, weights, each)
        print(f"{name}: sum of divergences {divergence:.5f}, far keys read {share:.4f}")
    print(chosen)

    layer_top_p = tuple(
        None if heads is None else chosen.get(layer, rule.top_p)
        for layer, heads in enumerate(head_map.retrieval_heads)
    )
    shutil.copytree(arguments.artifact, arguments.output)
    changed = stored.config.with_rule(layer_top_p=layer_top_p)
    settings = {**stored.settings, "attention": asdict(changed.attention)}
    replace(stored, config=changed, settings=settings).write(arguments.output)
    write_json_atomically(
        arguments.output / "layer_top_p.json",
        {layer: {p: asdict(cost) for p, cost in each.items()} for layer, each in costs.items()},
    )


if __name__ == "__main__":
    main()

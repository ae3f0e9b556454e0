"""Gives an artifact a top-p for each layer, as conversions with `calibration.top_p_sequences` do.

    python experiments/layer_top_p.py ARTIFACT -o OUT --data books.jsonl.gz

OUT is a copy of the artifact with `attention.layer_top_p`. See `rtpurbo.calibration.layer_top_p`.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path

import torch

import rtpurbo
from rtpurbo.calibration.layer_top_p import find_layer_top_p
from rtpurbo.data.texts import load_texts
from rtpurbo.models.artifact_config import ArtifactConfig
from rtpurbo.settings import CalibrationSettings


def main() -> None:
    """Measures, chooses and writes the copy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--output", "-o", type=Path, required=True)
    parser.add_argument("--data", action="append")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sequences", type=int, default=12)
    parser.add_argument("--length", type=int, help="tokens of a sequence; as in the calibration")
    arguments = parser.parse_args()

    stored = ArtifactConfig.read(arguments.artifact)
    recorded = stored.settings.get("calibration", {})
    settings = CalibrationSettings(
        length=arguments.length or recorded["length"], top_p_sequences=arguments.sequences
    )
    dtype = torch.bfloat16 if arguments.device.startswith("cuda") else torch.float32
    model, tokenizer = rtpurbo.load(str(arguments.artifact), device=arguments.device, dtype=dtype)
    found = find_layer_top_p(
        model, tokenizer, load_texts(arguments.data, "train"), settings,
        seed=stored.settings.get("seed", 0),
        progress=lambda stage, done, total, _: print(stage, done, total, flush=True),
    )  # fmt: skip
    if found is None:
        sys.exit(
            "no costs: the artifact has no retrieval heads, or --length is too short for a question"
        )
    print(found.values)
    print(f"sum of divergences {found.divergence_of_one:.5f}, by layer {found.divergence:.5f}")

    shutil.copytree(arguments.artifact, arguments.output)
    replace(
        stored,
        config=stored.config.with_rule(layer_top_p=found.values),
        settings={
            **stored.settings,
            "calibration": {**recorded, "top_p_sequences": arguments.sequences},
        },
        figures={**stored.figures, "top_p": asdict(found)},
    ).write(arguments.output)


if __name__ == "__main__":
    main()

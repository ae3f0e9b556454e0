"""The model card: what the Hugging Face Hub shows of an artifact."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rtpurbo.evaluation.records import Record
from rtpurbo.files import write_text_atomically
from rtpurbo.models.artifact import CARD_FILE, CONFIG_FILE, LOG_FILE, ArtifactConfig
from rtpurbo.reporting.curves import curves_as_text
from rtpurbo.reporting.facts import artifact_facts
from rtpurbo.reporting.tables import markdown_rows, markdown_tables
from rtpurbo.training.log import TrainingLog

# By the beginning of the base model's name.
LICENSES = {
    "HuggingFaceTB/SmolLM": "apache-2.0",
    "Qwen/Qwen2.5-Coder-0.5B": "apache-2.0",
    "Qwen/Qwen2.5-Coder-1.5B": "apache-2.0",
    "google/gemma-3": "gemma",
}

_CARD = """---
{metadata}
---

# {title}, sparse

A sparse version of {base}, made by [RTPurbo](https://arxiv.org/abs/2605.16928). A few retrieval
heads find what matters anywhere in the context, with a small token indexer that tells them where
to look; all other heads see a window and the first tokens. The key-value cache is smaller by as
much. This repository holds the head map, the indexers and what training changed, not the base
model.

## How to use it

```bash
pip install rtpurbo
```

```python
import rtpurbo

model, tokenizer = rtpurbo.load("{name}"{base_argument})
```

`model` is a transformers model and `model.generate` works as ever.

## What it keeps

{figures}

## How it was made

{facts}

Every setting is in `{config_file}`.
{curves}"""

_CURVES = """
```text
{curves}
```

Every step is in `{log_file}`.
"""

_FIGURES = """{table}

Questions about hidden numbers in right answers, prose in perplexity. *Far tokens read* is the share
of the tokens beyond window and first tokens that retrieval heads read where they select.
"""


def model_card(
    artifact: ArtifactConfig,
    records: Sequence[Record] | None = None,
    name: str = "NAME-OF-THIS-REPOSITORY",
    curves: Iterable[dict[str, Any]] = (),
) -> str:
    """The README.md of an artifact, with the Hub's metadata at the top.

    Args:
        artifact: what the card is about.
        records: what was measured, if anything was.
        name: under which the artifact can be loaded.
        curves: entries of the training log.
    """
    drawn = curves_as_text(curves)
    base, local = artifact.base.public_name, artifact.base.is_local
    return _CARD.format(
        metadata=_metadata(None if local else base),
        title="A local model" if local else base.split("/")[-1],
        base="a local model" if local else f"[{base}](https://huggingface.co/{base})",
        name=name,
        base_argument=', base_model="PATH-OF-THE-BASE-MODEL"' if local else "",
        figures=_FIGURES.format(table=markdown_tables(records)).strip()
        if records
        else f"Not measured yet: run `rtpurbo eval {name}`.",
        facts=markdown_rows(("", ""), artifact_facts(artifact)),
        config_file=CONFIG_FILE,
        curves=_CURVES.format(curves=drawn, log_file=LOG_FILE) if drawn else "",
    )


def rewrite_card(folder: Path, records: Sequence[Record]) -> None:
    """Puts what was measured into the card of the artifact in `folder`."""
    curves = TrainingLog(folder / LOG_FILE).entries()
    card = model_card(ArtifactConfig.read(folder), records, curves=curves)
    write_text_atomically(folder / CARD_FILE, card)


def _metadata(base: str | None) -> str:
    """YAML, whose strings and lists may be written as JSON."""
    fields: dict[str, object] = {
        "library_name": "rtpurbo",
        "pipeline_tag": "text-generation",
        "tags": ["rtpurbo", "sparse-attention", "long-context"],
    }
    if base is not None:
        fields["base_model"] = base
        for beginning, license_name in LICENSES.items():
            if base.startswith(beginning):
                fields["license"] = license_name
    return "\n".join(f"{key}: {json.dumps(value)}" for key, value in fields.items())

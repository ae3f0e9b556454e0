"""Model card of an artifact: the README.md that the Hugging Face Hub shows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

from rtpurbo.config import AttentionRule
from rtpurbo.formats import percent
from rtpurbo.models.artifact_config import CONFIG_FILE, LOG_FILE, ArtifactConfig, Stage2Kind

# By the beginning of the base model's name.
LICENSES = {
    "HuggingFaceTB/SmolLM": "apache-2.0",
    "Qwen/Qwen2.5-Coder-0.5B": "apache-2.0",
    "Qwen/Qwen2.5-Coder-1.5B": "apache-2.0",
    "google/gemma-3": "gemma",
}

_STAGE2: dict[Stage2Kind, str] = {
    "none": "none: the weights of the base model",
    "lora": "LoRA, merged when the model is loaded",
    "full": "full weights",
    "merged": "merged into the weights of this export",
}

_CARD = """---
{metadata}
---

# {title}, sparse

A sparse version of {base}, made by [RTPurbo](https://arxiv.org/abs/2605.16928). A few retrieval
heads attend to tokens anywhere in the context, which a small token indexer selects. In answers, all
other heads attend to a sliding window and a limited number of earlier tokens, and their KV cache holds
no more than these. This repository holds the head map, the indexers and the weights that training
changed, not the base model.

## Usage

Install rtpurbo from a clone of its repository (`pip install .`).

```python
import rtpurbo

model, tokenizer = rtpurbo.load("{name}"{base_argument})
```

`model` is a transformers model with the usual `model.generate`.

## Evaluation

{results}

## Conversion

{facts}

Every setting is in `{config_file}`.
{curves}"""

_CURVES = """
```text
{curves}
```

Every step is in `{log_file}`.
"""

_RESULTS = """{table}

Questions are scored by the share of right answers, prose by perplexity. *Far tokens read* is the
share of the tokens beyond window and first tokens that retrieval heads read where they select.
"""


def model_card(
    artifact: ArtifactConfig,
    results: str | None = None,
    name: str = "NAME-OF-THIS-REPOSITORY",
    curves: str = "",
) -> str:
    """Returns the README.md of an artifact, with the Hub's metadata at the top.

    Results are Markdown tables of an evaluation, if there was one; the name loads the artifact; curves are text.
    """
    base, local = artifact.base.public_name, artifact.base.is_local
    return _CARD.format(
        metadata=_metadata(None if local else base),
        title="A local model" if local else base.split("/")[-1],
        base="a local model" if local else f"[{base}](https://huggingface.co/{base})",
        name=name,
        base_argument=', base_model="PATH-OF-THE-BASE-MODEL"' if local else "",
        results=_RESULTS.format(table=results).strip()
        if results
        else f"Not evaluated yet: run `rtpurbo eval {name}`.",
        facts=markdown_rows(("", ""), artifact_facts(artifact)),
        config_file=CONFIG_FILE,
        curves=_CURVES.format(curves=curves, log_file=LOG_FILE) if curves else "",
    )


def artifact_facts(artifact: ArtifactConfig) -> list[tuple[str, str]]:
    """Returns names and values that describe an artifact, for cards, reports and `inspect`."""
    head_map, rule = artifact.config.head_map, artifact.config.attention
    indexer = artifact.config.indexer
    heads = head_map.num_retrieval_heads
    key_value_heads = sum(map(head_map.num_kv_heads, head_map.converted_layers))
    facts = [
        ("Base model", base_name(artifact)),
        ("Architecture", artifact.base.architecture),
        (
            "Retrieval heads",
            f"{heads} of {head_map.num_heads} ({percent(heads / max(1, head_map.num_heads))})",
        ),
        ("Full KV heads", f"{head_map.num_full_key_value_heads} of {key_value_heads}"),
        *_divergence_of_heads(artifact),
        ("Local heads", local_heads(rule)),
        (
            "Retrieval heads select",
            f"top-p {_top_p(rule)} ({rule.reading}), at least {rule.min_tokens} tokens, "
            f"by {rule.granularity}; in the prompt: {rule.prefill_mode}",
        ),
        (
            "Token indexer",
            f"{indexer.index_dim} dimensions ({indexer.index_space}), one index key per "
            f"{'full KV head' if indexer.shared_keys else 'retrieval head'}",
        ),
        ("Stage 2", _STAGE2[artifact.stage2]),
    ]
    steps = {stage: artifact.settings.get(stage, {}).get("steps") for stage in ("stage1", "stage2")}
    if any(steps.values()):
        written = ", ".join(f"{stage} {count}" for stage, count in steps.items() if count)
        facts.append(("Training steps", written))
    if "seed" in artifact.settings:
        facts.append(("Seed", str(artifact.settings["seed"])))
    facts.append(("Converted with", f"rtpurbo {artifact.library_version}"))
    return facts


def _divergence_of_heads(artifact: ArtifactConfig) -> list[tuple[str, str]]:
    """Returns the divergence with which the number of heads was found, if it was."""
    divergences = artifact.figures.get("divergences")
    if not divergences:
        return []
    found = list(divergences.values())[-1]
    return [("Answers with these heads", f"diverge by {found:.2g} nats per token in calibration")]


def local_heads(rule: AttentionRule) -> str:
    """Returns the keys that local heads attend to, as the predicate of a sentence."""
    text = f"attend to the last {rule.sliding_window:,} keys and the first {rule.num_fixed_sinks:,}"
    if rule.num_heavy_hitters:
        text += f", and to {rule.num_heavy_hitters:,} that the prompt's last queries attend to most"
    if rule.dense_prompt_tokens:
        text += f"; prompts of up to {rule.dense_prompt_tokens:,} tokens are dense"
    if rule.dense_prompt_queries:
        text += f"; the last {rule.dense_prompt_queries:,} queries of a prompt attend to all keys"
    return text


def _top_p(rule: AttentionRule) -> str:
    values = [value for value in rule.layer_top_p or () if value is not None]
    return f"{min(values):g} to {max(values):g} by layer" if values else f"{rule.top_p:g}"


def base_name(artifact: ArtifactConfig) -> str:
    """Returns the base model's public name; the folder of a local model is private."""
    base = artifact.base
    if base.is_local:
        return f"a local model (weights {base.fingerprint[:12]})"
    return f"{base.name} ({base.revision})" if base.revision else base.name


def markdown_rows(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table: the first column aligned left, the others right."""
    ruler = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ruler, *rows))


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

"""An artifact in a few lines."""

from __future__ import annotations

from rtpurbo.formats import percent
from rtpurbo.models.artifact import ArtifactConfig
from rtpurbo.models.stage2_weights import Stage2Kind

_STAGE2: dict[Stage2Kind, str] = {
    "none": "none: the weights of the base model",
    "lora": "LoRA, merged when the model is loaded",
    "full": "full weights",
    "merged": "merged into the weights of this export",
}


def artifact_facts(artifact: ArtifactConfig) -> list[tuple[str, str]]:
    """Names and values, for model cards and `rtpurbo inspect`."""
    head_map, rule = artifact.config.head_map, artifact.config.attention
    indexer = artifact.config.indexer
    heads = head_map.num_retrieval_heads
    converted = sum(row is not None for row in head_map.retrieval_heads)
    key_value_heads = converted * head_map.num_key_value_heads
    facts = [
        ("Base model", base_name(artifact)),
        ("Architecture", artifact.base.architecture),
        (
            "Retrieval heads",
            f"{heads} of {head_map.num_heads} ({percent(heads / head_map.num_heads)})",
        ),
        ("KV heads kept whole", f"{head_map.num_full_key_value_heads} of {key_value_heads}"),
        (
            "Every head sees",
            f"the last {rule.sliding_window:,} keys and the first {rule.num_sink_tokens}",
        ),
        (
            "Retrieval heads select",
            f"top-p {rule.top_p:g} ({rule.reading}), at least {rule.min_tokens} tokens, "
            f"by {rule.granularity}; "
            f"in the prompt: {rule.prefill_mode}",
        ),
        (
            "Token indexer",
            f"{indexer.index_dim} dimensions ({indexer.index_space}), one key for each "
            f"{'KV head kept whole' if indexer.shared_keys else 'retrieval head'}",
        ),
        ("Stage 2", _STAGE2[artifact.stage2]),
    ]
    steps = {stage: artifact.settings.get(stage, {}).get("steps") for stage in ("stage1", "stage2")}
    if any(steps.values()):
        written = ", ".join(f"{stage} {count}" for stage, count in steps.items() if count)
        facts.append(("Training steps", written))
    if "seed" in artifact.settings:
        facts.append(("Seed", str(artifact.settings["seed"])))
    facts.append(("Made with", f"rtpurbo {artifact.library_version}"))
    return facts


def base_name(artifact: ArtifactConfig) -> str:
    """The base model as others can find it; where a folder lay is nobody else's concern."""
    base = artifact.base
    if base.is_local:
        return f"a local model (weights {base.fingerprint[:12]})"
    return f"{base.name} ({base.revision})" if base.revision else base.name

"""Writes a sparse model as a folder that needs neither its base model nor a LoRA."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rtpurbo.errors import RTPurboError
from rtpurbo.files import (
    check_output_folder,
    check_stays_inside,
    save_tensors_atomically,
    whole_folder,
    write_json_atomically,
)
from rtpurbo.models.architecture import layer_types
from rtpurbo.models.artifact import checkpoint_name, load, read_indexers
from rtpurbo.models.artifact_config import (
    CHECKPOINT_KEY,
    CONFIG_FILE,
    INDEXER_FILE,
    LOG_FILE,
    MODEL_CONFIG_FILE,
    ArtifactConfig,
    find_artifact,
    save_artifact,
)
from rtpurbo.models.pretrained import quiet_in_logs
from rtpurbo.models.saving import write_model_config
from rtpurbo.models.sparsify import restore
from rtpurbo.serving.rtp_llm import ENTRY, SEQUENCE_THRESHOLD, headwise_config
from rtpurbo.serving.vllm.checkpoint import PROMPT_LENGTHS_KEY, check_served
from rtpurbo.serving.vllm.plugin import ARCHITECTURES, PREFIX
from rtpurbo.validation import check_choice

Target = Literal["vllm", "rtp-llm", "transformers"]

VLLM_ARCHITECTURES = tuple(name.removeprefix(PREFIX) for name in ARCHITECTURES)
"""Dense architectures whose sparse versions run on vLLM."""

VLLM_WINDOWED_ARCHITECTURES = ("Gemma3ForCausalLM", "GptOssForCausalLM")
"""Those of them whose layers may have a sliding window in the dense model."""

HEADWISE_FILE = "headwise_config.json"

SHARD_INDEX_FILE = "model.safetensors.index.json"

_SHARD_SIZE = "5GB"
# Entries of an earlier export in a model's configuration.
_OWN_ENTRIES = (CHECKPOINT_KEY, PROMPT_LENGTHS_KEY, ENTRY)


def export(
    artifact: str | Path,
    destination: str | Path,
    target: Target,
    *,
    dtype: torch.dtype | None = None,
    base_model: str | None = None,
    head_map_only: bool = False,
    sequence_threshold: int = SEQUENCE_THRESHOLD,
    max_shard_size: str = _SHARD_SIZE,
    force: bool = False,
) -> Path:
    """Writes a standalone folder for an engine, whole or not at all.

    Stage 2 is merged into the weights. Tokenizer, chat template and generation settings are included. The rest
    depends on the target:

    - `vllm`: a checkpoint for rtpurbo's vLLM plugin. Its config.json names the architecture
      `RTPurbo...` and contains head map and rule under `rtpurbo`; the indexers are part of the
      weights, as `model.layers.N.self_attn.indexer.query_weight` and `key_weight`.
    - `rtp-llm`: a dense checkpoint whose config.json has RTP-LLM's `headwise_config`.
    - `transformers`: an artifact with weights of its own, as `save_pretrained` of a sparse model
      writes it. transformers loads it if rtpurbo is imported, and rejects it otherwise, as other
      engines do.

    `rtpurbo.load` and `AutoRTPurboModelForCausalLM` read the folders for `vllm` and `transformers`
    too. transformers' own `AutoModelForCausalLM` loads the one for `vllm` as a dense model.

    Args:
        artifact: an artifact's folder or its name on the Hub; an export can be exported again.
        destination: folder to create.
        target: engine that will load the folder.
        dtype: dtype of the weights; None keeps that of the stored base model. Indexers stay in float32.
        base_model: source of the base model, instead of the one that the artifact names.
        head_map_only: for `rtp-llm`, write `headwise_config.json` without weights, to be merged into
            the config.json of an existing model.
        sequence_threshold: for `rtp-llm`, number of tokens from which a prompt is sparse.
        max_shard_size: largest size of a file of weights.
        force: replace `destination` if it exists.

    Returns:
        `destination`.

    Raises:
        RTPurboError: the artifact or its base model cannot be loaded, the target cannot run it, or
            `destination` cannot be written.
    """
    check_choice("target", target, Target)
    destination = Path(destination)
    check_output_folder(destination, force)
    folder = find_artifact(artifact)
    config = ArtifactConfig.read(folder)
    if target == "vllm":
        _check_vllm(config)
    if head_map_only:
        if target != "rtp-llm":
            raise RTPurboError(
                "only an export for rtp-llm can be without weights: leave out --head-map-only."
            )
        headwise = {ENTRY: headwise_config(config.config, sequence_threshold)}
        with whole_folder(destination, force) as new:
            write_json_atomically(new / HEADWISE_FILE, headwise)
        return destination

    model, tokenizer = load(folder, base_model=base_model, dtype=dtype or "auto")
    indexers = read_indexers(folder)
    # With settings that depend on the model, such as wavelengths.
    base = config.base.without_path()
    merged = replace(config, base=base, config=model.rtpurbo_config, stage2="merged")
    restore(model)
    _refuse_quantised_weights(model)
    with whole_folder(destination, force) as new:
        _save_dense(model, tokenizer, new, max_shard_size)
        if target == "rtp-llm":
            headwise = {ENTRY: headwise_config(merged.config, sequence_threshold)}
            _change_config(new, headwise)
        else:
            _save_sparse(merged, indexers, model.config, new, target)
            if (folder / LOG_FILE).is_file():
                check_stays_inside(folder, folder / LOG_FILE)
                shutil.copyfile(folder / LOG_FILE, new / LOG_FILE)
        for file in new.iterdir():
            # safetensors writes files that only their owner can read, but a server may be another user.
            file.chmod(0o644)
    return destination


def _check_vllm(artifact: ArtifactConfig) -> None:
    """Rejects what rtpurbo's vLLM plugin cannot serve."""
    architecture = artifact.base.architecture
    states = _stateful_layers(architecture)
    if states:
        raise RTPurboError(
            f"{architecture} does not run on vLLM with rtpurbo, because the plan of the cache does not contain the "
            f"states of its {states} layers: serve it with transformers (--to transformers)."
        )
    if architecture not in VLLM_ARCHITECTURES:
        raise RTPurboError(
            f"{architecture} does not run on vLLM with rtpurbo, only "
            f"{', '.join(VLLM_ARCHITECTURES)} do: serve it with transformers "
            "(--to transformers)."
        )
    if (
        None in artifact.config.head_map.retrieval_heads
        and architecture not in VLLM_WINDOWED_ARCHITECTURES
    ):
        raise RTPurboError(
            "some layers of the model had a sliding window before conversion, which vLLM supports for "
            f"{', '.join(VLLM_WINDOWED_ARCHITECTURES)} and not for {architecture}: serve it with transformers "
            "(--to transformers)."
        )
    check_served(artifact.config, f"the artifact's {CONFIG_FILE}")


def _stateful_layers(architecture: str) -> str:
    """Types of the layers with recurrent states that an architecture has by default; empty if it has none."""
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if name == architecture:
            types = layer_types(CONFIG_MAPPING[model_type]().get_text_config())
            return ", ".join(sorted({"hybrid", "linear_attention"} & set(types)))
    return ""


def _refuse_quantised_weights(model: PreTrainedModel) -> None:
    if getattr(model.config, "quantization_config", None) is not None:
        raise RTPurboError(
            "the weights of the base model are quantised, so stage 2 cannot be merged into them: "
            "export with --base-model and the same model in 16 or 32 bits."
        )


def _save_dense(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    max_shard_size: str,
) -> None:
    """Writes weights, configuration, generation settings and tokenizer, one shard at a time."""
    for entry in _OWN_ENTRIES:
        if hasattr(model.config, entry):
            delattr(model.config, entry)
    with quiet_in_logs():
        model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)


def _save_sparse(
    artifact: ArtifactConfig,
    indexers: Mapping[str, Tensor],
    config: PretrainedConfig,
    folder: Path,
    target: Target,
) -> None:
    """Writes the configuration and indexers that make a dense checkpoint sparse."""
    if target == "transformers":
        save_artifact(folder, artifact, dict(indexers))
        write_model_config(folder, config)
        return
    named = {checkpoint_name(name): weight for name, weight in indexers.items()}
    save_tensors_atomically(folder / INDEXER_FILE, named)
    _index_shards(folder)
    changes = {
        "architectures": [PREFIX + artifact.base.architecture],
        PROMPT_LENGTHS_KEY: 1,
        CHECKPOINT_KEY: artifact.checkpoint_entry(),
    }
    _change_config(folder, changes)


def _index_shards(folder: Path) -> None:
    """Lists every tensor of the folder's safetensors files in the index that loaders look for."""
    places: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            places |= dict.fromkeys(file.keys(), path.name)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    write_json_atomically(folder / SHARD_INDEX_FILE, index)


def _change_config(folder: Path, changes: Mapping[str, Any]) -> None:
    path = folder / MODEL_CONFIG_FILE
    write_json_atomically(path, json.loads(path.read_text(encoding="utf-8")) | dict(changes))

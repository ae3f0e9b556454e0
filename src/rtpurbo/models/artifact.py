"""Artifacts: small folders that make a base model sparse."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo import strict_json
from rtpurbo.devices import resolve_device
from rtpurbo.errors import RTPurboError
from rtpurbo.models.artifact_config import (
    INDEXER_BEFORE_STAGE2_FILE,
    INDEXER_FILE,
    MODEL_CONFIG_FILE,
    ArtifactConfig,
    BaseReference,
    find_artifact,
)
from rtpurbo.models.base import BaseModel, load_base_model
from rtpurbo.models.model_config import MODEL_TYPE, RTPurboModelConfig
from rtpurbo.models.pretrained import (
    NO_OPTIONS,
    Dtype,
    LoadingOptions,
    load_pretrained_config,
    load_tokenizer,
    load_weights,
    refuse_offloading,
)
from rtpurbo.models.sparse_layers import load_indexers
from rtpurbo.models.sparsify import sparsify
from rtpurbo.models.stage2_weights import apply_stage2, read_tensors
from rtpurbo.processes import SINGLE_PROCESS, Processes

# Settings that do not change the logits of a prompt.
_WITHOUT_EFFECT = {
    "_name_or_path",
    "architectures",
    "attention_dropout",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "distributed_config",
    "dtype",
    "eos_token_id",
    "id2label",
    "initializer_range",
    "is_encoder_decoder",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "pretraining_tp",
    "problem_type",
    "quantization_config",
    "return_dict",
    "tokenizer_class",
    "transformers_version",
    "use_cache",
}


def checkpoint_name(name: str) -> str:
    """Returns the name of an indexer weight in a checkpoint for vLLM: `model.layers.3.self_attn.indexer...`."""
    return "model." + name.replace(".indexer.", ".self_attn.indexer.")


def read_indexers(folder: Path, *, before_stage2: bool = False) -> dict[str, Tensor]:
    """Reads the indexer weights of an artifact or an export, for `load_indexers`.

    Args:
        folder: the artifact's or the export's.
        before_stage2: those that stage 1 trained, where the artifact keeps them.

    Raises:
        RTPurboError: their file is missing, corrupt or truncated.
    """
    before = before_stage2 and (folder / INDEXER_BEFORE_STAGE2_FILE).is_file()
    weights = read_tensors(folder / (INDEXER_BEFORE_STAGE2_FILE if before else INDEXER_FILE))
    return {
        name.removeprefix("model.").replace(".self_attn.indexer.", ".indexer."): weight
        for name, weight in weights.items()
    }


def load(
    path_or_name: str | Path,
    *,
    base_model: str | None = None,
    stage2: bool = True,
    device: str | torch.device = "cpu",
    dtype: Dtype = torch.float32,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a sparse model: a transformers model whose `generate()` works, with its tokenizer.

    Args:
        path_or_name: an artifact's folder, or its name on the Hugging Face Hub; or the folder of
            an export, which needs no base model.
        base_model: where to take the base model from, if not from where the artifact says; its
            weights must be the same.
        stage2: False leaves the weights of stage 2 out and takes the indexers trained before it.
        device: where to put the model.
        dtype: of the weights; "auto" is the type that the base model is stored in.

    Returns:
        The model in eval mode and its tokenizer.

    Raises:
        RTPurboError: the artifact or its base model is missing, broken, newer, or they do not fit
            each other.
    """
    folder = find_artifact(path_or_name)
    options = LoadingOptions(dtype=dtype)
    model, tokenizer = load_model(
        folder, options, base_model=base_model, stage2=stage2, device=device
    )
    # An export has no other base than itself.
    return model, load_tokenizer(str(folder)) if tokenizer is None else tokenizer


def load_model(
    folder: Path,
    options: LoadingOptions,
    *,
    base_model: str | None = None,
    stage2: bool = True,
    device: str | torch.device = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Loads the model of an artifact or an export; arguments as of `load`.

    A device map in the options overrides `device`.

    Returns:
        The model, and the tokenizer of its base model; None for an export.
    """
    device = resolve_device(device)
    artifact = ArtifactConfig.read(folder)
    is_export = artifact.stage2 == "merged"
    if is_export and not stage2:
        raise RTPurboError(
            f"{folder} is an export: its weights hold stage 2 and cannot do without it; load the "
            "artifact that it was made from."
        )
    if not is_export and options.model.get("quantization_config") is not None:
        raise RTPurboError(
            f"{folder} is checked against the weights of its base model, and stage 2 is merged "
            "into them, which quantised weights do not allow: export it first (`rtpurbo export "
            "--to transformers`), and load the export with quantization_config."
        )
    indexers = read_indexers(folder, before_stage2=not stage2)
    tokenizer = None
    if is_export:
        config = load_pretrained_config(str(folder), sparse=True)
        model = load_weights(str(folder), config=config, dtype=options.dtype, **options.model)
        refuse_offloading(model)
        model = model if options.places_model else model.to(device)
    else:
        base = load_base(
            folder, base_model=base_model, device=device, dtype=options.dtype, options=options
        )
        model, tokenizer = base.model, base.tokenizer
        if stage2:
            model = apply_stage2(model, folder, artifact.stage2)
    sparsify(model, artifact.config)
    load_indexers(model, indexers)
    model._rtpurbo_artifact = artifact
    return model.eval().requires_grad_(False), tokenizer


def load_base(
    folder: Path,
    *,
    base_model: str | None = None,
    device: str | torch.device = "cpu",
    dtype: Dtype = torch.float32,
    processes: Processes = SINGLE_PROCESS,
    options: LoadingOptions = NO_OPTIONS,
) -> BaseModel:
    """Loads the dense model that the artifact in `folder` was made for; arguments as of `load_base_model`."""
    expected = ArtifactConfig.read(folder).base
    base = load_base_model(
        expected if base_model is None else base_model,
        device=device,
        dtype=dtype,
        processes=processes,
        options=options,
    )
    check_base(base.reference, expected, str(folder))
    check_base_config(base.model.config, folder)
    return base


def check_base(found: BaseReference, expected: BaseReference, artifact_name: str) -> None:
    """Refuses a base model whose weights are not those the artifact was made for."""
    if (found.architecture, found.fingerprint) != (expected.architecture, expected.fingerprint):
        raise RTPurboError(
            f"the artifact {artifact_name} belongs to another base model: it was made for "
            f"{expected.name} ({expected.architecture}), and the weights at hand "
            f"({found.architecture}) differ."
        )


def kept_config(folder: Path) -> PretrainedConfig | None:
    """Returns the configuration of the dense model in the config.json of an artifact or an export.

    Returns:
        None if there is none, as in artifacts made before it was kept.

    Raises:
        RTPurboError: it is broken.
    """
    path = folder / MODEL_CONFIG_FILE
    try:
        data = strict_json.read(path)
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RTPurboError(f"{path} is corrupt ({error}); convert or download it again.") from error
    if not isinstance(data, dict) or data.get("model_type") != MODEL_TYPE:
        return None
    base = data.get("base_config")
    return RTPurboModelConfig(base_config=base if isinstance(base, dict) else {}).dense()


def check_base_config(config: PretrainedConfig, folder: Path) -> None:
    """Refuses the configuration of a base model that computes otherwise than the one an artifact was made for.

    A fingerprint covers weights alone; with another rotary embedding, norm or activation the same
    weights are another model.

    Raises:
        RTPurboError: settings that change the logits differ.
    """
    kept = kept_config(folder)
    if kept is None:
        return
    then, now = kept.to_dict(), config.to_dict()
    different = [
        f"{name} ({_shown(then[name])}, now {_shown(now[name])})"
        for name in sorted(then.keys() & now.keys() - _WITHOUT_EFFECT)
        if not _same(then[name], now[name])
    ]
    if different:
        raise RTPurboError(
            f"the configuration of the base model has changed since {folder} was made: "
            f"{', '.join(different)}; use the configuration of then, or convert again."
        )


def _same(then: Any, now: Any) -> bool:
    """True if two settings are equal; numbers may have been rounded to float32 on their way (GGUF)."""
    if isinstance(then, dict) and isinstance(now, dict):
        return then.keys() == now.keys() and all(_same(then[name], now[name]) for name in then)
    if isinstance(then, float) and isinstance(now, float):
        return math.isclose(then, now, rel_tol=1e-6)
    return bool(then == now)


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:80]}..."

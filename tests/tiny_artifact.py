"""A tiny base model with a tokenizer, and an artifact made from it without any training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel

from rtpurbo.files import whole_folder
from rtpurbo.models.artifact_config import ArtifactConfig, Stage2Kind, save_artifact
from rtpurbo.models.base import load_base_model
from rtpurbo.models.saving import write_model_config
from rtpurbo.models.sparse_layers import indexer_weights
from rtpurbo.models.sparsify import restore
from rtpurbo.models.stage2_weights import ADAPTER_FOLDER, FULL_WEIGHTS_FILE
from tests.tiny_models import make_sparse, sparse_config, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

CONTEXT = 1024


def save_tiny_base(folder: Path, seed: int = 0, family: str = "llama", **changes: Any) -> Path:
    """A model of two or three layers that knows the tiny tokenizer's tokens."""
    changes = {"vocab_size": 512, "max_position_embeddings": CONTEXT} | changes
    tiny_model(family, seed, **changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def save_tiny_artifact(
    folder: Path,
    base: Path,
    heads: Sequence[int] = (0, 1),
    stage2: Stage2Kind = "none",
    *,
    shared_keys: bool = False,
) -> Path:
    """An artifact of `save_tiny_base`'s model: random indexers, and random changes as stage 2."""
    loaded = load_base_model(str(base))
    config = sparse_config(loaded.model, heads, shared_keys=shared_keys, sliding_window=32)
    model = make_sparse(loaded.model, config)
    config, before = model.rtpurbo_config, indexer_weights(model)
    after = {name: weight + 1 for name, weight in before.items()}
    restore(model)
    artifact = ArtifactConfig(loaded.reference, config, stage2, settings={"stage1": {"steps": 7}})
    with whole_folder(folder) as new:
        save_artifact(new, artifact, *((before,) if stage2 == "none" else (after, before)))
        write_model_config(new, loaded.model.config)
        loaded.tokenizer.save_pretrained(new)
        if stage2 != "none":
            save_stage2(model, new, stage2)
    return folder


def save_stage2(model: PreTrainedModel, folder: Path, kind: Stage2Kind) -> None:
    """Random changes of the query projections, as a LoRA or as full weights."""
    torch.manual_seed(3)
    if kind == "full":
        from safetensors.torch import save_file

        for name, parameter in model.named_parameters():
            if "q_proj" in name:
                parameter.data += 0.1 * torch.randn_like(parameter)
        save_file(model.state_dict(), folder / FULL_WEIGHTS_FILE)
        return
    lora = LoraConfig(
        r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    get_peft_model(model, lora).save_pretrained(str(folder / ADAPTER_FOLDER))

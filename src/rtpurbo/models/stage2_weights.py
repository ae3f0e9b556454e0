"""The weights of stage 2 in an artifact: a LoRA adapter or whole weights, merged into a base model."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from rtpurbo import strict_json
from rtpurbo.errors import RTPurboError
from rtpurbo.models.artifact_config import Stage2Kind
from rtpurbo.models.sharding import is_sharded, like

ADAPTER_FOLDER = "adapter"
ADAPTER_CONFIG_FILE = "adapter_config.json"
FULL_WEIGHTS_FILE = "stage2_weights.safetensors"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Reads the tensors of a safetensors file.

    Raises:
        RTPurboError: it is missing, corrupt or truncated.
    """
    if not path.is_file():
        raise RTPurboError(f"the artifact is not complete: {path} is missing.")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise RTPurboError(
            f"{path} is corrupt or truncated ({error}); convert or download it again."
        ) from error


# What a plain LoRA of linear layers may say; any other setting must be off, or at PEFT's default.
_PLAIN_SETTINGS = {
    "peft_type",
    "peft_version",
    "task_type",
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "init_lora_weights",
    "inference_mode",
    "base_model_name_or_path",
    "revision",
}


def check_adapter(path: Path) -> None:
    """Refuses the configuration of an adapter, adapter_config.json, that is more than a plain LoRA.

    Some settings of PEFT import a module that the file names, or build layers from it.

    Raises:
        RTPurboError: it is missing or corrupt, or holds a setting that stage 2 never writes.
    """
    try:
        settings = strict_json.read(path)
        kind = settings.get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise RTPurboError(
            f"{path} is missing or corrupt ({error}); convert or download the artifact again."
        ) from error
    if kind != "LORA":
        raise RTPurboError(f"{path} is of the kind {kind!r}, but stage 2 leaves a LORA adapter.")
    for name in ("r", "lora_alpha"):
        value = settings.get(name)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise RTPurboError(f"{path} sets {name} to {value!r}, but it must be a number above 0.")
    defaults = {field.name: field.default for field in fields(LoraConfig)}
    for name, value in settings.items():
        if name not in _PLAIN_SETTINGS and value and value != defaults.get(name, MISSING):
            raise RTPurboError(
                f"{path} sets '{name}', which is not part of a plain LoRA; if you trust the adapter, "
                "merge it into the base model with PEFT, and convert that."
            )


@contextmanager
def without_deprecations_of_peft() -> Iterator[None]:
    """Context in which PEFT wraps a model without warning users of a name that transformers deprecates."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def apply_stage2(model: PreTrainedModel, folder: Path, kind: Stage2Kind) -> PreTrainedModel:
    """Merges the weights of stage 2, if any, into a base model.

    Each process may hold a part of the model; all of them call this together.
    """
    if kind == "none":
        return model
    if kind == "full":
        weights = read_tensors(folder / FULL_WEIGHTS_FILE)
        if is_sharded(model):
            shapes = dict(model.named_parameters())
            weights = {
                name: like(weight, shapes[name]) if name in shapes else weight
                for name, weight in weights.items()
            }
        missing, unexpected = model.load_state_dict(weights, strict=False)
        # Indexers have a file of their own, and tied weights are stored once.
        missing = [name for name in missing if ".indexer." not in name]
        if unexpected or (missing and not model.config.tie_word_embeddings):
            raise RTPurboError(
                f"{folder / FULL_WEIGHTS_FILE} does not fit the base model; convert again."
            )
        return model
    check_adapter(folder / ADAPTER_FOLDER / ADAPTER_CONFIG_FILE)
    # Read first, so that a broken file is named as such.
    read_tensors(folder / ADAPTER_FOLDER / "adapter_model.safetensors")
    try:
        with without_deprecations_of_peft():
            student = PeftModel.from_pretrained(model, str(folder / ADAPTER_FOLDER))
        return _merge_sharded(student) if is_sharded(model) else student.merge_and_unload()
    except (ValueError, RuntimeError, OSError, KeyError, TypeError) as error:
        raise RTPurboError(
            f"the adapter in {folder / ADAPTER_FOLDER} cannot be applied: {error}"
        ) from error


@torch.no_grad()
def _merge_sharded(student: PeftModel) -> PreTrainedModel:
    """Adds each process's part of the LoRA's product to its part of the weights."""
    for module in student.modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            weight.add_(like(module.get_delta_weight("default").to(weight.dtype), weight))
    return student.unload()

"""Trained weights of stage 2, a LoRA or the full weights: setup, removal and files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.helpers import disable_input_dtype_casting
from transformers import PreTrainedModel

from rtpurbo.errors import RTPurboError
from rtpurbo.files import save_tensors_atomically, whole_folder, write_json_atomically
from rtpurbo.models.decoder import decoder_layers, projections
from rtpurbo.models.sharding import own_part, require_gradients, whole
from rtpurbo.models.stage2_weights import (
    ADAPTER_FOLDER,
    FULL_WEIGHTS_FILE,
    without_deprecations_of_peft,
)
from rtpurbo.processes import SINGLE_PROCESS, Processes
from rtpurbo.settings import DistillationSettings


def check_trainable(dtype: torch.dtype, settings: DistillationSettings) -> None:
    """Refuses to train full weights in a dtype in which most updates would be rounded away.

    Args:
        dtype: dtype of the base model.
        settings: settings of stage 2.

    Raises:
        RTPurboError: the full weights are to be trained in fewer than 32 bits.
    """
    if settings.steps and not settings.lora_rank and dtype.itemsize < 4:
        raise RTPurboError(
            f"stage 2 trains all weights (lora_rank 0), which needs float32, but the model is "
            f"{str(dtype).removeprefix('torch.')}: pass --dtype float32, or train a LoRA."
        )


def set_gradient_checkpointing(model: PreTrainedModel, enabled: bool) -> None:
    """Turns gradient checkpointing on or off: of each layer only the input is saved for the backward pass."""
    # transformers 5.24 deprecates the names with `gradient`, which earlier versions have alone.
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if enabled:
        options = {f"{word}_checkpointing_kwargs": {"use_reentrant": False}}
        getattr(model, f"{word}_checkpointing_enable")(**options)
    else:
        getattr(model, f"{word}_checkpointing_disable")()


@contextmanager
def trainable(
    model: PreTrainedModel, settings: DistillationSettings, seed: int
) -> Iterator[PreTrainedModel | PeftModel]:
    """Context in which a sparse model is ready for training; on exit its base weights and modules are restored.

    Weights of a LoRA are float32 for every dtype of the model.
    """
    on_gpu = model.device.type == "cuda"
    checkpointing = settings.gradient_checkpointing and on_gpu
    if checkpointing:
        set_gradient_checkpointing(model, True)
    student: PreTrainedModel | PeftModel = model
    before: dict[str, torch.Tensor] = {}
    if settings.lora_rank:
        names = {
            name
            for layer in decoder_layers(model)
            for name, _ in projections(layer, beyond_attention=settings.lora_beyond_attention)
        }
        with torch.random.fork_rng(), without_deprecations_of_peft():
            torch.manual_seed(seed)
            student = get_peft_model(
                model,
                LoraConfig(
                    r=settings.lora_rank,
                    lora_alpha=2 * settings.lora_rank,
                    target_modules=sorted(names),
                    task_type="CAUSAL_LM",
                ),
            )
    else:
        require_gradients(model)
        before = {
            name: own_part(weight.detach()).cpu().clone()
            for name, weight in trained_weights(model).items()
        }
    model.train()
    try:
        # Under autocast, casting a LoRA's input to float32 has no effect but costs gigabytes for long sequences.
        with disable_input_dtype_casting(model, active=on_gpu):
            yield student
    finally:
        model.eval()
        if checkpointing:
            set_gradient_checkpointing(model, False)
        if isinstance(student, PeftModel):
            student.unload()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name in before:
                    own_part(weight).copy_(before[name])
        model.requires_grad_(False)


def trained_weights(student: PreTrainedModel | PeftModel) -> dict[str, torch.Tensor]:
    """Returns the trained weights by name, in the order in which checkpoints store them."""
    return {name: weight for name, weight in student.named_parameters() if weight.requires_grad}


def save_student(
    student: PreTrainedModel | PeftModel,
    folder: Path,
    processes: Processes = SINGLE_PROCESS,
    lora_scale: float = 1.0,
) -> None:
    """Writes the weights of stage 2: a LoRA in bf16 (the rounding error is negligible), full weights in their dtype.

    Args:
        student: inside `trainable`.
        folder: existing folder.
        processes: processes that trained; all call this together, and the main one writes.
        lora_scale: factor at which the LoRA is applied.

    Raises:
        RTPurboError: the disk is full.
    """
    if not isinstance(student, PeftModel):
        # Gathered on all processes, kept on the one that writes.
        weights = {}
        for name, weight in student.named_parameters():
            if ".indexer." not in name:
                gathered = whole(weight.detach())
                if processes.is_main:
                    weights[name] = gathered.cpu()
        if processes.is_main:
            save_tensors_atomically(folder / FULL_WEIGHTS_FILE, weights)
        return
    adapter = {name: whole(weight) for name, weight in get_peft_model_state_dict(student).items()}
    if not processes.is_main:
        return
    with whole_folder(folder / ADAPTER_FOLDER, overwrite=True) as temporary:
        student.peft_config["default"].save_pretrained(str(temporary))
        # The artifact's own configuration names the base model; a local path must not be published.
        # PEFT keeps module names in a set, whose order varies between runs.
        described = json.loads((temporary / "adapter_config.json").read_text(encoding="utf-8"))
        described["base_model_name_or_path"] = None
        described["inference_mode"] = True
        # Scales the configuration and not the weights, so that the trained LoRA can be recovered.
        if lora_scale != 1:
            described["lora_alpha"] *= lora_scale
        described["target_modules"] = sorted(described["target_modules"])
        write_json_atomically(temporary / "adapter_config.json", described)
        save_tensors_atomically(
            temporary / "adapter_model.safetensors",
            {name: weight.bfloat16() for name, weight in adapter.items()},
        )

"""Comparison of the dense configuration that an artifact keeps with that of the base model.

A fingerprint covers weights alone; with another rotary embedding, norm or activation the same weights
are another model.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from rtpurbo import strict_json
from rtpurbo.errors import RTPurboError
from rtpurbo.models.artifact_config import MODEL_CONFIG_FILE
from rtpurbo.models.model_config import MODEL_TYPE, RTPurboModelConfig

# What changes nothing in the logits of a prompt.
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
    """Refuses a base model that computes otherwise than the one an artifact was made for.

    Args:
        config: of the base model at hand.
        folder: the artifact's.

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

"""Entry point of the vLLM plugin, called at start-up in every process and for every model.

It only registers names: modules are imported when a sparse model is loaded, and errors must not keep other models
from being served.
"""

from __future__ import annotations

import logging
from typing import Any

MODELS = "rtpurbo.serving.vllm.models"

PREFIX = "RTPurbo"
"""Prefix of the dense architecture's name: `RTPurboLlamaForCausalLM`."""

ARCHITECTURES = (
    "RTPurboGemma3ForCausalLM",
    "RTPurboGptOssForCausalLM",
    "RTPurboLlamaForCausalLM",
    "RTPurboMistralForCausalLM",
    "RTPurboQwen2ForCausalLM",
    "RTPurboQwen3ForCausalLM",
    "RTPurboQwen3MoeForCausalLM",
)
"""Architectures in the config.json of exported checkpoints; `MODELS` has a class of each name."""

logger = logging.getLogger(__name__)


def config_check(dense: Any) -> type:
    """Class with the checks of vLLM's settings before a sparse model is loaded.

    Args:
        dense: vLLM's class of the same kind for the dense architecture, whose changes apply too; None if it has none.
    """

    class ConfigCheck:
        @staticmethod
        def verify_and_update_model_config(model_config: object) -> None:
            """Applies the changes of the dense architecture; the settings are checked as a whole."""
            if dense is not None:
                dense.verify_and_update_model_config(model_config)

        @staticmethod
        def verify_and_update_config(vllm_config: object) -> None:
            """Rejects settings that sparse models do not support.

            Raises:
                RTPurboError: a setting is not supported.
            """
            from rtpurbo.serving.vllm.refusals import check

            if dense is not None:
                dense.verify_and_update_config(vllm_config)
            check(vllm_config)

    return ConfigCheck


def register() -> None:
    """Registers sparse models with vLLM; entry point of the group `vllm.general_plugins`."""
    try:
        from vllm.model_executor.models import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        for name in ARCHITECTURES:
            # A process may load its plugins twice.
            if name not in MODELS_CONFIG_MAP:
                ModelRegistry.register_model(name, f"{MODELS}:{name}")
                dense = MODELS_CONFIG_MAP.get(name.removeprefix(PREFIX))
                MODELS_CONFIG_MAP[name] = config_check(dense)
    except Exception:
        logger.exception("rtpurbo cannot register its sparse models with this version of vLLM.")

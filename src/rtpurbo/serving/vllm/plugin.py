"""What vLLM calls when it starts, in every process, whichever model it serves.

So nothing is done here but to tell names. The modules behind them are imported when a sparse model is
asked for, and nothing that goes wrong here may keep another model from being served.
"""

from __future__ import annotations

import logging

MODELS = "rtpurbo.serving.vllm.models"

ARCHITECTURES = (
    "RTPurboLlamaForCausalLM",
    "RTPurboMistralForCausalLM",
    "RTPurboQwen2ForCausalLM",
    "RTPurboQwen3ForCausalLM",
    "RTPurboQwen3MoeForCausalLM",
)
"""What exported checkpoints call their architecture; `MODELS` has a class of each name."""

logger = logging.getLogger(__name__)


class ConfigCheck:
    """What vLLM asks about its settings before it loads anything of a sparse model."""

    @staticmethod
    def verify_and_update_model_config(model_config: object) -> None:
        """Nothing to say about the model alone."""

    @staticmethod
    def verify_and_update_config(vllm_config: object) -> None:
        """Refuses settings that sparse models cannot be served with.

        Raises:
            RTPurboError: there is one.
        """
        from rtpurbo.serving.vllm.refusals import check

        check(vllm_config)


def register() -> None:
    """Makes sparse models known to vLLM; entry point of the group `vllm.general_plugins`."""
    try:
        from vllm.model_executor.models import ModelRegistry
        from vllm.model_executor.models.config import MODELS_CONFIG_MAP

        for name in ARCHITECTURES:
            # A process may load its plugins twice.
            if name not in MODELS_CONFIG_MAP:
                ModelRegistry.register_model(name, f"{MODELS}:{name}")
                MODELS_CONFIG_MAP[name] = ConfigCheck
    except Exception:
        logger.exception("rtpurbo cannot make its sparse models known to this version of vLLM.")

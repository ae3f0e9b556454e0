"""Prompt lengths of the requests of a step, on the CPU.

The metadata needs them there: which queries select decides the shapes of launches. vLLM's first model runner passes
them on the CPU. The second one passes a tensor on the GPU, and reading it would wait for the previous step.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch


@cache
def model_state_class() -> type:
    """Model state of vLLM's second model runner, which calls it once per request and once per step."""
    # Imported here, because the modules of the runner need Triton.
    from vllm.v1.worker.gpu.model_states.default import DefaultModelState

    class PromptLengths(DefaultModelState):
        """Model state that replaces the prompt lengths in a step's batch."""

        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self._prompt_lengths = np.zeros(self.max_num_reqs, dtype=np.int32)

        def add_request(self, req_index: int, new_req_data: Any) -> None:
            """Keeps the prompt length of a new or resumed request."""
            super().add_request(req_index, new_req_data)
            self._prompt_lengths[req_index] = new_req_data.prompt_len

        def prepare_attn(self, input_batch: Any, *arguments: Any, **options: Any) -> dict[str, Any]:
            """Builds the metadata of a step."""
            if input_batch.prompt_lens is not None:
                lengths = self._prompt_lengths[input_batch.idx_mapping_np]
                input_batch = replace(input_batch, prompt_lens=torch.from_numpy(lengths))
            metadata: dict[str, Any] = super().prepare_attn(input_batch, *arguments, **options)
            return metadata

    return PromptLengths

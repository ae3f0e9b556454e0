"""Windows only, as StreamingLLM (arXiv 2309.17453): a control without retrieval heads."""

from __future__ import annotations

from dataclasses import replace

from rtpurbo.evaluation.policies.policy import Policy
from rtpurbo.evaluation.policies.source import Loaded, Source
from rtpurbo.models.sparsify import empty_head_map, sparsify


class LocalOnly(Policy):
    """Every head reads sinks and window; weights as rtpurbo's."""

    def prepare(self, source: Source) -> Loaded:
        """Makes the model."""
        model, tokenizer = source.sparse()
        sparsify(model, replace(model.rtpurbo_config, head_map=empty_head_map(model)))
        return model, tokenizer


POLICY = LocalOnly(
    "local-only",
    "control: no retrieval head, sinks and window alone (StreamingLLM)",
    place=30,
)

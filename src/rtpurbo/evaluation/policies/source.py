"""Where the models of all policies come from: one artifact."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.config import RTPurboConfig
from rtpurbo.models.artifact import load, load_base
from rtpurbo.models.artifact_config import ArtifactConfig

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerBase]


@dataclass(frozen=True)
class Source:
    """An artifact, and how to load models from it.

    Attributes:
        folder: the artifact's.
        device: where to put models.
        dtype: of their weights.
        base_model: where to take the base model from, if not from where the artifact says.
        seed: of what a policy draws.
    """

    folder: Path
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    base_model: str | None = None
    seed: int = 0

    @property
    def config(self) -> RTPurboConfig:
        """The artifact's head map, rule and indexer settings."""
        return ArtifactConfig.read(self.folder).config

    def dense(self) -> Loaded:
        """The base model."""
        base = load_base(
            self.folder, base_model=self.base_model, device=self.device, dtype=self.dtype
        )
        return base.model, base.tokenizer

    def sparse(self, *, stage2: bool = True) -> Loaded:
        """The sparse model, with the weights of stage 2 or those before it."""
        return load(
            self.folder,
            base_model=self.base_model,
            stage2=stage2,
            device=self.device,
            dtype=self.dtype,
        )

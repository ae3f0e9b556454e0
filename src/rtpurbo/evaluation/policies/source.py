"""Artifact from which the models of all policies are loaded."""

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
    """Artifact with options for loading.

    Attributes:
        folder: folder of the artifact.
        device: device of the models.
        dtype: dtype of the weights.
        base_model: replaces the base model that the artifact names.
        seed: seed of random policies.
    """

    folder: Path
    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32
    base_model: str | None = None
    seed: int = 0

    @property
    def config(self) -> RTPurboConfig:
        """Head map, attention rule and indexer settings of the artifact."""
        return ArtifactConfig.read(self.folder).config

    def dense(self) -> Loaded:
        """Returns the base model."""
        base = load_base(
            self.folder, base_model=self.base_model, device=self.device, dtype=self.dtype
        )
        return base.model, base.tokenizer

    def sparse(self, *, stage2: bool = True) -> Loaded:
        """Returns the sparse model, with or without the weights of stage 2."""
        return load(
            self.folder,
            base_model=self.base_model,
            stage2=stage2,
            device=self.device,
            dtype=self.dtype,
        )

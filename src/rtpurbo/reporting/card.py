"""Evaluation results in the model card of an artifact."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rtpurbo.evaluation.records import Record
from rtpurbo.files import write_text_atomically
from rtpurbo.models.artifact_config import CARD_FILE, LOG_FILE, ArtifactConfig
from rtpurbo.reporting.model_card import model_card
from rtpurbo.reporting.tables import markdown_tables
from rtpurbo.training.curves import curves_as_text
from rtpurbo.training.log import TrainingLog


def rewrite_card(folder: Path, records: Sequence[Record]) -> None:
    """Writes the card of the artifact in `folder` again, with results."""
    curves = curves_as_text(TrainingLog(folder / LOG_FILE).entries())
    card = model_card(ArtifactConfig.read(folder), markdown_tables(records), curves=curves)
    write_text_atomically(folder / CARD_FILE, card)

"""Assembly of an artifact from the files of a job's work folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rtpurbo.files import whole_folder
from rtpurbo.models.artifact_config import (
    CARD_FILE,
    LOG_FILE,
    ArtifactConfig,
    Stage2Kind,
    save_artifact,
)
from rtpurbo.models.base import BaseModel
from rtpurbo.models.saving import write_model_config
from rtpurbo.models.sparse_layers import indexer_weights
from rtpurbo.models.stage2_weights import ADAPTER_FOLDER, FULL_WEIGHTS_FILE, read_tensors
from rtpurbo.reporting.model_card import model_card
from rtpurbo.settings import ConversionSettings
from rtpurbo.training.curves import curves_as_text
from rtpurbo.training.log import TrainingLog

HEAD_MAP_FILE = "head_map.json"
TOP_P_FILE = "top_p.json"


def indexers_file(work: Path, stage: str) -> Path:
    """Returns the path of the indexers that a stage trained."""
    return work / f"indexer_{stage}.safetensors"


def figures_file(work: Path, stage: str) -> Path:
    """Returns the path of the figures that a stage measured."""
    return work / f"{stage}_figures.json"


def stage2_kind(work: Path) -> Stage2Kind:
    """Returns the kind of weights that stage 2 left in a work folder."""
    if (work / "stage2" / ADAPTER_FOLDER).is_dir():
        return "lora"
    return "full" if (work / "stage2" / FULL_WEIGHTS_FILE).is_file() else "none"


def assemble(
    work: Path,
    output_dir: Path,
    base: BaseModel,
    settings: ConversionSettings,
    data: Sequence[str] | None,
    may_replace: bool,
) -> Path:
    """Writes the artifact, whole or not at all, and removes the work folder.

    Args:
        work: work folder, with head map, indexers, stage 2, figures and log if there are any.
        output_dir: folder of the artifact.
        base: sparse model with its final indexers.
        settings: settings of the job.
        data: sources of the training texts.
        may_replace: replace an existing folder.
    """
    kind = stage2_kind(work)
    is_refreshed = indexers_file(work, "refresh").is_file()
    before = read_tensors(indexers_file(work, "stage1")) if is_refreshed else None
    artifact = ArtifactConfig(
        base.reference,
        base.model.rtpurbo_config,
        kind,
        {**settings.to_dict(), "data": _names(data)},
        _figures(work),
    )
    with whole_folder(output_dir, may_replace) as folder:
        save_artifact(folder, artifact, indexer_weights(base.model), before)
        write_model_config(folder, base.model.config)
        base.tokenizer.save_pretrained(folder)
        if kind == "lora":
            shutil.copytree(work / "stage2" / ADAPTER_FOLDER, folder / ADAPTER_FOLDER)
        elif kind == "full":
            shutil.copyfile(work / "stage2" / FULL_WEIGHTS_FILE, folder / FULL_WEIGHTS_FILE)
        if (work / LOG_FILE).is_file():
            shutil.copyfile(work / LOG_FILE, folder / LOG_FILE)
        curves = curves_as_text(TrainingLog(folder / LOG_FILE).entries())
        card = model_card(artifact, curves=curves)
        (folder / CARD_FILE).write_text(card, encoding="utf-8")
    shutil.rmtree(work, ignore_errors=True)
    return output_dir


def _names(data: Sequence[str] | None) -> list[str] | str:
    """Returns the names of the training data, without the folders of files."""
    if data is None:
        return "built-in"
    return [source if source.startswith("hf:") else Path(source).name for source in data]


def _figures(work: Path) -> dict[str, Any]:
    """Returns the figures of calibration and of all stages."""
    figures: dict[str, Any] = {}
    head_map = work / HEAD_MAP_FILE
    if head_map.is_file():
        found = json.loads(head_map.read_text(encoding="utf-8"))
        figures["stability"] = found["stability"]
        if found.get("divergences"):
            figures["divergences"] = found["divergences"]
    if (work / TOP_P_FILE).is_file():
        figures["top_p"] = json.loads((work / TOP_P_FILE).read_text(encoding="utf-8"))
    for stage in ("stage1", "stage2", "refresh"):
        path = figures_file(work, stage)
        if path.is_file():
            figures[stage] = json.loads(path.read_text(encoding="utf-8"))
    return figures

"""Plan of a job in its work folder, with which a resumed run is compared."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rtpurbo import strict_json
from rtpurbo.errors import RTPurboError
from rtpurbo.files import write_json_atomically
from rtpurbo.models.base import BaseModel
from rtpurbo.processes import Processes
from rtpurbo.renamed_settings import current_settings
from rtpurbo.settings import ConversionSettings
from rtpurbo.training.source import check_shares
from rtpurbo.version import __version__

PLAN_FILE = "plan.json"


def write_or_check_plan(
    work: Path,
    base: BaseModel,
    settings: ConversionSettings,
    command: str,
    data: Sequence[str] | None,
    processes: Processes,
    resume: bool,
) -> ConversionSettings:
    """Writes the plan of a job into a new work folder, or compares it with that of the job to resume.

    Args:
        work: the work folder.
        base: the dense model.
        settings: of the conversion.
        command: its name.
        data: sources of the training texts.
        processes: of this run.
        resume: continue the job in the work folder, if there is one.

    Returns:
        The settings with `sequences_per_step` set.

    Raises:
        RTPurboError: the job to resume was another or its plan is corrupt, or the processes cannot share
            a step.
    """
    path = work / PLAN_FILE
    resumed = _read_plan(path) if resume and path.is_file() else None
    for stage in ("stage1", "stage2"):
        # A resumed job takes as many sequences a step as before, with any number of processes.
        recorded = resumed and resumed["settings"][stage]["sequences_per_step"]
        resolved = getattr(settings, stage).resolved(recorded or processes.count)
        check_shares(resolved.per_step, processes)
        settings = replace(settings, **{stage: resolved})
    plan = json.loads(
        json.dumps(
            {
                "command": command,
                "library_version": __version__,
                "base_model": vars(base.reference),
                "dtype": str(base.model.dtype).removeprefix("torch."),
                "data": data,
                "settings": settings.to_dict(),
            }
        )
    )
    if resumed is None:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        write_json_atomically(path, plan)
    elif resumed != plan:
        raise RTPurboError(
            f"the interrupted conversion in {work} had another model, data or settings: "
            "repeat its command, or pass --force to start anew."
        )
    return settings


def _read_plan(path: Path) -> dict[str, Any]:
    """Reads the plan of an interrupted job.

    Raises:
        RTPurboError: the file is broken.
    """
    try:
        plan: dict[str, Any] = strict_json.read(path)
        for stage in ("stage1", "stage2"):
            _ = plan["settings"][stage]["sequences_per_step"]
        plan["settings"] = current_settings(plan["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise RTPurboError(
            f"{path} is broken, so the conversion cannot be continued: pass --force to start anew."
        ) from error
    return plan

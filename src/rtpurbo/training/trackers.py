"""Experiment trackers (TensorBoard, Weights & Biases, Trackio, ...) through accelerate."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from sys import stderr
from typing import Any

from rtpurbo.errors import RTPurboError, first_line

PROJECT = "rtpurbo"

logger = logging.getLogger(__name__)


class Trackers:
    """Trackers that receive the figures of every step as `stage/figure`.

    Args:
        names: accelerate's names of the trackers; may be empty.
        folder: folder of trackers that write files.
        run: name of the run.
        configuration: configuration of the run; nested values get dotted names.

    Raises:
        RTPurboError: there is no such tracker, its package is missing, or it cannot start.
    """

    def __init__(
        self,
        names: Sequence[str] = (),
        folder: Path | None = None,
        run: str = "",
        configuration: dict[str, Any] | None = None,
    ) -> None:
        self._trackers: list[Any] = []
        self._offsets: dict[str, int] = {}
        self._last = 0
        if not names:
            return
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS
        from transformers.utils import flatten_dict

        # In types that every tracker supports.
        flat = {
            name: value if value is None or isinstance(value, (int, float, str)) else str(value)
            for name, value in flatten_dict(configuration or {}).items()
        }
        for name in check_trackers(names):
            kind = LOGGER_TYPE_TO_CLASS[name]
            options = {"logging_dir": str(folder)} if kind.requires_logging_directory else {}
            try:
                # Output of trackers must not mix with the command's own.
                with redirect_stdout(stderr):
                    tracker = kind(run or PROJECT, **options)
                    tracker.start()
                    tracker.store_init_configuration(flat)
            except Exception as error:  # trackers raise errors of many types
                raise RTPurboError(
                    f"the tracker '{name}' does not start ({first_line(error)}): set it up, or leave "
                    f"--report-to {name} out."
                ) from error
            self._trackers.append(tracker)

    def log(self, stage: str, step: int, figures: dict[str, Any]) -> None:
        """Logs the figures of one step; step numbers increase from stage to stage, as some trackers require."""
        if not self._trackers:
            return
        if stage not in self._offsets:
            self._offsets[stage] = self._last
        self._last = self._offsets[stage] + step
        values = {f"{stage}/{name}": value for name, value in figures.items()}
        for tracker in list(self._trackers):
            try:
                tracker.log(values, step=self._last)
            except Exception as error:  # an unreachable server must not stop the training
                logger.warning(
                    "The tracker %s stopped working (%s); training continues without it.",
                    tracker.name,
                    error,
                )
                self._trackers.remove(tracker)

    def finish(self) -> None:
        """Finishes all trackers."""
        for tracker in self._trackers:
            with redirect_stdout(stderr):
                tracker.finish()
        self._trackers = []


def check_trackers(names: Sequence[str]) -> list[str]:
    """Checks before a long job that trackers are available.

    Returns:
        Each tracker once.

    Raises:
        RTPurboError: there is no such tracker, or its package is missing.
    """
    if not names:
        return []
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers

    # Trackers read the process index from it.
    PartialState()
    for name in names:
        try:
            # The folder is passed later to trackers that need one.
            available = filter_trackers([name], logging_dir=".")
        except ValueError as error:
            known = ", ".join(sorted(str(known) for known in LOGGER_TYPE_TO_CLASS))
            raise RTPurboError(f"there is no tracker '{name}': choose one of {known}.") from error
        if not available:
            raise RTPurboError(
                f"the tracker '{name}' needs a package that is not installed: try "
                f"pip install {name}."
            )
    return list(dict.fromkeys(str(name) for name in filter_trackers(list(names), ".")))

"""Checks of an evaluation's arguments, without importing torch (except for the name of a wheel)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rtpurbo.errors import RTPurboError
from rtpurbo.evaluation.cases import HARNESS, Case, check_name, choose_cases, suite_of
from rtpurbo.evaluation.questions.suites import NAMES as QUESTION_SUITES
from rtpurbo.evaluation.questions.suites import SHORT, QuestionData
from rtpurbo.lengths import check_context

DEFAULT_LENGTHS = (2048, 4096)
DEFAULT_POLICIES = ("full", "rtpurbo")
EVERY_POLICY = "all"

POLICY_NAMES = (
    "full",
    "rtpurbo",
    "rtpurbo-paper",
    "rtpurbo-residual",
    "rtpurbo-sparse-prefill",
    "rtpurbo-float8-index",
    "rtpurbo-before-stage2",
    "dense-heads",
    "quest",
    "top-k",
    "oracle-top-p",
    "local-only",
    "random-heads",
)
"""Names of `rtpurbo.evaluation.policies.POLICIES`, whose import takes seconds."""


@dataclass(frozen=True)
class Request:
    """Cases to run, and the files with their questions.

    Attributes:
        cases: to run.
        harness_data: files for tasks of lm-eval, by task.
        question_data: files for question suites, by suite.
    """

    cases: list[Case] = field(default_factory=list)
    harness_data: dict[str, str | Path] = field(default_factory=dict)
    question_data: dict[str, str | Path] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        suites: Sequence[str | Case],
        lengths: Sequence[int] | Mapping[str, Sequence[int]],
        policies: Sequence[str],
        *,
        samples: int | None = None,
        task_data: Mapping[str, str | Path] | None = None,
        seed: int = 0,
        run_code: bool = False,
    ) -> Request:
        """Checks the arguments of the same names of `rtpurbo.evaluation.run.evaluate`.

        Raises:
            RTPurboError: a name is unknown, questions are missing or malformed, or a suite runs code
                without `run_code`.
        """
        for name in policies:
            check_name("policy", name, [*POLICY_NAMES, EVERY_POLICY])
        harness_data, question_data = _split(suites, task_data or {})
        questions = QuestionData.read(question_data, seed)
        cases = choose_cases(suites, lengths, samples, questions.counts())
        for case in cases:
            if case.suite in SHORT and SHORT[case.suite].runs_code and not run_code:
                raise RTPurboError(
                    f"the suite '{case.suite}' executes code that the model writes, in a limited "
                    "process: pass --run-code to allow that."
                )
        asked = [case.task for case in cases if case.suite == HARNESS]
        for name in harness_data:
            if name not in asked:
                raise RTPurboError(
                    f"there is data for the task '{name}' of lm-eval, which is not asked for."
                )
        return cls(cases, harness_data, question_data)

    def check_lengths(self, artifact: str | Path, base_model: str | None = None) -> None:
        """Refuses cases beyond the model's context, if it is known without loading the model.

        Args:
            artifact: the artifact or export.
            base_model: as in `evaluate`.

        Raises:
            RTPurboError: a test is too long.
        """
        context = _context_length(Path(artifact), base_model)
        if context is not None:
            check_context("tests", max(case.context_length for case in self.cases), context)


def _split(
    suites: Sequence[str | Case], task_data: Mapping[str, str | Path]
) -> tuple[dict[str, str | Path], dict[str, str | Path]]:
    """Returns files for tasks of lm-eval, and files for question suites.

    Both know tasks such as gsm8k. A file goes to the suite unless only lm-eval's task is asked for.
    """
    asked = {suite_of(given) for given in suites}
    questions = {
        name: path
        for name, path in task_data.items()
        if name in QUESTION_SUITES and (name in asked or HARNESS not in asked)
    }
    others = {name: path for name, path in task_data.items() if name not in questions}
    return others, questions


def _context_length(artifact: Path, base_model: str | None) -> int | None:
    """Returns the context in tokens from local configuration files; None if they do not have it."""
    try:
        written = artifact / "rtpurbo_config.json"
        base: str | Path = artifact  # an export, unless it names its base
        if written.is_file():
            entry = json.loads(written.read_text(encoding="utf-8"))
            if entry["stage2"] != "merged":
                base = base_model or entry["base_model"]["name"]
        if str(base).startswith("wheel:"):
            # Imports torch, which a model in a folder does not need.
            from rtpurbo.models.wheels import find_wheel_model

            return int(find_wheel_model(str(base)).config["max_position_embeddings"])
        config = json.loads((Path(base) / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        if "yarn" in str(config.get("rope_scaling") or config.get("rope_parameters")):
            return None  # an extended context
        return int(config["max_position_embeddings"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RTPurboError):
        # Loading the model reports what is wrong.
        return None

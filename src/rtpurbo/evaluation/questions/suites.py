"""Question suites by name, and their questions from files."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rtpurbo.evaluation.questions import babilong, competition_math, gsm8k, humaneval, mmlu_pro
from rtpurbo.evaluation.questions.babilong import BabilongTask, babilong_tasks
from rtpurbo.evaluation.questions.suite import Row, read_rows

SHORT = {
    module.SUITE.name: module.SUITE for module in (gsm8k, competition_math, mmlu_pro, humaneval)
}
"""Suites whose questions have their own length, by name."""

ONE_TASK = "all"
"""Name of the only task of each of these suites."""

NAMES = (*SHORT, babilong.SUITE)


@dataclass(frozen=True)
class QuestionData:
    """Questions of a run.

    Attributes:
        rows: questions by suite, in the order of the files.
        seed: seed of the order in which cases use them.
    """

    rows: Mapping[str, list[Row]]
    seed: int = 0

    @classmethod
    def read(cls, paths: Mapping[str, str | Path], seed: int = 0) -> QuestionData:
        """Reads the questions of suites.

        Args:
            paths: files by suite, names of `NAMES`.
            seed: seed of the order in which cases use them.

        Raises:
            RTPurboError: a file is missing, empty or of another kind, or a line is malformed.
        """
        data = cls(
            {
                name: read_rows(
                    name, path, SHORT[name].columns if name in SHORT else babilong.COLUMNS
                )
                for name, path in paths.items()
            },
            seed,
        )
        data.counts()
        return data

    @cached_property
    def babilong(self) -> dict[str, BabilongTask]:
        """Tasks of BABILong; empty without its file."""
        rows = self.rows.get(babilong.SUITE)
        return {} if rows is None else babilong_tasks(rows, self.seed)

    def shuffled(self, suite: str) -> list[Row]:
        """Returns the questions of a suite of `SHORT` in the order in which cases use them."""
        rows = list(self.rows[suite])
        random.Random(f"{suite}-{self.seed}").shuffle(rows)
        return rows

    def counts(self) -> dict[str, dict[str, int]]:
        """Returns the number of questions by suite and task."""
        found = {
            suite: {ONE_TASK: len(rows)} for suite, rows in self.rows.items() if suite in SHORT
        }
        if babilong.SUITE in self.rows:
            found[babilong.SUITE] = {name: len(task.rows) for name, task in self.babilong.items()}
        return found

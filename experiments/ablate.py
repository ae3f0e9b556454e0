"""Settles the open questions of a conversion, arm by arm: what was done is kept, and gone on from.

    python experiments/ablate.py sharp-8k --data books.jsonl.gz --output ablations-8k --quick
    python experiments/ablate.py sharp-8k --data books.jsonl.gz --output ablations-8k --time-limit 570
    python experiments/ablate.py sharp-8k --output ablations-8k --table
    python experiments/ablate.py sharp-8k --output ablations-8k --plot ablations.png

The plan (`--list`) is in `ablations/plan.py`. The short arms of all groups come first. Every group has
a JSON file in the output folder; models and checkpoints lie in its `work` folder, or where `--work`
says. At the time limit a training saves a checkpoint; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablations.answers import answer_all
from ablations.arms import Arm, Group
from ablations.index_quality import index_quality
from ablations.plan import base_settings, plan
from ablations.plots import draw
from ablations.questions import Asked, asked_questions
from ablations.results import GroupFile, summary
from ablations.tables import group_markdown
from ablations.workshop import Workshop

from rtpurbo.cli.options import changed_settings
from rtpurbo.devices import device_name, resolve_device
from rtpurbo.errors import RTPurboError
from rtpurbo.interruption import StoppedBySignalError, stopping_cleanly
from rtpurbo.models.base import BaseModel
from rtpurbo.models.sparse_layers import is_sparse
from rtpurbo.models.sparsify import set_rule
from rtpurbo.settings import change_settings

WINDOWS_OF_PROSE = 6
REPORT_EVERY = 20.0


@dataclass
class Ablation:
    """Runs arms.

    Attributes:
        workshop: makes their models.
        folder: where questions are kept.
        samples: questions of each task.
        windows: of prose.
        seed: of the questions.
        exact: ask in the precision of the weights.
    """

    workshop: Workshop
    folder: Path
    samples: int
    windows: int
    seed: int
    exact: bool = False
    _asked: dict[int, list[Asked]] = field(default_factory=dict)

    def run(self, arm: Arm, results: GroupFile) -> dict[str, Any]:
        """The record of an arm."""
        began = time.time()
        record: dict[str, Any] = {
            "arm": arm.name,
            "device": device_name(self.workshop.device),
            "changes": dict(arm.changes),
            "rule": dict(arm.rule),
        }
        if arm.measure == "map":
            found = self.workshop.calibration(self.workshop.settings_of(arm), arm.text)
            rows = [row for row in found.head_map.scores if row is not None]
            record["map"] = {
                "stability": None if found.stability is None else vars(found.stability),
                "scores": [score for row in rows for score in row],
            }
        else:
            record |= self._measured(arm, results)
        return {**record, "seconds": round(time.time() - began, 1)}

    def _measured(self, arm: Arm, results: GroupFile) -> dict[str, Any]:
        # Before the arm's model: they need the teacher's, and two may be one too many.
        asked = {
            length: self._questions(length) for length in arm.lengths if arm.measure == "answers"
        }
        base = self.workshop.prepare(arm)
        if is_sparse(base.model):
            set_rule(base.model, **arm.rule)
        facts = self.workshop.figures(arm)
        return {**facts, **self._figures(arm, base, asked, results)}

    def _figures(
        self, arm: Arm, base: BaseModel, asked: dict[int, list[Asked]], results: GroupFile
    ) -> dict[str, Any]:
        if arm.measure == "index":
            corpus = self.workshop.held_out
            samples = min(self.samples, 6)
            found = index_quality(
                base, corpus, arm.lengths, samples, self.seed, oracle=arm.oracle
            )  # fmt: skip
            return {"index": found}
        answers = {
            str(length): answer_all(
                base.model,
                asked[length],
                selects=arm.selects,
                budgets=_budgets(arm, results, str(length)),
                exact=self.exact,
            )
            for length in arm.lengths
        }
        summaries = {length: summary(found) for length, found in answers.items()}
        return {"summary": summaries, "answers": answers}

    def _questions(self, length: int) -> list[Asked]:
        if length not in self._asked:
            self._asked[length] = asked_questions(
                self.folder, self.workshop.dense, self.workshop.held_out, length, self.samples,
                self.windows, self.seed, exact=self.exact,
            )  # fmt: skip
        return self._asked[length]


def _budgets(arm: Arm, results: GroupFile, length: str) -> dict[str, int] | None:
    """What every row of top-k may read: the mean of another arm, rounded up, for each kind."""
    if arm.budget_of is None:
        return None
    other = results.record(arm.budget_of)
    if other is None:
        raise RTPurboError(
            f"'{arm.name}' needs the results of '{arm.budget_of}': run that arm too."
        )
    found = other["answers"][length]
    return {kind: int(-(-found[kind]["reads"]["far_tokens_mean"] // 1)) for kind in found}


def chosen(
    groups: Sequence[Group], names: Sequence[str] | None, arms: Sequence[str] | None, quick: bool
) -> Iterator[tuple[Group, Arm]]:
    """The arms to run: the short ones of all groups, then the others.

    Args:
        groups: the plan.
        names: of groups; None for all.
        arms: names of arms, or parts of names; None for all.
        quick: the short ones alone.
    """
    whole = {arm.name for group in groups for arm in group.arms}
    for short in (True,) if quick else (True, False):
        for group in groups:
            for arm in group.arms:
                if (
                    arm.quick == short
                    and (names is None or group.name in names)
                    and (
                        arms is None
                        or arm.name in arms
                        or any(part in arm.name for part in arms if part not in whole)
                    )
                ):
                    yield group, arm


def say_progress() -> Any:
    """A progress that speaks every so many seconds."""
    last = [0.0]

    def progress(stage: str, done: int, total: int, figures: dict[str, float]) -> None:
        if time.time() - last[0] > REPORT_EVERY or done == total:
            last[0] = time.time()
            shown = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
            print(f"  {stage} {done} of {total} {shown}", flush=True)

    return progress


def list_plan(groups: Sequence[Group], pairs: Sequence[tuple[Group, Arm]]) -> None:
    """Prints arms and estimates."""
    for group in groups:
        arms = [arm for own, arm in pairs if own == group]
        if arms:
            print(
                f"{group.name}: {group.question} ({sum(arm.seconds for arm in arms) / 60:.1f} min)"
            )
            for arm in arms:
                print(f"    {arm.seconds:4.0f} s  {arm.name}{' (quick)' if arm.quick else ''}")
    minutes = sum(arm.seconds for _, arm in pairs) / 60
    print(f"{len(pairs)} arms, {minutes:.0f} minutes on one H100 at 8,192 tokens")


def read_groups(folder: Path) -> dict[str, dict[str, Any]]:
    """The results there are, by the letter of their group."""
    return {
        path.stem: json.loads(path.read_text(encoding="utf-8"))
        for path in sorted(folder.glob("?.json"))
    }


def show_tables(folder: Path) -> None:
    """Prints the tables of all groups that have results."""
    for group in read_groups(folder).values():
        print(group_markdown(group))


def draw_results(folder: Path, picture: Path) -> None:
    """Draws the groups that have results."""
    groups = read_groups(folder)
    if not groups:
        raise SystemExit(f"error: there are no results in {folder}: run the ablations first.")
    origin = next(iter(groups.values()))["origin"]
    draw(
        groups,
        picture,
        f"Model {origin['model']}, {origin['length']:,} tokens, window {origin['window']:,}; "
        "bars: 95 % of questions",
    )


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "model", nargs="?", help="folder or name; the default base model if left out"
    )
    parser.add_argument("--data", nargs="+")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--output", required=True, help="folder of the results")
    parser.add_argument(
        "--work", help="folder of models and checkpoints; in the output if left out"
    )
    parser.add_argument("--length", type=int, default=8192, help="of the longest sequences")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--groups", nargs="+", choices=list("abcdef"))
    parser.add_argument("--arms", nargs="+", help="names of arms, or parts of names")
    parser.add_argument("--samples", type=int, default=24, help="questions a task")
    parser.add_argument(
        "--float32", action="store_true", help="ask without half precision: slower on a GPU"
    )
    parser.add_argument("--quick", action="store_true", help="the most telling arms alone")
    parser.add_argument("--smoke", action="store_true", help="hardly any training: does it run?")
    parser.add_argument(
        "--set",
        action="append",
        metavar="NAME=VALUE",
        help="a setting that arms depart from, such as stage1.steps=60; may be repeated",
    )
    parser.add_argument("--time-limit", type=float, help="seconds, after which to stop cleanly")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--list", action="store_true", help="print the plan and stop")
    parser.add_argument("--table", action="store_true", help="print the results and stop")
    parser.add_argument("--plot", type=Path, help="draw the results to this file and stop")
    return parser.parse_args()


def run_arms(arguments: argparse.Namespace, pairs: Sequence[tuple[Group, Arm]]) -> None:
    """Runs what is not done yet."""
    folder = Path(arguments.output)
    work = Path(arguments.work or folder / "work")
    origin = {
        "model": Path(arguments.model or "default").name,
        "length": arguments.length,
        "window": arguments.window,
        "samples": arguments.samples,
        "seed": arguments.seed,
        "smoke": arguments.smoke,
        "float32": arguments.float32,
        "settings": arguments.set or [],
    }
    files = {group.name: GroupFile(folder, group, origin) for group, _ in pairs}
    left = [(group, arm) for group, arm in pairs if files[group.name].record(arm.name) is None]
    if not left:
        return
    work.mkdir(parents=True, exist_ok=True)
    workshop = Workshop(
        arguments.model,
        arguments.data,
        work,
        change_settings(
            base_settings(arguments.length, arguments.window, arguments.seed),
            changed_settings(arguments.set),
        ),
        resolve_device(arguments.device),
        arguments.smoke,
        say_progress(),
    )
    windows = 2 if arguments.smoke else WINDOWS_OF_PROSE
    ablation = Ablation(
        workshop, work, arguments.samples, windows, arguments.seed, arguments.float32
    )
    for number, (group, arm) in enumerate(left):
        print(f"{group.name}, {arm.name} ({number + 1} of {len(left)})", flush=True)
        record = ablation.run(arm, files[group.name])
        files[group.name].add(record)
        print(f"  {record['seconds']} s", flush=True)


def main() -> None:
    """Lists, runs or shows."""
    arguments = parse_arguments()
    groups = plan(arguments.length, arguments.window)
    pairs = list(chosen(groups, arguments.groups, arguments.arms, arguments.quick))
    if arguments.table:
        show_tables(Path(arguments.output))
    elif arguments.plot:
        draw_results(Path(arguments.output), arguments.plot)
    elif arguments.list:
        list_plan(groups, pairs)
    else:
        try:
            with stopping_cleanly(arguments.time_limit):
                run_arms(arguments, pairs)
        except StoppedBySignalError:
            print("stopped: the same command goes on from here", flush=True)
            return
        except RTPurboError as error:
            raise SystemExit(f"error: {error}") from error
        show_tables(Path(arguments.output))


if __name__ == "__main__":
    main()

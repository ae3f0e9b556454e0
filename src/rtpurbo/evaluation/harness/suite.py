"""Tasks of lm-eval as cases, loaded once for all policies."""

from __future__ import annotations

import difflib
import io
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rtpurbo.errors import RTPurboError, first_line
from rtpurbo.evaluation.bootstrap import bootstrap_interval
from rtpurbo.evaluation.cases import HARNESS, Case
from rtpurbo.evaluation.samples import Outcome, Sample
from rtpurbo.evaluation.task_suite import TOKENS_AT_ONCE, TaskSuite
from rtpurbo.models.architecture import context_length

# lm-eval's limit of an answer for tasks that set none.
DEFAULT_NEW_TOKENS = 256
QUESTIONS_AT_ONCE = 8
# Value of RULER's tasks in lm-eval for lengths other than a sample's own.
OTHER_LENGTH = -1.0

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Loader of `datasets` by the ending of a file."""

SPLITS = ("train", "validation", "test", "dev")


def lm_eval(module: str) -> Any:
    """Imports a module of lm-eval, such as `evaluator`.

    Raises:
        RTPurboError: lm-eval, or what it needs for models of transformers, is not installed.
    """
    try:
        return import_module(f"lm_eval.{module}")
    except ImportError as error:
        raise RTPurboError(
            "the suite 'lm-eval' needs LM Evaluation Harness, which is not installed or lacks a "
            f"package ({error}): pip install 'rtpurbo[lm-eval]'."
        ) from error


class Harness(TaskSuite):
    """Tasks of lm-eval in a run.

    Args:
        task_data: files that replace a task's data on the Hub, by the task's name; see
            `local_config`.
        max_new_tokens: limit of an answer; None takes that of the task.
        seed: seed of generated prompts.

    Raises:
        RTPurboError: lm-eval is not installed, or a file is missing.
    """

    def __init__(
        self,
        task_data: Mapping[str, str | Path],
        max_new_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        lm_eval("tasks")
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.task_data = {name: local_config(name, path) for name, path in task_data.items()}
        self._singles = {name for name, path in task_data.items() if Path(path).is_file()}
        self._folder = tempfile.TemporaryDirectory()
        self._managers: dict[int, Any] = {}
        self._cases: dict[tuple[Case, int], list[Case]] = {}
        self._tasks: dict[tuple[str, int], Any] = {}

    def prepare(
        self, tokenizer: PreTrainedTokenizerBase, case: Case, context_length: int
    ) -> list[Case]:
        """Loads a task, or all those of a group, with their data; the length of a case is that of generated prompts.

        Returns:
            A case for each task. Its length is that of its prompts, if recorded, or the model's.

        Raises:
            RTPurboError: the task is unknown, its data is not available, or its answers leave no room
                for questions.
        """
        if (case, context_length) not in self._cases:
            manager = self._manager(tokenizer, case.context_length)
            cases = []
            for name, task in self._load(manager, case.task).items():
                self._check_room(name, task, context_length)
                length = _own_length(task) or context_length
                cases.append(Case(HARNESS, name, length, case.samples))
                self._tasks[name, length] = task
            self._cases[case, context_length] = cases
        return self._cases[case, context_length]

    def run(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        case: Case,
        after_sample: Callable[[], None] = lambda: None,
        questions: range | None = None,
    ) -> list[Outcome]:
        """Returns an outcome for each metric of a task; prompts have the chat template if there is one.

        `after_sample` is called for each answer, or for each choice that a question offers.
        """
        task = self._tasks[case.task, case.context_length]
        is_gpu = model.device.type == "cuda"
        at_once = max(1, min(QUESTIONS_AT_ONCE, TOKENS_AT_ONCE // case.context_length))
        wrapped = lm_eval("models.huggingface").HFLM(
            pretrained=model,
            tokenizer=tokenizer,
            backend="causal",
            max_length=context_length(model.config),
            batch_size=at_once if is_gpu else 1,
        )
        # In place of lm-eval's cache of answers, which it calls for each of them.
        wrapped.cache_hook = SimpleNamespace(add_partial=lambda *answer: after_sample())
        limit = {} if self.max_new_tokens is None else {"max_gen_toks": self.max_new_tokens}
        results = lm_eval("evaluator").simple_evaluate(
            model=wrapped,
            tasks=[task],
            limit=case.samples or None,
            bootstrap_iters=0,
            gen_kwargs=limit or None,
            apply_chat_template=bool(tokenizer.chat_template),
            task_manager=next(iter(self._managers.values())),
            random_seed=self.seed,
            numpy_random_seed=self.seed,
            torch_random_seed=self.seed,
            fewshot_random_seed=self.seed,
        )
        return outcomes_of(
            results["samples"][case.task],
            results["results"][case.task],
            task.higher_is_better(),
            tokenizer,
        )

    def _check_room(self, name: str, task: Any, context_length: int) -> None:
        if task.config.output_type != "generate_until":
            return
        given = task.config.generation_kwargs or {}
        most = self.max_new_tokens or int(given.get("max_gen_toks", DEFAULT_NEW_TOKENS))
        if most >= context_length:
            raise RTPurboError(
                f"answers to the task {name} may have {most:,} tokens, which leaves no room for "
                f"questions in the model's context of {context_length:,}: lower --max-new-tokens."
            )

    def _manager(self, tokenizer: PreTrainedTokenizerBase, length: int) -> Any:
        if length not in self._managers:
            # RULER's tasks load the tokenizer by its name.
            folder = Path(self._folder.name) / "tokenizer"
            if not folder.is_dir():
                tokenizer.save_pretrained(folder)
            metadata: dict[str, Any] = {"tokenizer": str(folder)}
            if length:
                metadata["max_seq_lengths"] = [length]
            self._managers[length] = lm_eval("tasks").TaskManager(metadata=metadata)
        return self._managers[length]

    def _load(self, manager: Any, name: str) -> dict[str, Any]:
        """Returns the tasks that a name stands for, by their names."""
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks)
            hint = f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists all."
            raise RTPurboError(f"lm-eval has no task '{name}': {hint}")
        spec: Any = name
        if name in self.task_data:
            if name not in manager.all_subtasks:
                raise RTPurboError(
                    f"'{name}' is a group of tasks: name one of them and give it data of its own."
                )
            spec = {"group": "local", "task": [self.task_data[name]]}
        random.seed(self.seed)
        np.random.seed(self.seed)
        try:
            # RULER's tasks print their progress.
            with redirect_stdout(io.StringIO()):
                tasks = manager.load([spec])["tasks"]
        except Exception as error:  # tasks can be code, and downloads fail in many ways
            raise RTPurboError(
                f"lm-eval cannot load the task {name} ({first_line(error)}): check the network, or "
                f"give its data with --task-data {name}=FILE."
            ) from error
        for task in tasks.values():
            examples = task.config.fewshot_split
            if name in self._singles and task.config.num_fewshot and examples:
                raise RTPurboError(
                    f"the task {name} shows examples before each question: give it a folder with "
                    f"{task.config.test_split or task.config.validation_split}.jsonl and "
                    f"{examples}.jsonl, not one file."
                )
        return tasks


def _own_length(task: Any) -> int | None:
    """Returns the length that a task generated its prompts for, which RULER's tasks record."""
    documents = task.test_docs() if task.has_test_docs() else None
    length = documents[0].get("max_length") if documents is not None and len(documents) else None
    return length if isinstance(length, int) else None


def local_config(task: str, path: str | Path) -> dict[str, Any]:
    """Returns the configuration of a task of lm-eval with data from files that have the columns of the Hub's.

    The path is a file with the questions; or a folder with a file for each split, such as `test.jsonl` and,
    for few-shot examples, `validation.jsonl`. Prompts, few-shot examples and metrics are those of lm-eval.

    Raises:
        RTPurboError: there is no such file, or its format is unknown.
    """
    path = Path(path)
    if path.is_dir():
        files = {
            file.stem: file
            for file in sorted(path.iterdir())
            if file.suffix in FORMATS and file.stem in SPLITS
        }
        if not files:
            raise RTPurboError(
                f"the folder {path} has no data for the task {task}: it needs a file for each "
                "split, such as test.jsonl."
            )
    elif path.is_file():
        # For any split that the task takes its questions from.
        files = dict.fromkeys(SPLITS, path)
    else:
        raise RTPurboError(f"there is no file {path} with data for the task {task}.")
    suffixes = {file.suffix for file in files.values()}
    if len(suffixes) > 1 or not suffixes <= set(FORMATS):
        raise RTPurboError(
            f"the data {path} for the task {task} must be of one format: {', '.join(FORMATS)}."
        )
    return {
        "task": task,
        "dataset_path": FORMATS[suffixes.pop()],
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split: str(file.resolve()) for split, file in files.items()}
        },
    }


def outcomes_of(
    samples: Sequence[Mapping[str, Any]],
    aggregated: Mapping[str, Any],
    higher_is_better: Mapping[str, bool],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Outcome]:
    """Returns the outcomes of a task from lm-eval's log of each question and its results by `metric,filter`.

    The tokenizer counts the tokens of prompts.
    """
    outcomes = []
    pairs = [(metric, sample["filter"]) for sample in samples for metric in sample["metrics"]]
    for metric, chosen in dict.fromkeys(pairs):
        own = [sample for sample in samples if sample["filter"] == chosen and metric in sample]
        values = [sample[metric] for sample in own]
        # RULER's tasks name their metric by the length.
        name = "string_match" if metric.isdigit() else metric
        name = name if chosen == "none" else f"{name},{chosen}"
        numbers = [float(value) for value in values if isinstance(value, int | float)]
        if len(numbers) < len(values):
            # Such as word perplexity, which is not a mean over samples.
            score = aggregated.get(f"{metric},{chosen}")
            if isinstance(score, int | float):
                outcomes.append(Outcome(float(score), None, len(values), (), name))
            continue
        if metric.isdigit():
            own = [sample for sample in own if sample[metric] != OTHER_LENGTH]
            numbers = [number for number in numbers if number != OTHER_LENGTH]
        if not numbers:
            continue
        # lm-eval does not say which metrics are shares: one that is better if higher and never above 1 is
        # treated as a share.
        is_share = higher_is_better.get(metric, True) and all(0 <= item <= 1 for item in numbers)
        scores = [100 * number if is_share else number for number in numbers]
        kept = tuple(
            _sample(sample, score, tokenizer) for sample, score in zip(own, scores, strict=True)
        )
        outcomes.append(Outcome(fmean(scores), bootstrap_interval(scores), len(scores), kept, name))
    return outcomes


def _sample(sample: Mapping[str, Any], score: float, tokenizer: PreTrainedTokenizerBase) -> Sample:
    context = str(sample["arguments"][0][0])
    ids = tokenizer(context, add_special_tokens=False, verbose=False)["input_ids"]
    target = sample["target"]
    targets = target if isinstance(target, list) else [target]
    answered = sample["resps"][0]
    while isinstance(answered, list | tuple) and answered:
        answered = answered[0]
    return Sample.of(ids, [str(item) for item in targets], str(answered), score)

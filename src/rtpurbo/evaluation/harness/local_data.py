"""Files that replace a task's data on the Hub and have the same columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rtpurbo.errors import RTPurboError

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""Loader of `datasets` by the ending of a file."""

SPLITS = ("train", "validation", "test", "dev")


def local_config(task: str, path: str | Path) -> dict[str, Any]:
    """Returns the configuration of a task of lm-eval with data from files.

    Prompts, few-shot examples and metrics are those of lm-eval; files need the columns of the data set on
    the Hub.

    Args:
        task: name of the task.
        path: file with the questions; or folder with a file for each split, such as `test.jsonl` and, for
            few-shot examples, `validation.jsonl`.

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

"""Files in place of a task's data on the Hub: the same columns, read from disk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rtpurbo.errors import RTPurboError

FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}
"""What files may end with, and who reads them."""

SPLITS = ("train", "validation", "test", "dev")


def local_config(task: str, path: str | Path) -> dict[str, Any]:
    """A task that lm-eval knows, with its data from files.

    Prompts, few-shot examples and metrics stay as lm-eval has them; files need the columns of the
    data set on the Hub.

    Args:
        task: its name.
        path: a file, which holds the questions; or a folder with a file for each split, such as
            `test.jsonl` and, where examples are shown before each question, `validation.jsonl`.

    Raises:
        RTPurboError: there is no such file, or it is of a format unknown.
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
        # Whichever split the task takes its questions from.
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

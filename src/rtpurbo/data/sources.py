"""Documents from text files and datasets of the Hugging Face Hub."""

from __future__ import annotations

import gzip
import importlib
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from rtpurbo import strict_json
from rtpurbo.errors import RTPurboError, first_line

# Limits against decompression bombs: characters that are always allowed, and beyond them a maximum ratio to
# the file size.
_LEAST_EXPANDED = 2**28
_MOST_EXPANSION = 200

_SURROGATE = re.compile("[\ud800-\udfff]")


def read_source(source: str) -> list[str]:
    """Returns the documents of one source of `rtpurbo.data.texts.load_texts`; none is empty.

    Raises:
        RTPurboError: the source is missing, unreadable, empty or of an unknown kind.
    """
    if source.startswith("hf:"):
        documents = _read_hub_dataset(source)
    else:
        path = Path(source).expanduser()
        check_is_file(path, source)
        try:
            documents = _read_file(path, source)
        except (OSError, UnicodeDecodeError, EOFError, zlib.error) as error:
            raise RTPurboError(f"cannot read the text file {source}: {error}.") from error
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise RTPurboError(f"the text source {source} is empty; give one with text in it.")
    return documents


def _read_file(path: Path, source: str) -> list[str]:
    if path.name.endswith((".txt", ".md")):
        return [path.read_text(encoding="utf-8")]
    if path.name.endswith(".jsonl"):
        with path.open(encoding="utf-8") as lines:
            return _read_json_lines(lines, source)
    if path.name.endswith(".jsonl.gz"):
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            return _read_json_lines(_bounded(lines, path, source), source)
    if path.name.endswith(".parquet"):
        datasets = import_datasets(source)
        try:
            dataset = datasets.Dataset.from_parquet(str(path))
        except Exception as error:  # the errors of the Parquet reader have no base of their own
            raise RTPurboError(
                f"cannot read the text file {source}: {first_line(error)}; "
                "check that it is a Parquet file."
            ) from error
        return _text_column(dataset, source)
    raise RTPurboError(
        f"the text file {source} is of an unknown kind; "
        "use .txt, .md, .jsonl, .jsonl.gz or .parquet."
    )


def check_is_file(path: Path, source: str) -> None:
    """Refuses paths that are not regular files, such as pipes and devices.

    Raises:
        RTPurboError: the file does not exist or is not a regular one.
    """
    if not path.exists():
        raise RTPurboError(f"there is no text file {source}; check the path.")
    if not path.is_file():
        raise RTPurboError(f"the text source {source} is not a regular file; name one.")


def _bounded(lines: TextIO, path: Path, source: str) -> Iterator[str]:
    """Yields the lines of a compressed file up to a maximum ratio to its size.

    Raises:
        RTPurboError: the file expands beyond that, as a decompression bomb does.
    """
    allowed = max(_LEAST_EXPANDED, _MOST_EXPANSION * path.stat().st_size)
    while line := lines.readline(allowed + 1):
        allowed -= len(line)
        if allowed < 0:
            raise RTPurboError(
                f"{source} expands to more than {_MOST_EXPANSION} times its size; decompress it, and "
                "name the result if you trust it."
            )
        yield line


def _read_json_lines(lines: Iterable[str], source: str) -> list[str]:
    return [
        _text_of_line(line, f"Line {number} of {source}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]


def _text_of_line(line: str, place: str) -> str:
    """Returns the text in a line of JSON.

    Args:
        line: JSON object with a field `text`.
        place: name of the line in error messages.

    Raises:
        RTPurboError: the line is not such an object, or its text is invalid Unicode.
    """
    try:
        row = strict_json.parse(line)
    except ValueError as error:
        raise RTPurboError(
            f"{place} is not JSON ({error}); every line must be an object."
        ) from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise RTPurboError(f'{place} has no field "text" with a string; every line must have one.')
    text: str = row["text"]
    if _SURROGATE.search(text):
        raise RTPurboError(
            f"{place} holds half of a surrogate pair, which is invalid Unicode; write the file again as UTF-8."
        )
    return text


def parse_hub_source(source: str) -> tuple[str, str | None, str]:
    """Returns name, configuration and split of a Hub dataset, from `hf:NAME[:CONFIGURATION][:SPLIT]`.

    Raises:
        RTPurboError: the source has another form.
    """
    name, *options = source.removeprefix("hf:").split(":")
    if not name or len(options) > 2:
        raise RTPurboError(
            f"{source} does not name a dataset; write hf:NAME, hf:NAME:SPLIT "
            "or hf:NAME:CONFIGURATION:SPLIT."
        )
    return name, options[0] if len(options) == 2 else None, options[-1] if options else "train"


def _read_hub_dataset(source: str) -> list[str]:
    name, configuration, split = parse_hub_source(source)
    datasets = import_datasets(source)
    try:
        dataset = datasets.load_dataset(name, configuration, split=split)
    except Exception as error:  # the library raises the errors of its many sources
        raise RTPurboError(
            f"cannot load the dataset {source}: {first_line(error)}; "
            "check its name, configuration and split, and the network."
        ) from error
    return _text_column(dataset, source)


def _text_column(dataset: Any, source: str) -> list[str]:
    if "text" not in dataset.column_names:
        raise RTPurboError(
            f'{source} has no column "text", only {", ".join(dataset.column_names)}; '
            "rename the column that holds the text."
        )
    return [text for text in dataset["text"] if text]


def import_datasets(source: str) -> Any:
    """Imports the optional package `datasets`.

    Raises:
        RTPurboError: the package is not installed.
    """
    try:
        return importlib.import_module("datasets")
    except ImportError as error:
        raise RTPurboError(
            f"reading {source} needs the package datasets; install it with "
            "pip install 'rtpurbo[data]'."
        ) from error

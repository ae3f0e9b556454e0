"""Conditions of a run; only results of a run under the same conditions can be resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rtpurbo.data.texts import TextCorpus
from rtpurbo.devices import device_kind
from rtpurbo.evaluation.policies import Source
from rtpurbo.evaluation.ruler.materials import Materials
from rtpurbo.evaluation.ruler.questions import QuestionSet
from rtpurbo.models.artifact_config import CONFIG_FILE, MODEL_CONFIG_FILE
from rtpurbo.models.stage2_weights import ADAPTER_FOLDER
from rtpurbo.version import __version__, installed_version

# Of an artifact or an export: what its models are made of, but neither its card nor its log.
_DECIDING_FILES = (
    "**/*.safetensors",
    CONFIG_FILE,
    f"{ADAPTER_FOLDER}/adapter_config.json",
    MODEL_CONFIG_FILE,
    "generation_config.json",
    "tokenizer*",
    "chat_template*",
)

_DIFFERENCES = {
    # A digest of the files that its models are made of; they contain the fingerprint of the base model.
    "artifact": "another artifact",
    "prose": "other prose (--data)",
    "words": "the words of {before} in RULER, not of {now}",
    "single_hop": "other questions of ruler:qa_1 (--squad)",
    "two_hop": "other questions of ruler:qa_2 (--hotpotqa)",
    # Digests of the files of suites and tasks of lm-eval, by name.
    "task_data": "other questions (--task-data)",
    "max_new_tokens": "--max-new-tokens {before}, not {now}",
    "seed": "--seed {before}, not {now}",
    "cache_length": "cache sizes computed at the length {before}, not {now}",
    "dtype": "--dtype {before}, not {now}",
    # Devices of one kind run the same kernels.
    "device": "a device of the kind {before}, not {now}",
    "rtpurbo": "rtpurbo {before}, not {now}",
    "torch": "torch {before}, not {now}",
    "transformers": "transformers {before}, not {now}",
    "lm_eval": "lm-eval {before}, not {now}",
}
"""All conditions, with the words of a message about a difference."""


def conditions_of(
    source: Source,
    corpus: TextCorpus,
    materials: Materials,
    *,
    task_data: Mapping[str, str | Path] | None = None,
    max_new_tokens: int | None = None,
    cache_length: int | None = None,
) -> dict[str, Any]:
    """Returns everything that decides the questions and answers of a run, as plain JSON types.

    Task data are files for suites and tasks of lm-eval; other options are those of `evaluate`.
    """
    return {
        "artifact": _digest_of_artifact(source.folder),
        "prose": _digest(
            document.encode("utf-8", "surrogatepass") for document in corpus.documents
        ),
        "words": materials.vocabulary.name,
        "single_hop": _digest_of_questions(materials.single_hop),
        "two_hop": _digest_of_questions(materials.two_hop),
        "task_data": {
            task: _digest_of_data(Path(path)) for task, path in (task_data or {}).items()
        },
        "max_new_tokens": max_new_tokens,
        "seed": source.seed,
        "cache_length": cache_length,
        "dtype": str(source.dtype).removeprefix("torch."),
        "device": device_kind(torch.device(source.device)),
        "rtpurbo": __version__,
        "torch": version("torch"),
        "transformers": version("transformers"),
        "lm_eval": installed_version("lm_eval"),
    }


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns descriptions of the conditions of the run to resume that differ, such as "--seed 0, not 1"."""
    return [
        words.format(before=_said(before.get(name)), now=_said(now[name]))
        for name, words in _DIFFERENCES.items()
        if before.get(name) != now[name]
    ]


def _said(value: Any) -> str:
    return "left out" if value is None else str(value)


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        # Else "ab", "c" would be the same as "a", "bc".
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:16]


def _digest_of_files(folder: Path, files: Iterable[Path]) -> str:
    return _digest(part for file in sorted(set(files)) for part in _named_chunks(folder, file))


def _named_chunks(folder: Path, file: Path) -> Iterable[bytes]:
    yield file.relative_to(folder).as_posix().encode()
    with file.open("rb") as opened:
        while chunk := opened.read(1 << 24):
            yield chunk


def _digest_of_artifact(folder: Path) -> str:
    found = (file for pattern in _DECIDING_FILES for file in folder.glob(pattern))
    return _digest_of_files(folder, (file for file in found if file.is_file()))


def _digest_of_data(path: Path) -> str:
    if path.is_dir():
        return _digest_of_files(path, (file for file in path.iterdir() if file.is_file()))
    return _digest_of_files(path.parent, [path])


def _digest_of_questions(questions: QuestionSet) -> str:
    asked = [asdict(question) for question in questions.questions]
    return _digest(json.dumps(part).encode() for part in (questions.passages, asked))

"""Conditions of a run; only results of a run under the same conditions can be resumed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
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
from rtpurbo.version import __version__

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
    "artifact": "another artifact",
    "prose": "other prose (--data)",
    "words": "the words of {before} in RULER, not of {now}",
    "single_hop": "other questions of ruler:qa_1 (--squad)",
    "two_hop": "other questions of ruler:qa_2 (--hotpotqa)",
    "task_data": "other questions (--task-data)",
    "max_new_tokens": "--max-new-tokens {before}, not {now}",
    "seed": "--seed {before}, not {now}",
    "cache_length": "caches weighed at the length {before}, not {now}",
    "dtype": "--dtype {before}, not {now}",
    "device": "a device of the kind {before}, not {now}",
    "rtpurbo": "rtpurbo {before}, not {now}",
    "torch": "torch {before}, not {now}",
    "transformers": "transformers {before}, not {now}",
    "lm_eval": "lm-eval {before}, not {now}",
}
"""What to say of each condition that was another."""


@dataclass(frozen=True)
class Conditions:
    """Everything that decides questions and answers of a run.

    Attributes:
        artifact: a digest of the files that its models are made of; they name the weights of the base
            model by their fingerprint.
        prose: one of the text.
        words: where those of RULER come from.
        single_hop: a digest of the questions of `ruler:qa_1`.
        two_hop: one of those of `ruler:qa_2`.
        task_data: digests of the files given for suites and tasks of lm-eval, by their names.
        max_new_tokens: the most that answers to their questions may have.
        seed: of the tests.
        cache_length: tokens at which cache sizes are computed; None for each test's.
        dtype: of the weights.
        device: its kind; devices of one kind run the same kernels.
        rtpurbo: version of the package.
        torch: version of the package.
        transformers: version of the package.
        lm_eval: version of the package; None where it is not installed.
    """

    artifact: str
    prose: str
    words: str
    single_hop: str
    two_hop: str
    task_data: Mapping[str, str]
    max_new_tokens: int | None
    seed: int
    cache_length: int | None
    dtype: str
    device: str
    rtpurbo: str
    torch: str
    transformers: str
    lm_eval: str | None

    @classmethod
    def of(
        cls,
        source: Source,
        corpus: TextCorpus,
        materials: Materials,
        *,
        task_data: Mapping[str, str | Path] | None = None,
        max_new_tokens: int | None = None,
        cache_length: int | None = None,
    ) -> Conditions:
        """Those of a run.

        Args:
            source: the artifact, and how its models are loaded.
            corpus: prose.
            materials: of RULER.
            task_data: files for suites and tasks of lm-eval, by their names.
            max_new_tokens: as the attribute.
            cache_length: as the attribute.
        """
        return cls(
            _digest_of_artifact(source.folder),
            _digest(document.encode("utf-8", "surrogatepass") for document in corpus.documents),
            materials.vocabulary.name,
            _digest_of_questions(materials.single_hop),
            _digest_of_questions(materials.two_hop),
            {task: _digest_of_data(Path(path)) for task, path in (task_data or {}).items()},
            max_new_tokens,
            source.seed,
            cache_length,
            str(source.dtype).removeprefix("torch."),
            device_kind(torch.device(source.device)),
            __version__,
            version("torch"),
            version("transformers"),
            _version_if_installed("lm_eval"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    def differences(self, before: Mapping[str, Any]) -> list[str]:
        """Describes the conditions that differ, such as "--seed 0, not 1".

        Args:
            before: conditions as `to_dict` gave them.
        """
        now = self.to_dict()
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


def _version_if_installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None

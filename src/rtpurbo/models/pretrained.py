"""Loading with transformers, from a folder or the Hub; errors are reported in one sentence."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rtpurbo.errors import RTPurboError, first_line
from rtpurbo.models.architecture import check_architecture
from rtpurbo.models.model_config import RTPurboModelConfig
from rtpurbo.models.sharding import Sharding, load_sharded
from rtpurbo.models.sharding import whole as whole_tensor
from rtpurbo.models.text_part import (
    check_text_part,
    forget_key_mapping,
    is_composite,
    key_mapping,
    register_text_class,
    settle_tied_embeddings,
    text_config,
)

# Values of each parameter that a fingerprint covers.
_VALUES = 64

Dtype = torch.dtype | Literal["auto"]


@dataclass(frozen=True)
class LoadingOptions:
    """Additional arguments of `from_pretrained`.

    Attributes:
        hub: of the access to the Hugging Face Hub, such as `token` and `cache_dir`.
        model: of `AutoModelForCausalLM`, such as `device_map`.
        dtype: of the weights; "auto" is the one that they are stored in.
        sharding: processes that each keep a shard of the weights; None loads the whole model.
    """

    hub: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    dtype: Dtype = torch.float32
    sharding: Sharding | None = None

    @property
    def places_model(self) -> bool:
        """True if transformers places the weights on their devices while it loads them."""
        return self.model.get("device_map") is not None


NO_OPTIONS = LoadingOptions()


class Loaded(NamedTuple):
    """Model, its tokenizer, and the fingerprint of its weights as they are stored."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str


def load_pretrained_config(name: str, *, sparse: bool = False, **options: Any) -> PretrainedConfig:
    """Loads and checks the configuration of a model, or of the text decoder of a multimodal one, without its weights.

    With `sparse`, the model may be a sparse one, of which it is the dense configuration. The options are those of
    `AutoConfig.from_pretrained`.

    Raises:
        RTPurboError: it cannot be loaded, or its architecture is not supported.
    """
    return _load_configs(name, sparse=sparse, **options)[0]


def _load_configs(
    name: str, *, sparse: bool = False, **options: Any
) -> tuple[PretrainedConfig, PretrainedConfig | None]:
    """The configuration as `load_pretrained_config` returns it, and that of the whole multimodal model."""
    with _loading(name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
    if isinstance(config, RTPurboModelConfig):
        if not sparse:
            raise RTPurboError(
                f"{name} is a sparse model of rtpurbo, not a dense one: pass the dense model that it "
                "was made from, which `rtpurbo inspect` shows."
            )
        config = config.dense()
    whole = config if is_composite(config) else None
    if whole is not None:
        config = text_config(whole)
    check_architecture(config)
    register_text_class(config)
    return config, whole


def load_pretrained(
    name: str, options: LoadingOptions, *, config: PretrainedConfig | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model and its tokenizer; the architecture is checked before weights are read.

    A `config` replaces the one in the folder or on the Hub.

    Raises:
        RTPurboError: model or tokenizer cannot be loaded, weights are missing, or the
            architecture is not supported.
    """
    whole = None
    if config is None:
        config, whole = _load_configs(name, **options.hub)
    settings = {**options.hub, **options.model, "config": config, "dtype": options.dtype}
    if whole is None:
        model = load_weights(name, options.sharding, **settings)
    else:
        model = _load_text_part(name, whole, options.sharding, **settings)
    return model, load_tokenizer(name, **options.hub)


def load_weights(name: str, sharding: Sharding | None = None, **options: Any) -> PreTrainedModel:
    """Loads a model whose configuration has been checked and is among the options for transformers.

    Raises:
        RTPurboError: it cannot be loaded, or weights are missing.
    """
    options["trust_remote_code"] = False
    with _loading(name):
        if sharding is None:
            model, loading = AutoModelForCausalLM.from_pretrained(
                name, output_loading_info=True, **options
            )
        else:
            model, loading = load_sharded(name, sharding, **options)
    if loading["missing_keys"]:
        # transformers would initialise them at random.
        missing = sorted(loading["missing_keys"])
        raise RTPurboError(
            f"the files of the model {name} lack {len(missing)} weights, such as "
            f"{missing[0]}: download or save the model again."
        )
    return model


def _load_text_part(
    name: str, whole: PretrainedConfig, sharding: Sharding | None, **options: Any
) -> PreTrainedModel:
    """Loads the text decoder of a `whole` multimodal model as a causal language model.

    Raises:
        RTPurboError: as `load_weights` does, or the model differs from the multimodal one on text.
    """
    if sharding is not None:
        raise RTPurboError(
            f"{name} is a multimodal {whole.model_type} model, whose text decoder cannot be loaded in "
            "parts: choose --parallel data."
        )
    mapping = key_mapping(options["config"])
    model = load_weights(name, **options, key_mapping=mapping)
    forget_key_mapping(model, mapping)
    settle_tied_embeddings(model)
    with quiet_transformers():
        check_text_part(model, whole)
    return model


def load_tokenizer(name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or the Hub.

    Raises:
        RTPurboError: it cannot be loaded.
    """
    with quiet_transformers():
        try:
            return AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
        except Exception as error:  # a damaged file can raise anything
            raise RTPurboError(
                f"the tokenizer of {name} cannot be loaded ({first_line(error)}); "
                "put the tokenizer's files into the model's folder."
            ) from error


def load_with_fingerprint(name: str, options: LoadingOptions) -> Loaded:
    """Loads a model like `load_pretrained`, with a fingerprint that does not depend on the dtype.

    Raises:
        RTPurboError: as `load_pretrained` does, or weights are offloaded.
    """
    # A fingerprint rounds to bfloat16, so only a cast to float16 would change it.
    narrow = options.dtype == torch.float16
    model, tokenizer = load_pretrained(name, replace(options, dtype="auto") if narrow else options)
    refuse_offloading(model)
    found = fingerprint(model)
    if narrow and options.sharding is not None:
        # FSDP keeps references to the parameters that it sharded: load them again in the other dtype.
        del model
        model, tokenizer = load_pretrained(name, options)
    elif narrow:
        # Not `model.half()`, which would round the frequencies of the rotary embedding as well.
        for parameter in model.parameters():
            parameter.data = parameter.data.half()
        model.config.dtype = torch.float16
    return Loaded(model, tokenizer, found)


def fingerprint(model: torch.nn.Module) -> str:
    """Returns a SHA-256 that identifies base weights, quickly even for large models.

    It covers the name, shape and up to 64 evenly spaced values of each parameter. The values are
    rounded to bfloat16, so that loading the same weights in float32 or bfloat16 gives the same
    fingerprint; float16 does not, so it must be taken before a cast to that. What adapters (LoRA)
    and token indexers add to a model does not count. All processes that hold parts of a sharded
    model call it together.
    """
    parameters: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters():
        if "lora_" not in name and "indexer" not in name:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            parameters[name] = parameter.detach()

    digest = hashlib.sha256()
    for name, weights in sorted(parameters.items()):
        # Sharded weights are gathered one at a time.
        values = whole_tensor(weights).reshape(-1)
        stride = max(1, -(-values.numel() // _VALUES))
        values = values[::stride].to("cpu", torch.bfloat16).view(torch.int16)
        digest.update(f"{name} {tuple(weights.shape)}\n".encode())
        digest.update(values.numpy().astype("<i2").tobytes())
    return digest.hexdigest()


def refuse_offloading(model: PreTrainedModel) -> None:
    """Refuses a model with offloaded weights, which accelerate moves to a device while they are used.

    Raises:
        RTPurboError: weights are offloaded to the CPU or the disk.
    """
    # A model on the meta device without hooks serves for its shapes.
    offloaded = any(weight.is_meta for weight in model.parameters()) and any(
        hasattr(module, "_hf_hook") for module in model.modules()
    )
    if offloaded:
        raise RTPurboError(
            "weights of the model are offloaded to the CPU or the disk, and sparse attention needs "
            "them on the device where it runs: choose a device_map without offloading, a smaller "
            "dtype, or more devices."
        )


def torch_dtype(dtype: torch.dtype | str) -> Dtype:
    """Returns the torch dtype of a name; "auto" is returned as it is.

    Raises:
        RTPurboError: there is no such dtype.
    """
    if dtype == "auto":
        return "auto"
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise RTPurboError(f"there is no dtype '{dtype}': pass a torch.dtype, its name or 'auto'.")
    return found


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Suppresses the progress bars and warnings of transformers."""
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


def quiet_in_logs() -> AbstractContextManager[None]:
    """Context of `quiet_transformers` if standard error is no terminal, where each state of a bar would be kept."""
    return nullcontext() if sys.stderr.isatty() else quiet_transformers()


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Reports errors of transformers inside a `with` block in one sentence, and nothing else.

    Raises:
        RTPurboError: the model cannot be loaded.
    """
    try:
        with quiet_transformers():
            yield
    except RTPurboError:
        raise
    except Exception as error:  # a damaged file can raise anything
        raise RTPurboError(
            f"the model {name} cannot be loaded ({first_line(error)}); check that it is a causal "
            "language model that transformers knows without code of its own, and that its files are "
            "complete."
        ) from error

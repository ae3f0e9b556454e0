"""Loading with transformers, from a folder or the Hub, with its errors in one sentence."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, NoReturn

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

from rtpurbo.errors import RTPurboError
from rtpurbo.models.architecture import check_architecture
from rtpurbo.models.fingerprint import fingerprint
from rtpurbo.models.sharding import Sharding, load_sharded


class Loaded(NamedTuple):
    """A model, its tokenizer, and the fingerprint of its weights as they are stored."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str


def load_pretrained_config(name: str, **options: Any) -> PretrainedConfig:
    """Loads the configuration of a model that can be made sparse, without its weights.

    Args:
        name: a folder or a name on the Hub.
        options: for `AutoConfig.from_pretrained`: where to look.

    Raises:
        RTPurboError: it cannot be loaded, or its architecture is not supported. The text part of
            a vision-language model is not enough: its weights have other names.
    """
    with quiet_transformers():
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False, **options)
        except Exception as error:  # a damaged file can raise anything
            _refuse(name, error)
    check_architecture(config)
    return config


def load_pretrained(
    name: str,
    dtype: torch.dtype | Literal["auto"],
    *,
    config: PretrainedConfig | None = None,
    quantization: Any = None,
    sharding: Sharding | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model and its tokenizer; the architecture is checked before weights are read.

    Args:
        name: a folder or a name on the Hub.
        dtype: the type of the weights, or "auto" for the one that they are stored in.
        config: the model's configuration, if it is known or changed.
        quantization: how to read a quantised model, only where that must be said.
        sharding: processes that each keep a part of the weights; None loads the whole model.
        options: for `from_pretrained` of model and tokenizer: where to look.

    Raises:
        RTPurboError: model or tokenizer cannot be loaded, weights are missing, or the
            architecture is not supported.
    """
    if config is None:
        config = load_pretrained_config(name, **options)
    loading_options = {**options, "config": config, "dtype": dtype, "trust_remote_code": False}
    if quantization is not None:
        loading_options["quantization_config"] = quantization
    with quiet_transformers():
        try:
            if sharding is None:
                model, loading = AutoModelForCausalLM.from_pretrained(
                    name, output_loading_info=True, **loading_options
                )
            else:
                model, loading = load_sharded(name, sharding, **loading_options)
        except RTPurboError:
            raise
        except Exception as error:  # as above
            _refuse(name, error)
        if loading["missing_keys"]:
            # transformers would go on with random weights.
            missing = sorted(loading["missing_keys"])
            raise RTPurboError(
                f"The files of the model {name} lack {len(missing)} weights, such as "
                f"{missing[0]}; fetch or save the model again."
            )
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
        except Exception as error:  # as above
            raise RTPurboError(
                f"The tokenizer of {name} cannot be loaded ({_first_line(error)}); "
                "put the tokenizer's files beside the model's."
            ) from error
    return model, tokenizer


def load_with_fingerprint(
    name: str,
    dtype: torch.dtype | Literal["auto"],
    *,
    sharding: Sharding | None = None,
    **options: Any,
) -> Loaded:
    """Loads a model as `load_pretrained` does; its fingerprint does not depend on `dtype`."""
    # A fingerprint rounds to bfloat16, so only float16, which has other values, would change it.
    narrow = dtype == torch.float16
    model, tokenizer = load_pretrained(
        name, "auto" if narrow else dtype, sharding=sharding, **options
    )
    found = fingerprint(model)
    if narrow and sharding is not None:
        # FSDP holds on to the parameters that it divided: read them again in the other type.
        del model
        model, tokenizer = load_pretrained(name, dtype, sharding=sharding, **options)
    elif narrow:
        # Not `model.half()`, which would round the frequencies of the rotary embedding as well.
        for parameter in model.parameters():
            parameter.data = parameter.data.half()
        model.config.dtype = torch.float16
    return Loaded(model, tokenizer, found)


@contextmanager
def quiet_transformers() -> Iterator[None]:
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


def _refuse(name: str, error: Exception) -> NoReturn:
    raise RTPurboError(
        f"The model {name} cannot be loaded ({_first_line(error)}); check that it is a causal "
        "language model that transformers knows without code of its own, and that its files are "
        "whole."
    ) from error


def _first_line(error: Exception) -> str:
    """The first line of an error's message, without its last full stop."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")

"""The package lm-eval, which is not among those that are installed with rtpurbo."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from rtpurbo.errors import RTPurboError


def lm_eval(module: str) -> Any:
    """A module of lm-eval, such as `evaluator`.

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

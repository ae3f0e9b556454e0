"""Devices, their names and default dtypes."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import Literal, TypeVar

import torch

from rtpurbo.errors import RTPurboError

DTYPES = ("auto", "float32", "bfloat16", "float16")
"""Dtypes of a base model's weights, as named by `--dtype`."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def resolve_device(name: str | torch.device = "auto") -> torch.device:
    """Returns the device of a name; `auto` is the first GPU, or the CPU if there is none.

    Raises:
        RTPurboError: the device is not available.
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
    """Returns the default dtype of inference: float32 on a CPU, else bfloat16."""
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def base_dtype(name: str, device: torch.device) -> torch.dtype | Literal["auto"]:
    """Returns the dtype in which a base model is loaded for training.

    Args:
        name: one of `DTYPES`; `auto` is the checkpoint's dtype on a GPU and float32 on a CPU.
        device: device of the model.

    Returns:
        The dtype, or "auto" for that of the checkpoint.

    Raises:
        RTPurboError: there is no such dtype.
    """
    if name not in DTYPES:
        raise RTPurboError(f"there is no dtype '{name}': choose one of {', '.join(DTYPES)}.")
    if name == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    dtype: torch.dtype = getattr(torch, name)
    return dtype


@cache
def has_triton() -> bool:
    """Returns True if Triton is installed."""
    return find_spec("triton") is not None


def device_name(device: torch.device) -> str:
    """Returns the name of a device in results, such as "NVIDIA H100 80GB HBM3" or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def device_kind(device: torch.device) -> str:
    """Returns the kind of a device, such as "cuda 9.0" or "cpu"; devices of one kind run the same kernels."""
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"cuda {major}.{minor}"


def may_lack_memory(error: RuntimeError) -> bool:
    """Returns True if an error may be caused by a lack of memory.

    On a full H100, cuDNN reports an internal error (docs/experiment-log.md).
    """
    return isinstance(error, torch.OutOfMemoryError) or "CUDNN_STATUS_INTERNAL_ERROR" in str(error)


def in_fitting_batches(
    batches: Iterable[Sequence[Item]], run: Callable[[Sequence[Item]], Result]
) -> Iterator[tuple[Sequence[Item], Result]]:
    """Yields batches with their results; where one may lack memory, it and all that follow are halved.

    Other processes may take the memory at any time. The error of a batch of one item is raised.
    """
    waiting = list(batches)
    while waiting:
        batch, half = waiting[0], len(waiting[0]) // 2
        try:
            result = run(batch)
        except RuntimeError as error:
            if not half or not may_lack_memory(error):
                raise
        else:
            yield batch, result
            del waiting[0]
            continue
        # Here, where the error and the tensors of its frames are gone.
        torch.cuda.empty_cache()
        waiting = [
            each[first : first + half] for each in waiting for first in range(0, len(each), half)
        ]

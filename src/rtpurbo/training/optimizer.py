"""Optimiser of both stages: AdamW with linear warm-up and cosine decay."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers.optimization import get_cosine_with_min_lr_schedule_with_warmup_lr_rate


def make_optimizer(
    parameters: Sequence[Tensor],
    learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
    steps: int,
) -> tuple[AdamW, LambdaLR]:
    """Returns AdamW and its schedule, to be stepped together; the cosine reaches 0 after the last of all `steps`."""
    # Fused operations do not support sharded and other parameters together; None is torch's default.
    is_mixed = len({isinstance(weight, DTensor) for weight in parameters}) > 1
    foreach = False if is_mixed else None
    optimizer = AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, foreach=foreach)
    # Unlike `get_cosine_schedule_with_warmup`, its first step does not have a learning rate of 0.
    return optimizer, get_cosine_with_min_lr_schedule_with_warmup_lr_rate(
        optimizer, warmup_steps + 1, steps + 1, min_lr_rate=0.0
    )

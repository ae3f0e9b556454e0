"""Optimiser of both stages: AdamW with linear warm-up and cosine decay."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR


def make_optimizer(
    parameters: Iterable[Tensor],
    learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
    steps: int,
) -> tuple[AdamW, LambdaLR]:
    """Returns AdamW and its schedule, to be stepped together; the cosine reaches 0 after the last of all `steps`.

    Unlike transformers' `get_cosine_schedule_with_warmup`, the first step does not have a learning rate of 0.
    """
    parameters = list(parameters)
    # Fused operations do not support sharded and other parameters together; None is torch's default.
    is_mixed = len({isinstance(weight, DTensor) for weight in parameters}) > 1
    foreach = False if is_mixed else None
    optimizer = AdamW(parameters, lr=learning_rate, weight_decay=weight_decay, foreach=foreach)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        done = (step - warmup_steps) / max(1, steps - warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))

    return optimizer, LambdaLR(optimizer, factor)

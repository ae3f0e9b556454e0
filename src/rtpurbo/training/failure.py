"""Report of a loss or gradient that is not finite, with the batch that caused it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from rtpurbo.errors import RTPurboError
from rtpurbo.files import save_tensors_atomically, write_json_atomically
from rtpurbo.models.sharding import own_part
from rtpurbo.processes import Processes


@dataclass(frozen=True)
class SequenceResult:
    """Loss and figures of one sequence in one step.

    Attributes:
        number: number of the sequence.
        input_ids: tokens of the sequence.
        loss: scalar without gradient.
        figures: further scalars by name; those that do not apply are left out.
    """

    number: int
    input_ids: Sequence[int]
    loss: Tensor
    figures: Mapping[str, Tensor] = field(default_factory=dict)


def not_finite(
    stage: str,
    step: int,
    results: Sequence[SequenceResult],
    parameters: Mapping[str, Tensor],
    norm: float,
    processes: Processes,
    folder: Path | None,
) -> RTPurboError:
    """Saves the sequences whose loss is not finite, or all of the step if only the gradient is not finite.

    All processes call this together. The main one writes `STAGE-step-N-not-finite.safetensors` into the
    folder, if there is one, with an int64 tensor of tokens for each sequence; and a JSON file of the same
    name: losses, the gradient's norm, and the weights whose gradient is not finite. Steps are counted from 1.

    Returns:
        Error to be raised on every process.
    """
    parts = processes.gather_objects(
        (
            [(result.number, float(result.loss), list(result.input_ids)) for result in results],
            [
                name
                for name, weight in parameters.items()
                if weight.grad is not None and not own_part(weight.grad).isfinite().all()
            ],
        )
    )
    everything = sorted(sequence for sequences, _ in parts for sequence in sequences)
    weights = sorted({name for _, names in parts for name in names})
    failed = [sequence for sequence in everything if not math.isfinite(sequence[1])]
    what = f"loss ({failed[0][1]})" if failed else f"gradient (norm {norm}, {len(weights)} weights)"
    failed = failed or everything
    numbers = ", ".join(str(number) for number, _, _ in failed)
    saved = ""
    if folder is not None:
        path = folder / f"{stage}-step-{step:06d}-not-finite.safetensors"
        saved = f"the batch is saved in {path}; "
        if processes.is_main:
            save_tensors_atomically(
                path, {f"input_ids.{number}": torch.tensor(ids) for number, _, ids in failed}
            )
            write_json_atomically(
                path.with_suffix(".json"),
                {
                    "stage": stage,
                    "step": step,
                    # JSON has no infinities and NaNs.
                    "losses": {str(number): str(loss) for number, loss, _ in everything},
                    "gradient_norm": str(norm),
                    "weights_with_a_gradient_not_finite": weights,
                },
            )
    return RTPurboError(
        f"{stage} stopped at step {step}, before its weights changed: the {what} of sequence "
        f"{numbers} is not finite; {saved}lower the learning rate and start again with --force."
    )

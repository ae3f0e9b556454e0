"""Signals that end an evaluation between two questions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from rtpurbo.interruption import StoppedBySignalError, steps_undisturbed, stop_requested
from rtpurbo.models.arguments import named


@contextmanager
def questions_undisturbed(model: PreTrainedModel, test: str) -> Iterator[None]:
    """Context in which a first signal waits until the model receives another prompt, or until the end.

    A case whose last questions are being answered is finished. A callback after each answer would not
    be sufficient, because a GPU answers several questions at once.

    Args:
        model: the model that answers.
        test: name of the case, for the message.

    Raises:
        StoppedBySignalError: a signal came.
    """

    def begin(module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        number = stop_requested()
        # One token continues an answer.
        if number is not None and named(module, arguments, keywords)["input_ids"].shape[1] > 1:
            raise StoppedBySignalError(number, f"in the test {test}")

    with steps_undisturbed():
        hook = model.base_model.register_forward_pre_hook(begin, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()
        if (number := stop_requested()) is not None:
            raise StoppedBySignalError(number, f"after the test {test}")

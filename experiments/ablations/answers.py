"""What a model makes of all questions, and what its rows read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from transformers import PreTrainedModel

from ablations.questions import PROSE, Asked, kinds_of, label_predictions
from rtpurbo.evaluation.policies.top_k import TopKSelector
from rtpurbo.evaluation.reads import ReadMeter
from rtpurbo.models.sparsify import counting, runtime, set_selector
from rtpurbo.training.teacher import top_logits_divergence


def answer_all(
    model: PreTrainedModel,
    asked: Sequence[Asked],
    *,
    selects: bool,
    budgets: Mapping[str, int] | None = None,
    exact: bool = False,
) -> dict[str, Any]:
    """Asks every question, each in one forward.

    The prompt is dense for retrieval heads; rows that write an answer or predict prose select as
    decoding steps do.

    Args:
        model: dense or sparse.
        asked: the questions.
        selects: whether rows select; else retrieval heads read everything.
        budgets: far tokens that every row reads, by kind of question, instead of the rule.
        exact: as in `label_predictions`.

    Returns:
        By kind of question, a value a question: `right` (each label is the likeliest token; not of
        prose), `divergence` from the teacher (nats a token), `loss` and the teacher's; and `reads`.
    """
    result: dict[str, Any] = {}
    for kind in kinds_of(asked):
        if budgets is not None:
            set_selector(model, TopKSelector(budgets[kind]))
        meter = ReadMeter(row_stride=8 if kind == PROSE else 1)
        meter.begin(None, measure=True)
        entry: dict[str, Any] = {
            "right": [], "divergence": [], "loss": [], "teacher_loss": []
        }  # fmt: skip
        with counting(model, meter) if selects else nullcontext():
            for one in asked:
                if one.question.kind != kind:
                    continue
                targets = one.targets.to(model.device)
                with (
                    runtime(model).decoding_last(one.question.selecting)
                    if selects
                    else nullcontext()
                ):
                    likeliest, found, labels = label_predictions(
                        model, one.question, targets.token_ids, exact=exact
                    )
                expected = likeliest.new_tensor(one.question.input_ids[-len(labels) :])
                entry["right"].append(bool((likeliest[:, 0] == expected).all()))
                entry["divergence"].append(float(top_logits_divergence(found, targets).mean()))
                entry["loss"].append(-float(labels.mean()))
                entry["teacher_loss"].append(one.loss)
        if kind == PROSE:
            del entry["right"]
        entry["reads"] = asdict(meter.reads()) if selects else None
        result[kind] = entry
    if budgets is not None:
        set_selector(model, None)
    return result

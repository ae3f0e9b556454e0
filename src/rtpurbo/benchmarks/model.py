"""Decode steps and prompts of whole models with random weights, dense and sparse."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from rtpurbo.benchmarks import dense_model, sdpa
from rtpurbo.benchmarks.decode import SELECTION_TOLERANCE, forced, forced_note
from rtpurbo.benchmarks.geometries import (
    build_model,
    draw_indexers,
    model_facts,
    spread_head_map,
)
from rtpurbo.benchmarks.session import Entry, Session, release
from rtpurbo.benchmarks.sparse_model import filled_cache, forcing_density
from rtpurbo.benchmarks.timing import Call, replayed
from rtpurbo.config import AttentionRule, RTPurboConfig
from rtpurbo.models.sparsify import counting, set_rule, sparsify
from rtpurbo.speed_records import stated_density

IMPLEMENTATIONS = ("rtpurbo", "rtpurbo-dense-retrieval", "sdpa-flash", "sdpa-cudnn")
# Tokens of the warm-up prompt, which runs all one-time work.
WARM_UP_TOKENS = 1024


@dataclass
class ModelCase:
    """Model to measure.

    Attributes:
        model: the model, dense at first.
        geometry: name of its shape.
        rules: attention rules of the sparse model, by phase.
        ratio: share of retrieval heads.
    """

    model: PreTrainedModel
    geometry: str
    rules: dict[str, AttentionRule]
    ratio: float = 0.15

    def __post_init__(self) -> None:
        self.head_map = spread_head_map(self.model.config, self.ratio)

    def facts(self, phase: str, length: int, batch: int, density: float) -> dict[str, Any]:
        """Record fields that are known before the measurement."""
        rule = self.rules[phase]
        return model_facts(
            phase, self.geometry, self.model, self.head_map, rule, length,
            batch_size=batch, density=round(density, 4), retrieval_window=rule.near_window,
        )  # fmt: skip

    def make_sparse(self) -> None:
        """Makes the model sparse, with random indexers."""
        sparsify(self.model, RTPurboConfig(self.head_map, next(iter(self.rules.values()))))
        draw_indexers(self.model)

    def tokens(self, batch: int, count: int) -> torch.Tensor:
        """Random tokens, int64 [batch, count]."""
        vocabulary = self.model.config.vocab_size
        return torch.randint(vocabulary, (batch, count), device=self.model.device)


def bench_model(
    session: Session,
    geometry: str,
    rules: dict[str, AttentionRule],
    lengths: Sequence[int],
    densities: dict[str, float],
    batches: Sequence[int],
    dtype: torch.dtype,
    layers: int | None = None,
) -> None:
    """Measures a model in each phase: first dense, then sparse.

    Args:
        session: measures the entries.
        geometry: name in `GEOMETRIES`.
        rules: attention rules of the sparse model for each phase to measure, "model-decode" and
            "model-prefill".
        lengths: tokens of the context.
        densities: density of retrieval heads in each phase.
        batches: batch sizes of decode steps; prompts have batch size 1.
        dtype: dtype of the weights.
        layers: number of layers; None for all.
    """
    session.log(f"{geometry}: initialising random weights")
    case = ModelCase(build_model(geometry, layers, dtype, session.device), geometry, rules)
    makers: dict[str, tuple[Any, Any]] = {
        "model-decode": (_dense_steps, _sparse_steps),
        "model-prefill": (_dense_prompts, _sparse_prompts),
    }
    for is_sparse in (False, True):
        if is_sparse:
            case.make_sparse()
        for phase in rules:
            for batch in sorted(batches) if phase == "model-decode" else [1]:
                for length in sorted(lengths):
                    density = densities[phase] if is_sparse else 1.0
                    with session.guarded(f"{phase} at {length:,} tokens"), torch.no_grad():
                        for entry in makers[phase][is_sparse](
                            session, case, length, batch, density
                        ):
                            session.run(entry)
                    release(session.device)


def _dense_steps(
    session: Session, case: ModelCase, length: int, batch: int, density: float
) -> Iterator[Entry]:
    for name in sdpa.BACKENDS:
        attentions = sdpa.step_attentions(name)
        yield Entry(
            name,
            {
                title: partial(_dense_step, case, length, batch, attend)
                for title, attend in attentions.items()
            },
            case.facts("model-decode", length, batch, density),
            growth=1,
            note=_step_note(session.device),
        )


def _dense_step(case: ModelCase, length: int, batch: int, attend: sdpa.Attention) -> Call:
    model = case.model
    cache = dense_model.full_cache(model, length, batch)
    ids = case.tokens(batch, 1)
    positions = torch.full_like(ids, length - 1)

    def step() -> Any:
        with dense_model.attending(model, attend):
            return model(ids, position_ids=positions, past_key_values=cache, use_cache=True).logits

    return replayed([step], model.device)


def _step_note(device: torch.device) -> str:
    return "CUDA graph" if device.type == "cuda" else ""


def _sparse_steps(
    session: Session, case: ModelCase, length: int, batch: int, density: float
) -> Iterator[Entry]:
    if not session.wants("rtpurbo"):
        return
    rule = forced(case.rules["model-decode"], density, length, "block")
    set_rule(case.model, **vars(rule))
    # Room for the first call, the check, the warm-up and the timed calls.
    cache = filled_cache(case.model, length - 2, batch, 2 * session.repeats + 64)
    ids = case.tokens(batch, 1)
    with counting(case.model) as statistics:
        case.model(ids, past_key_values=cache)
    far = max(0, length - rule.near_window - rule.num_sink_tokens) / length
    selected = far * (statistics.share_read or 0.0)
    stated = stated_density(density, selected, SELECTION_TOLERANCE)
    entry = Entry(
        "rtpurbo",
        {"": lambda: lambda: case.model(ids, past_key_values=cache).logits},
        case.facts("model-decode", length, batch, stated),
        is_ours=True,
        growth=1,
        note=forced_note(density, selected),
    )

    def check(call: Callable[[], Any]) -> str | None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logits = call()
        messages = [str(item.message) for item in caught if "CUDA graph" in str(item.message)]
        graphed = [_step_note(session.device)] if not messages else messages[:1]
        entry.note = "; ".join(filter(None, [entry.note, *graphed]))
        return _finite(logits)

    entry.check = check
    yield entry


def _finite(logits: torch.Tensor) -> str | None:
    return None if bool(logits.isfinite().all()) else "the logits are not finite"


def _dense_prompts(
    session: Session, case: ModelCase, length: int, batch: int, density: float
) -> Iterator[Entry]:
    for name in sdpa.BACKENDS:
        attentions = sdpa.prompt_attentions(name)
        yield Entry(
            name,
            {
                title: partial(_dense_prompt, case, length, attend)
                for title, attend in attentions.items()
            },
            case.facts("model-prefill", length, 1, density),
        )


def _dense_prompt(case: ModelCase, length: int, attend: sdpa.Attention) -> Call:
    def run(ids: torch.Tensor) -> Any:
        with dense_model.attending(case.model, attend):
            return _forward(case.model, ids)

    run(case.tokens(1, min(length, WARM_UP_TOKENS)))
    return partial(run, case.tokens(1, length))


def _forward(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=False, logits_to_keep=1).logits


def _sparse_prompts(
    session: Session, case: ModelCase, length: int, batch: int, density: float
) -> Iterator[Entry]:
    ids, rule = case.tokens(1, length), case.rules["model-prefill"]
    call = partial(_forward, case.model, ids)

    def check(run: Call) -> str | None:
        return _finite(run())

    if session.wants("rtpurbo-dense-retrieval"):
        set_rule(case.model, **vars(replace(rule, prefill_mode="dense")))
        yield Entry(
            "rtpurbo-dense-retrieval",
            {"": lambda: call},
            case.facts("model-prefill", length, 1, 1.0),
            check,
            is_ours=True,
        )
    if session.wants("rtpurbo"):
        set_rule(case.model, **vars(replace(rule, prefill_mode="row_peak")))
        with ExitStack() as stack:
            reached = stack.enter_context(forcing_density(case.model, density))
            logits = call()
            mean = sum(reached) / len(reached)
            yield Entry(
                "rtpurbo",
                {"": lambda: call},
                case.facts("model-prefill", length, 1, stated_density(density, mean, 0.05)),
                lambda run: _finite(logits),
                is_ours=True,
                note=f"block lists of density {density:g} computed before the timing",
            )

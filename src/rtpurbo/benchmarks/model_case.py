"""Decode steps and prompts of a whole model: its dense entries, and the loop that measures dense and sparse ones."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from rtpurbo.benchmarks import dense_model, sdpa
from rtpurbo.benchmarks.geometries import model_facts
from rtpurbo.benchmarks.session import Entry, Session, release
from rtpurbo.benchmarks.sparse_model import filled_cache
from rtpurbo.benchmarks.timing import Call, Measurement, replayed
from rtpurbo.config import AttentionRule, HeadMap
from rtpurbo.models.arguments import CACHE_NAME
from rtpurbo.models.sparse_layers import is_sparse

IMPLEMENTATIONS = ("rtpurbo", "rtpurbo-dense-retrieval", "sdpa-flash", "sdpa-cudnn")
# Share of the memory for weights and caches; the rest is for activations, as in vLLM's default.
USABLE_MEMORY = 0.9
# Tokens for which the cache of a sequence has room beyond its length.
ROOM = 64
# Tokens of the warm-up prompt, which runs all one-time work.
WARM_UP_TOKENS = 1024


@dataclass
class ModelCase:
    """Model to measure; a subclass makes it sparse and measures the sparse model.

    Attributes:
        model: the model, dense at first.
        name: name of the model in records.
        head_map: retrieval heads of the sparse model.
        rules: attention rules of the sparse model by phase, "model-decode" and "model-prefill".
    """

    model: PreTrainedModel
    name: str
    head_map: HeadMap
    rules: dict[str, AttentionRule]

    keeps_cache: ClassVar[bool] = False
    """True if prompts fill a cache for later decode steps."""

    def make_sparse(self) -> None:
        """Makes the model sparse."""
        raise NotImplementedError

    def sparse_steps(self, session: Session, length: int, batch: int) -> Iterator[Entry]:
        """Yields the entries of decode steps of the sparse model."""
        raise NotImplementedError

    def sparse_prompts(self, session: Session, length: int) -> Iterator[Entry]:
        """Yields the entries of prompts of the sparse model."""
        raise NotImplementedError

    def dense_steps(self, session: Session, length: int, batch: int) -> Iterator[Entry]:
        """Yields the entries of decode steps of the dense model.

        Caches are full of random states: dense attention reads every key, whatever its value.
        """
        for name in sdpa.BACKENDS:
            attentions = sdpa.step_attentions(name)
            yield Entry(
                name,
                {
                    title: partial(self._dense_step, length, batch, attend)
                    for title, attend in attentions.items()
                },
                self.facts("model-decode", length, batch, 1.0),
                growth=1,
                note=step_note(session.device),
                figures=partial(steps_figures, batch),
            )

    def dense_prompts(self, session: Session, length: int) -> Iterator[Entry]:
        """Yields the entries of prompts of the dense model."""
        for name in sdpa.BACKENDS:
            attentions = sdpa.prompt_attentions(name)
            yield Entry(
                name,
                {
                    title: partial(self._dense_prompt, length, attend)
                    for title, attend in attentions.items()
                },
                self.facts("model-prefill", length, 1, 1.0),
            )

    def facts(self, phase: str, length: int, batch: int, density: float) -> dict[str, Any]:
        """Record fields that are known before the measurement."""
        rule = self.rules[phase]
        return model_facts(
            phase, self.name, self.model, self.head_map, rule, length,
            batch_size=batch, density=round(density, 4), retrieval_window=rule.near_window,
        )  # fmt: skip

    def fitting_batch(self, length: int, memory_gb: float) -> int:
        """Number of sequences whose caches fit into `USABLE_MEMORY` of a memory in GB, together with the weights.

        Sizes are those of the tensors of a cache for one sequence.
        """
        if is_sparse(self.model):
            cache_bytes = filled_cache(self.model, length, 1, ROOM).num_bytes()
        else:
            layers = dense_model.full_cache(self.model, length, 1).layers
            cache_bytes = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
        weights = [*self.model.parameters(), *self.model.buffers()]
        free = USABLE_MEMORY * memory_gb * 1e9 - sum(weight.nbytes for weight in weights)
        return max(0, int(free // cache_bytes))

    def tokens(self, batch: int, count: int) -> torch.Tensor:
        """Random tokens, int64 [batch, count]."""
        vocabulary = self.model.config.vocab_size
        return torch.randint(vocabulary, (batch, count), device=self.model.device)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits [batch, 1, vocab_size] of the last token of prompts int64 [batch, length]."""
        return self.model(ids, use_cache=self.keeps_cache, logits_to_keep=1).logits

    def _dense_step(self, length: int, batch: int, attend: sdpa.Attention) -> Call:
        model = self.model
        cache = dense_model.full_cache(model, length, batch)
        ids = self.tokens(batch, 1)
        positions = torch.full_like(ids, length - 1)

        def step() -> Any:
            with dense_model.attending(model, attend):
                return model(
                    ids, position_ids=positions, **{CACHE_NAME: cache}, use_cache=True
                ).logits

        return replayed([step], model.device)

    def _dense_prompt(self, length: int, attend: sdpa.Attention) -> Call:
        def run(ids: torch.Tensor) -> Any:
            with dense_model.attending(self.model, attend):
                return self.forward(ids)

        run(self.tokens(1, min(length, WARM_UP_TOKENS)))
        return partial(run, self.tokens(1, length))


def measure_model(
    session: Session,
    case: ModelCase,
    lengths: Sequence[int],
    batches: Sequence[int],
    memory_gb: float | None = None,
) -> None:
    """Measures the phases that a case has rules for: first the dense model, then the sparse one.

    Args:
        session: measures the entries.
        case: the model.
        lengths: tokens of the context.
        batches: batch sizes of decode steps; prompts have batch size 1.
        memory_gb: also measure decode steps of as many sequences as fit into this memory, weights included;
            the dense and the sparse model then have different batch sizes.
    """
    for sparse in (False, True):
        if sparse:
            case.make_sparse()
        for length in sorted(lengths):
            if "model-decode" in case.rules:
                steps = case.sparse_steps if sparse else case.dense_steps
                for batch, limit in _batches(session, case, length, batches, memory_gb):
                    entries = steps(session, length, batch)
                    _run(session, entries, f"model-decode at {length:,}", limit)
                    del entries
                    release(session.device)
            if "model-prefill" in case.rules:
                prompts = case.sparse_prompts if sparse else case.dense_prompts
                _run(session, prompts(session, length), f"model-prefill at {length:,}")
                release(session.device)


def _batches(
    session: Session,
    case: ModelCase,
    length: int,
    batches: Sequence[int],
    memory_gb: float | None,
) -> list[tuple[int, float | None]]:
    """Batch sizes of decode steps, each with the memory in GB that it fills; None for given ones."""
    chosen: dict[int, float | None] = dict.fromkeys(sorted(batches))
    if memory_gb is not None:
        fitting = case.fitting_batch(length, memory_gb)
        if fitting:
            chosen[fitting] = memory_gb
        else:
            session.note(f"not one sequence of {length:,} tokens fits into {memory_gb:g} GB")
    return list(chosen.items())


def _run(
    session: Session, entries: Iterator[Entry], title: str, memory_gb: float | None = None
) -> None:
    with session.guarded(f"{title} tokens"), torch.no_grad():
        for entry in entries:
            if memory_gb is not None:
                entry.facts["memory_gb"] = memory_gb
            session.run(entry)


def steps_figures(batch: int, found: Measurement) -> dict[str, Any]:
    """Record fields of decode steps that are computed from the measurement."""
    return {"tokens_per_second": round(1000 * batch / found.milliseconds, 1)}


def step_note(device: torch.device) -> str:
    """Note of a decode step that runs in a CUDA graph."""
    return "CUDA graph" if device.type == "cuda" else ""


def sparse_step_entry(case: ModelCase, call: Call, facts: dict[str, Any], note: str) -> Entry:
    """Entry of decode steps of a sparse model, which captures its own CUDA graph in the first call."""
    entry = Entry(
        "rtpurbo",
        {"": lambda: call},
        facts,
        is_ours=True,
        growth=1,
        note=note,
        figures=partial(steps_figures, facts["batch_size"]),
    )

    def check(call: Callable[[], Any]) -> str | None:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            logits = call()
        messages = [str(item.message) for item in caught if "CUDA graph" in str(item.message)]
        graphed = messages[0] if messages else step_note(case.model.device)
        entry.note = "; ".join(filter(None, [entry.note, graphed]))
        return not_finite(logits)

    entry.check = check
    return entry


def selected_share(rule: AttentionRule, length: int, share_read: float | None) -> float:
    """Share of all keys that retrieval heads select in a step, from that of the far keys (None without any)."""
    far = max(0, length - rule.near_window - rule.num_sink_tokens) / length
    return far * (share_read or 0.0)


def not_finite(logits: torch.Tensor) -> str | None:
    """Complaint about logits that are not finite; None if they are."""
    return None if bool(logits.isfinite().all()) else "the logits are not finite"

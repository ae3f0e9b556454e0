"""Decode steps and prompts of models of published shapes with random weights, at forced densities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from rtpurbo.benchmarks.decode import SELECTION_TOLERANCE, forced, forced_note
from rtpurbo.benchmarks.geometries import build_model, draw_indexers, spread_head_map
from rtpurbo.benchmarks.model_case import (
    ModelCase,
    measure_model,
    not_finite,
    selected_share,
    sparse_step_entry,
)
from rtpurbo.benchmarks.session import Entry, Session
from rtpurbo.benchmarks.sparse_model import filled_cache, forcing_density
from rtpurbo.config import AttentionRule, RTPurboConfig
from rtpurbo.models.arguments import CACHE_NAME
from rtpurbo.models.sparsify import sparsify
from rtpurbo.speed_records import stated_density

RATIO = 0.15


@dataclass
class RandomModel(ModelCase):
    """Model with random weights, indexers and caches.

    Attributes:
        densities: forced density of retrieval heads by phase.
    """

    densities: dict[str, float] = field(default_factory=dict)

    def make_sparse(self) -> None:
        """Makes the model sparse, with random indexers."""
        sparsify(self.model, RTPurboConfig(self.head_map, next(iter(self.rules.values()))))
        draw_indexers(self.model)

    def sparse_steps(self, session: Session, length: int, batch: int) -> Iterator[Entry]:
        """Yields decode steps that select a forced share of the keys of a random cache."""
        if not session.wants("rtpurbo"):
            return
        density = self.densities["model-decode"]
        rule = forced(self.rules["model-decode"], density, length, "block")
        self.model.rtpurbo.set_rule(**vars(rule))
        # Room for the first call, the check, the warm-up and the timed calls.
        cache = filled_cache(self.model, length - 2, batch, 2 * session.repeats + 64)
        ids = self.tokens(batch, 1)
        with self.model.rtpurbo.counting() as statistics:
            self.model(ids, **{CACHE_NAME: cache})
        selected = selected_share(rule, length, statistics.share_read)
        stated = stated_density(density, selected, SELECTION_TOLERANCE)
        yield sparse_step_entry(
            self,
            lambda: self.model(ids, **{CACHE_NAME: cache}).logits,
            self.facts("model-decode", length, batch, stated),
            forced_note(density, selected),
        )

    def sparse_prompts(self, session: Session, length: int) -> Iterator[Entry]:
        """Yields prompts with dense retrieval heads, and with block lists of a forced density."""
        ids, rule = self.tokens(1, length), self.rules["model-prefill"]
        density = self.densities["model-prefill"]

        def call() -> torch.Tensor:
            return self.forward(ids)

        if session.wants("rtpurbo-dense-retrieval"):
            self.model.rtpurbo.set_rule(**vars(replace(rule, prefill_mode="dense")))
            yield Entry(
                "rtpurbo-dense-retrieval",
                {"": lambda: call},
                self.facts("model-prefill", length, 1, 1.0),
                lambda run: not_finite(run()),
                is_ours=True,
            )
        if session.wants("rtpurbo"):
            self.model.rtpurbo.set_rule(**vars(replace(rule, prefill_mode="row_peak")))
            with forcing_density(self.model, density) as reached:
                logits = call()
                stated = stated_density(density, sum(reached) / len(reached), 0.05)
                yield Entry(
                    "rtpurbo",
                    {"": lambda: call},
                    self.facts("model-prefill", length, 1, stated),
                    lambda run: not_finite(logits),
                    is_ours=True,
                    note=f"block lists of density {density:g} computed before the timing",
                )


def bench_model(
    session: Session,
    geometry: str,
    rules: dict[str, AttentionRule],
    lengths: Sequence[int],
    densities: dict[str, float],
    batches: Sequence[int],
    dtype: torch.dtype,
    layers: int | None = None,
    memory_gb: float | None = None,
) -> None:
    """Measures a model with random weights in each phase that has a rule: first dense, then sparse.

    Rules and densities are given by phase, "model-decode" and "model-prefill"; other arguments as in `build_model` and
    `measure_model`.
    """
    session.log(f"{geometry}: initialising random weights")
    model = build_model(geometry, layers, dtype, session.device)
    head_map = spread_head_map(model.config, RATIO)
    case = RandomModel(model, geometry, head_map, rules, densities)
    measure_model(session, case, lengths, batches, memory_gb)

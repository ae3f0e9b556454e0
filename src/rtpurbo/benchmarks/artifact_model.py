"""Decode steps and prompts of a converted model: its own weights, rule and head map, over held-out text."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rtpurbo.benchmarks.model_case import (
    ModelCase,
    measure_model,
    not_finite,
    selected_share,
    sparse_step_entry,
)
from rtpurbo.benchmarks.session import Entry, Session
from rtpurbo.benchmarks.sparse_model import read_prompts
from rtpurbo.benchmarks.timing import max_calls
from rtpurbo.config import RTPurboConfig
from rtpurbo.data.texts import TextCorpus, draw_passages, load_texts
from rtpurbo.errors import RTPurboError
from rtpurbo.models.architecture import context_length, convertible_layers, layer_types
from rtpurbo.models.arguments import CACHE_NAME
from rtpurbo.models.artifact import load
from rtpurbo.models.artifact_config import find_artifact
from rtpurbo.models.sparse_layers import indexer_weights, load_indexers
from rtpurbo.models.sparsify import restore, sparsify
from rtpurbo.ops.states import SelectionStatistics

LENGTHS = (8192, 32768, 131072)
# Decode steps whose selections are counted, before the timed ones.
COUNTED_STEPS = 16
# Different passages of a batch; sequences beyond them repeat the passages, which would take long to read.
MAX_PASSAGES = 32


def num_steps(session: Session) -> int:
    """Decode steps of one measurement: those that are counted, and those that are checked and timed."""
    return COUNTED_STEPS + max_calls(session.repeats)


@dataclass
class HeldOutText:
    """Token ids of held-out documents, a different passage for each sequence.

    Attributes:
        corpus: the documents.
        tokenizer: tokenizer of the model.
        length: tokens of a passage.
    """

    corpus: TextCorpus
    tokenizer: PreTrainedTokenizerBase
    length: int
    _passages: list[list[int]] = field(default_factory=list)
    _rng: random.Random = field(default_factory=lambda: random.Random(0))

    def passages(self, count: int, length: int) -> Tensor:
        """Returns the first `length` tokens of `count` passages, int64 [count, length].

        Raises:
            RTPurboError: the corpus is shorter than a passage, or has too few different ones.
        """
        self._passages = draw_passages(
            self.tokenizer, self.corpus, self.length, count, self._rng, self._passages
        )
        return torch.tensor([passage[:length] for passage in self._passages[:count]])


@dataclass
class ArtifactModel(ModelCase):
    """Converted model that reads held-out text under its own rule.

    Attributes:
        config: head map, rule and indexer settings.
        indexers: weights of the indexers.
        text: prompts, and the tokens of the decode steps after them.
    """

    config: RTPurboConfig
    indexers: dict[str, Tensor]
    text: HeldOutText

    keeps_cache = True

    def make_sparse(self) -> None:
        """Makes the model sparse, with its trained indexers."""
        sparsify(self.model, self.config)
        load_indexers(self.model, self.indexers)

    def sparse_steps(self, session: Session, length: int, batch: int) -> Iterator[Entry]:
        """Yields decode steps that read the last tokens of the passages, up to `length` tokens.

        Dense steps all run at `length` tokens.
        """
        if not session.wants("rtpurbo"):
            return
        first = length - num_steps(session)
        different = min(batch, MAX_PASSAGES)
        passages = self.text.passages(different, length).to(self.model.device)
        session.log(f"{self.name}: reading {different} prompts of {first:,} tokens")
        cache = read_prompts(self.model, passages[:, :first], length, batch)
        ids = passages[torch.arange(batch, device=passages.device) % different]

        def step() -> Tensor:
            position = cache.get_seq_length()
            token = ids[:, position : position + 1]
            return self.model(token, **{CACHE_NAME: cache}).logits

        with self.model.rtpurbo.counting() as statistics:
            for _ in range(COUNTED_STEPS):
                step()
        selected = selected_share(self.rules["model-decode"], length, statistics.share_read)
        yield sparse_step_entry(
            self,
            step,
            self.facts("model-decode", length, batch, selected),
            f"own rule on held-out text (distinct prompts: {different}); "
            f"{100 * selected:.3g} % of the keys selected",
        )

    def sparse_prompts(self, session: Session, length: int) -> Iterator[Entry]:
        """Yields a prompt of held-out text, with dense or sparse retrieval heads as the rule says."""
        is_dense = self.rules["model-prefill"].prefill_mode == "dense"
        name = "rtpurbo-dense-retrieval" if is_dense else "rtpurbo"
        if not session.wants(name):
            return
        ids = self.text.passages(1, length).to(self.model.device)
        with self.model.rtpurbo.counting() as statistics:
            logits = self.forward(ids)
        density = 1.0 if is_dense else self._prompt_density(length, statistics)
        yield Entry(
            name,
            {"": lambda: lambda: self.forward(ids)},
            self.facts("model-prefill", length, 1, density),
            lambda call: not_finite(logits),
            is_ours=True,
            note="own rule on held-out text",
        )

    def _prompt_density(self, length: int, statistics: SelectionStatistics) -> float:
        """Share of the causal keys that retrieval heads read in a prompt, near ones included."""
        skipped = statistics.far_keys - statistics.far_keys_read
        causal = self.head_map.num_retrieval_heads * length * (length + 1) / 2
        return 1.0 - skipped / causal if causal else 1.0


def bench_artifact(
    session: Session,
    artifact: str | Path,
    phases: Sequence[str],
    lengths: Sequence[int] | None,
    batches: Sequence[int],
    dtype: torch.dtype,
    data: Sequence[str] | None = None,
    base_model: str | None = None,
    memory_gb: float | None = None,
) -> None:
    """Measures a converted model in each phase ("decode", "prefill"): first dense, then sparse under its own rule.

    Lengths are usual ones within the model's context if None; other arguments as in `measure_model` and
    `rtpurbo.models.artifact.load`.

    Raises:
        RTPurboError: the artifact or the text cannot be used, or a length exceeds the model's context.
    """
    folder = find_artifact(artifact)
    corpus = load_texts(list(data) if data else None, "heldout")
    name = folder.resolve().name if Path(artifact).is_dir() else str(artifact)
    session.log(f"{name}: loading the model")
    model, tokenizer = load(folder, base_model=base_model, device=session.device, dtype=dtype)
    if not all(convertible_layers(model.config)) or "hybrid" in layer_types(model.config):
        raise RTPurboError(
            f"{artifact} has layers without full attention, which `bench model` cannot run at full "
            "speed in the dense model; use a model whose layers all have full attention."
        )
    limit = context_length(model.config)
    lengths = lengths or [length for length in LENGTHS if length <= limit] or [limit]
    if max(lengths) > limit:
        raise RTPurboError(
            f"--length {max(lengths)} is above the context of {artifact}, {limit} tokens; use a "
            "shorter one."
        )
    if "decode" in phases and min(lengths) <= num_steps(session):
        raise RTPurboError(
            f"--length {min(lengths)} leaves no prompt before the {num_steps(session)} decode steps of "
            "a measurement; use a longer one."
        )
    text = HeldOutText(corpus, tokenizer, max(lengths))
    most = max(batches) if memory_gb is None else MAX_PASSAGES
    text.passages(min(most, MAX_PASSAGES) if "decode" in phases else 1, max(lengths))
    config, indexers = model.rtpurbo_config, indexer_weights(model)
    rules = {f"model-{phase}": config.attention for phase in phases}
    case = ArtifactModel(
        restore(model), f"artifact {name}", config.head_map, rules, config, indexers, text
    )
    measure_model(session, case, lengths, batches, memory_gb)

"""Runtime settings of a sparse model: context managers that change how its attention runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from rtpurbo.config import AttentionRule
from rtpurbo.ops import SelectionStatistics


class Runtime:
    """Context managers over the sparse attention layers of one model, as `model.rtpurbo`.

    They nest in any combination, also within themselves: each restores what it found. `layers` are in order.
    """

    def __init__(self, model: Any, layers: Sequence[Any]) -> None:
        self._model = model
        self._layers = list(layers)

    def set_rule(self, **changes: Any) -> None:
        """Changes fields of the attention rule permanently: `set_rule(top_p=0.9)`."""
        self._apply_rule(self._model.rtpurbo_config.with_rule(**changes).attention)

    @contextmanager
    def rule(self, **changes: Any) -> Iterator[None]:
        """Changes fields of the attention rule inside a `with` block, such as `top_p=0.9`."""
        before = self._model.rtpurbo_config.attention
        self.set_rule(**changes)
        try:
            yield
        finally:
            self._apply_rule(before)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Runs dense attention, as in the original model, without a cache."""
        with self._layers_with(dense=True):
            yield

    @contextmanager
    def counting(
        self, statistics: SelectionStatistics | None = None
    ) -> Iterator[SelectionStatistics]:
        """Counts the keys that retrieval heads select inside a `with` block.

        Args:
            statistics: collects the counts; None creates `SelectionStatistics`.
        """
        statistics = SelectionStatistics() if statistics is None else statistics
        with self._layers_with(statistics=statistics):
            yield statistics

    @contextmanager
    def decoding_last(self, num_decode_queries: int) -> Iterator[None]:
        """Lets the last queries of every forward select as decode steps do, while the others are dense.

        Training then computes in one forward what `generate` does: a dense prompt and a sparse answer.
        """
        with self._layers_with(num_decode_queries=num_decode_queries):
            yield

    @contextmanager
    def keeping_prompt(self, length: int) -> Iterator[Mapping[int, Any]]:
        """Keeps the keys and values of the first tokens of a dense forward, for `gated`.

        Args:
            length: number of the tokens.

        Yields:
            Keys and values by layer, after the forward.
        """
        kept: dict[int, Any] = {}
        with self._layers_with(kept_prompt=(length, kept)):
            yield kept

    @contextmanager
    def gated(
        self,
        gates: Mapping[int, Tensor],
        answer_spans: Sequence[tuple[int, int]] | None = None,
        prompt: Mapping[int, Any] | None = None,
    ) -> Iterator[None]:
        """Mixes full and windowed attention of every head by a gate.

        The model must have no retrieval heads, and runs without a cache.

        Args:
            gates: by layer, [num_key_value_heads] or [num_attention_heads]: 1 is full, 0 windowed.
            answer_spans: first query and end of each answer, ascending; other queries are dense, whatever the
                gates are. None for gates that act on all queries.
            prompt: keys and values by layer, from `keeping_prompt`, if the forward only has the tokens after them.
        """
        with attributes_set(
            (
                layer,
                {
                    "gates": gates[layer.layer_idx],
                    "answer_spans": answer_spans,
                    "prompt": prompt[layer.layer_idx] if prompt else None,
                },
            )
            for layer in self._layers
        ):
            yield

    @contextmanager
    def packed(self, document_lengths: Sequence[int] | None) -> Iterator[None]:
        """Separates the documents of a packed sequence in dense attention.

        The forward needs their `position_ids` too.

        Args:
            document_lengths: tokens of each document; None for one document.
        """
        lengths = None if document_lengths is None else tuple(document_lengths)
        with self._layers_with(document_lengths=lengths):
            yield

    @contextmanager
    def observed(self, observer: Callable[[Any], None], *, dense: bool = True) -> Iterator[None]:
        """Calls `observer` with the queries and keys of every layer.

        Args:
            observer: called with a `LayerObservation` for each layer and forward.
            dense: run dense attention; False runs sparse attention.
        """
        changes: dict[str, Any] = {"observer": observer, **({"dense": True} if dense else {})}
        with self._layers_with(**changes):
            yield

    def _apply_rule(self, rule: AttentionRule) -> None:
        self._model.rtpurbo_config = self._model.rtpurbo_config.with_rule(**vars(rule))
        for layer in self._layers:
            layer.rule = rule.for_layer(layer.layer_idx)

    @contextmanager
    def _layers_with(self, **values: Any) -> Iterator[None]:
        """Sets attributes of all layers inside a `with` block."""
        with attributes_set((layer, values) for layer in self._layers):
            yield


@contextmanager
def attributes_set(changes: Iterable[tuple[Any, Mapping[str, Any]]]) -> Iterator[None]:
    """Sets attributes of objects inside a `with` block, and restores them."""
    changes = list(changes)
    before = [(item, {name: getattr(item, name) for name in values}) for item, values in changes]
    _assign(changes)
    try:
        yield
    finally:
        _assign(before)


def _assign(changes: Iterable[tuple[Any, Mapping[str, Any]]]) -> None:
    for item, values in changes:
        for name, value in values.items():
            setattr(item, name, value)

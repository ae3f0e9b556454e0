"""Configuration of a sparse model: head map, attention rule, indexer settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from rtpurbo.errors import RTPurboError
from rtpurbo.validation import check_at_least, check_choice, check_fields

Reading = Literal["paper", "residual", "far"]
Granularity = Literal["token", "block"]
PrefillMode = Literal["dense", "top_p", "row_share", "row_peak"]
IndexStorage = Literal["model", "float8"]
IndexSpace = Literal["pre_rope", "post_rope", "low_frequency"]
HeadGranularity = Literal["query_head", "kv_group"]


MAX_INDEX_DIM = 1024
"""Upper limit of `index_dim`, above the size of any head."""

DEFAULT_CROP_SLACK = 64
"""Slots of a windowed KV head beyond sinks and window: tokens that can be taken back (assisted decoding)."""


@dataclass(frozen=True)
class AttentionRule:
    """Rule that decides which keys a query attends to.

    Attributes:
        num_sink_tokens: number S of sink keys 0..S-1, which every query attends to.
        sliding_window: number W of the most recent keys, including the query's own.
        top_p: mass that the indexer's selection must reach, in (0, 1]; 1 selects every key.
        layer_top_p: the same for each layer, in place of `top_p`; None for layers that are not converted.
        reading: distribution that top-p applies to; see `rtpurbo.ops.eager.selection`.
        far_floor: with reading `far`, a query whose estimated far mass is below this selects nothing.
        min_tokens: minimum number of far tokens that a query selects, whatever their mass (with blocks:
            the number of blocks that hold so many tokens).
        granularity: unit of a query's own selection: tokens, or blocks of keys.
        block_size: keys in a block; blocks are aligned to position 0.
        prefill_mode: attention of retrieval heads for more than one query: `dense` (the paper), `top_p`
            (a selection for each query), or one block list for each query block: `row_share` selects
            blocks by mass, `row_peak` by their maximum score (faster: no exponential for each key).
        query_block_size: queries that share a block list under `row_share` and `row_peak`.
        row_share: a block is listed if any query of the query block gives it this share of its mass.
        row_stride: stride of the queries of a query block that are evaluated; the last query of the
            prompt is always among them.
        retrieval_window: window of retrieval heads, which select earlier keys by their index;
            None: `sliding_window`.
        dense_prompt_tokens: length up to which all queries of a prompt are dense in local heads, which then read
            every key, not only sinks and window; in a longer prompt of P tokens, its last dense_prompt_tokens^2 / P
            queries, which cost at most twice as much.
            With transformers, it applies to a prompt that is read in one forward: in later chunks, windowed KV heads
            no longer hold the keys. vLLM keeps them until the prompt has been read.
        dense_prompt_queries: minimum number of these last queries.
        num_heavy_hitters: number of the last sinks of a windowed KV head that are replaced, once a prompt has been
            read, by those of its tokens that its last queries attend to most; see
            `rtpurbo.ops.eager.heavy_hitters`. It needs dense queries and, with transformers, applies to the
            same prompts.
        index_storage: dtype of cached index keys: `model`, the dtype of the model; or `float8`, which
            halves their size and the reads of a decode step, with less precise scores.
    """

    num_sink_tokens: int = 4
    sliding_window: int = 8192
    top_p: float = 0.9
    reading: Reading = "residual"
    far_floor: float = 0.05
    min_tokens: int = 128
    granularity: Granularity = "token"
    block_size: int = 64
    prefill_mode: PrefillMode = "dense"
    query_block_size: int = 128
    row_share: float = 0.125
    row_stride: int = 1
    retrieval_window: int | None = None
    index_storage: IndexStorage = "model"
    dense_prompt_tokens: int = 0
    dense_prompt_queries: int = 0
    num_heavy_hitters: int = 0
    layer_top_p: tuple[float | None, ...] | None = None

    def __post_init__(self) -> None:
        if self.layer_top_p is not None:
            object.__setattr__(self, "layer_top_p", tuple(self.layer_top_p))
        shares = [("top_p", self.top_p), ("row_share", self.row_share)]
        shares += [("layer_top_p", one) for one in self.layer_top_p or () if one is not None]
        for name, share in shares:
            if not 0 < share <= 1:
                raise RTPurboError(f"{name} is {share}, but it must be above 0 and at most 1.")
        if not 0 <= self.far_floor < 1:
            raise RTPurboError(
                f"far_floor is {self.far_floor}, but it must be at least 0 and below 1."
            )
        check_at_least(1, self, "block_size", "query_block_size", "retrieval_window")
        check_at_least(
            0, self, "min_tokens", "num_sink_tokens", "dense_prompt_tokens", "dense_prompt_queries",
            "num_heavy_hitters",
        )  # fmt: skip
        if self.num_heavy_hitters > self.num_sink_tokens:
            raise RTPurboError(
                f"num_heavy_hitters is {self.num_heavy_hitters}, but they are stored in the places of sinks, of which "
                f"there are {self.num_sink_tokens}: raise num_sink_tokens."
            )
        if self.num_heavy_hitters and not self.has_dense_queries:
            raise RTPurboError(
                "num_heavy_hitters needs dense_prompt_tokens or dense_prompt_queries above 0: they are the tokens "
                "that the last queries of a prompt attend to."
            )
        if self.sliding_window < self.block_size:
            raise RTPurboError(
                f"sliding_window ({self.sliding_window}) is smaller than block_size "
                f"({self.block_size}): choose a window of at least one block."
            )
        if self.row_stride < 1 or self.query_block_size % self.row_stride:
            raise RTPurboError(
                f"row_stride is {self.row_stride}, but it must divide query_block_size "
                f"({self.query_block_size})."
            )
        check_choice("reading", self.reading, Reading)
        check_choice("granularity", self.granularity, Granularity)
        check_choice("prefill_mode", self.prefill_mode, PrefillMode)
        check_choice("index_storage", self.index_storage, IndexStorage)

    def for_layer(self, layer: int) -> AttentionRule:
        """Returns the rule of one layer."""
        if self.layer_top_p is None:
            return self
        return replace(self, top_p=self.layer_top_p[layer] or self.top_p, layer_top_p=None)

    @property
    def num_fixed_sinks(self) -> int:
        """Number of first sinks, which heavy hitters do not replace."""
        return self.num_sink_tokens - self.num_heavy_hitters

    @property
    def has_dense_queries(self) -> bool:
        """True if the last queries of a prompt are dense in local heads."""
        return self.dense_prompt_tokens > 0 or self.dense_prompt_queries > 0

    def num_dense_queries(self, prompt_length: int) -> int:
        """Returns how many of the last queries of a prompt are dense in local heads."""
        of_longer = self.dense_prompt_tokens**2 // max(1, prompt_length)
        return min(prompt_length, max(self.dense_prompt_queries, of_longer))

    @property
    def near_window(self) -> int:
        """Window of retrieval heads."""
        return self.retrieval_window or self.sliding_window

    def num_selecting_queries(self, num_queries: int, num_decode_queries: int = 0) -> int:
        """Returns how many of the last queries select keys; retrieval heads are dense for the others.

        Args:
            num_queries: queries of this call; a single one is a decode step.
            num_decode_queries: number of last queries of a prefill that select as decode steps do.
        """
        if num_queries == 1 or self.prefill_mode != "dense":
            return num_queries
        return min(num_decode_queries, num_queries)


HeadCounts = int | tuple[int | None, ...]
"""Number of heads of every layer, or a number for each layer where converted layers differ."""


@dataclass(frozen=True)
class HeadMap:
    """Retrieval heads of each layer, and the scores that selected them.

    Attributes:
        retrieval_heads: for each layer, the query heads that need the whole context, ascending.
            None for a layer that is not converted.
        num_attention_heads: number of query heads of a layer; where layers differ, a tuple with a number
            for each layer, None if it is not converted. A tuple of equal numbers becomes one number.
        num_key_value_heads: number of KV heads of a layer, in the same form.
        scores: for each layer, the retrieval score of each query head (paper: head calibration).
        granularity: unit of the selection: single query heads or whole KV groups.
    """

    retrieval_heads: tuple[tuple[int, ...] | None, ...]
    num_attention_heads: HeadCounts
    num_key_value_heads: HeadCounts
    scores: tuple[tuple[float, ...] | None, ...] = ()
    granularity: HeadGranularity = "query_head"

    def __post_init__(self) -> None:
        for name in ("num_attention_heads", "num_key_value_heads"):
            object.__setattr__(self, name, self._simplified(name, getattr(self, name)))
        for layer, heads in enumerate(self.retrieval_heads):
            count = self.num_query_heads(layer)
            if heads and not all(0 <= head < count for head in heads):
                raise RTPurboError(
                    f"the head map names heads {list(heads)} in layer {layer}, "
                    f"but the model has {count} query heads a layer."
                )

    def _simplified(self, name: str, counts: HeadCounts) -> HeadCounts:
        """Returns a single number if all converted layers have the same number of heads."""
        if isinstance(counts, int):
            return counts
        converted = [heads is not None for heads in self.retrieval_heads]
        if [count is not None for count in counts] != converted:
            raise RTPurboError(
                f"{name} is {list(counts)}, but it must have a number for each of the "
                f"{sum(converted)} converted layers and null for the others."
            )
        distinct = {count for count in counts if count is not None}
        return distinct.pop() if len(distinct) == 1 else tuple(counts)

    @classmethod
    def uniform(
        cls,
        heads: Sequence[int],
        layers: Sequence[bool],
        num_attention_heads: int,
        num_key_value_heads: int,
    ) -> HeadMap:
        """Returns a map with the same retrieval heads in every converted layer.

        Args:
            heads: query heads.
            layers: for each layer, True if it is converted.
            num_attention_heads: query heads of a layer.
            num_key_value_heads: KV heads of a layer.
        """
        chosen = tuple(sorted(heads))
        return cls(
            tuple(chosen if converted else None for converted in layers),
            num_attention_heads,
            num_key_value_heads,
        )

    @property
    def num_retrieval_heads(self) -> int:
        """Total number of retrieval heads."""
        return sum(len(heads or ()) for heads in self.retrieval_heads)

    @property
    def converted_layers(self) -> list[int]:
        """Layers that are converted, ascending."""
        return [layer for layer, heads in enumerate(self.retrieval_heads) if heads is not None]

    @property
    def num_heads(self) -> int:
        """Total number of query heads of converted layers."""
        return sum(map(self.num_query_heads, self.converted_layers))

    @property
    def num_full_key_value_heads(self) -> int:
        """Total number of full KV heads, which serve a retrieval head."""
        return sum(
            len(self.full_key_value_heads(layer)) for layer in range(len(self.retrieval_heads))
        )

    @property
    def is_uniform(self) -> bool:
        """True if all converted layers have the same numbers of heads."""
        return isinstance(self.num_attention_heads, int) and isinstance(
            self.num_key_value_heads, int
        )

    def num_query_heads(self, layer: int) -> int:
        """Returns the number of query heads of a layer; 0 for an unconverted layer if layers differ."""
        counts = self.num_attention_heads
        return counts if isinstance(counts, int) else counts[layer] or 0

    def num_kv_heads(self, layer: int) -> int:
        """Returns the number of KV heads of a layer; 0 for an unconverted layer if layers differ."""
        counts = self.num_key_value_heads
        return counts if isinstance(counts, int) else counts[layer] or 0

    def group_size(self, layer: int) -> int:
        """Returns the number of query heads that share a KV head in a converted layer."""
        return self.num_query_heads(layer) // self.num_kv_heads(layer)

    def full_key_value_heads(self, layer: int) -> list[int]:
        """Returns the KV heads of `layer` that serve at least one retrieval head."""
        heads = self.retrieval_heads[layer]
        return sorted({head // self.group_size(layer) for head in heads}) if heads else []


@dataclass(frozen=True)
class IndexerSettings:
    """Settings of the token indexer.

    Attributes:
        index_dim: dimensions of an index query and an index key.
        index_space: input of the projection: `pre_rope` (the paper), `post_rope`, or `low_frequency`, the
            rotary pairs whose wavelength is at least `min_wavelength`, after RoPE.
        min_wavelength: in tokens; None until conversion fixes it to the model's context length.
        shared_keys: one index key for each full KV head, shared by its retrieval heads, instead of one
            for each retrieval head.
    """

    index_dim: int = 16
    index_space: IndexSpace = "low_frequency"
    min_wavelength: float | None = None
    shared_keys: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.index_dim <= MAX_INDEX_DIM:
            raise RTPurboError(
                f"index_dim is {self.index_dim}, but it must be from 1 to {MAX_INDEX_DIM}."
            )
        if self.min_wavelength is not None and not 0 < self.min_wavelength < math.inf:
            raise RTPurboError(
                f"min_wavelength is {self.min_wavelength}, but it must be above 0 and finite."
            )
        check_choice("index_space", self.index_space, IndexSpace)


@dataclass(frozen=True)
class RTPurboConfig:
    """Configuration that makes a given dense model sparse, without trained weights."""

    head_map: HeadMap
    attention: AttentionRule = field(default_factory=AttentionRule)
    indexer: IndexerSettings = field(default_factory=IndexerSettings)

    def __post_init__(self) -> None:
        by_layer, layers = self.attention.layer_top_p, len(self.head_map.retrieval_heads)
        if by_layer is not None and len(by_layer) != layers:
            raise RTPurboError(
                f"layer_top_p has {len(by_layer)} values, but the model has {layers} layers."
            )

    def with_rule(self, **changes: Any) -> RTPurboConfig:
        """Returns a copy with changed fields of the attention rule; a `top_p` applies to every layer."""
        if "top_p" in changes:
            changes = {"layer_top_p": None, **changes}
        return replace(self, attention=replace(self.attention, **changes))

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> RTPurboConfig:
        """Reads the output of `to_dict`.

        Raises:
            RTPurboError: a field is missing, unknown or out of range.
        """
        try:
            check_fields(AttentionRule, data["attention"])
            check_fields(IndexerSettings, data["indexer"])
            return cls(
                head_map_from_dict(data["head_map"]),
                AttentionRule(**data["attention"]),
                IndexerSettings(**data["indexer"]),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise RTPurboError(
                f"the configuration is not complete or holds an unknown field: {error}."
            ) from error


def head_map_from_dict(data: dict[str, Any]) -> HeadMap:
    """Reads a head map from plain JSON types.

    Raises:
        RTPurboError: a field holds a value of another type or out of range.
    """
    check_fields(HeadMap, data)
    for name, kinds in (("retrieval_heads", (int,)), ("scores", (int, float))):
        for row in data.get(name) or ():
            if row is not None and not (
                isinstance(row, list | tuple)
                and all(type(value) in kinds and math.isfinite(value) for value in row)
            ):
                raise RTPurboError(
                    f"{name} must hold a list of finite numbers or null for each layer."
                )
    rows = {
        name: tuple(None if row is None else tuple(row) for row in data.get(name) or ())
        for name in ("retrieval_heads", "scores")
    }
    counts = {
        name: _head_counts(name, data[name])
        for name in ("num_attention_heads", "num_key_value_heads")
    }
    head_map = HeadMap(**{**data, **rows, **counts})
    for layer in head_map.converted_layers:
        query, key_value = head_map.num_query_heads(layer), head_map.num_kv_heads(layer)
        if key_value < 1 or query < 1 or query % key_value:
            raise RTPurboError(
                f"the head map has {query} query heads and {key_value} KV heads in layer {layer}, but "
                "the first must be a multiple of the second."
            )
    scores = head_map.scores
    if scores and (
        len(scores) != len(head_map.retrieval_heads)
        or any(
            row is not None and len(row) != head_map.num_query_heads(layer)
            for layer, row in enumerate(scores)
        )
    ):
        raise RTPurboError(
            "the head map's scores must hold a number for each query head of its "
            f"{len(head_map.retrieval_heads)} layers."
        )
    return head_map


def _head_counts(name: str, value: Any) -> HeadCounts:
    """Reads the heads of a layer, or of each layer, from JSON types."""
    listed = value if isinstance(value, list | tuple) else [value]
    if not all(type(count) is int or (count is None and listed is value) for count in listed):
        raise RTPurboError(
            f"{name} is {value!r:.60}, but it must be a whole number, or a list of one for each layer."
        )
    return tuple(value) if listed is value else value


def default_sliding_window(context_length: int) -> int:
    """Returns the window for a context: an eighth of it, from 256 to the paper's 8,192 keys.

    Before stage 2, short windows cost more accuracy than the indexer (docs/experiment-log.md).
    """
    return max(256, min(8192, 2 ** round(math.log2(context_length / 8))))

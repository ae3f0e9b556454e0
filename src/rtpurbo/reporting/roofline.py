"""Operations and memory traffic of attention kernels, for their achieved throughput."""

from __future__ import annotations

from rtpurbo.speed_records import SpeedRecord

# Bytes of an element in the half precision that is measured, and dimensions of the index.
ELEMENT = 2
INDEX_DIM = 16


def prefill_flops(record: SpeedRecord) -> float:
    """Returns the floating-point operations of attention; scoring of index keys is not counted."""
    causal = record.context_length * (record.context_length + 1) / 2
    local = window_area(record.context_length, record.sliding_window)
    retrieval, heads = record.num_retrieval_heads, record.num_attention_heads
    if record.implementation.startswith("sdpa"):
        pairs = heads * causal
    else:
        pairs = (heads - retrieval) * local + retrieval * record.density * causal
    return 4.0 * record.head_dim * pairs * record.batch_size


def window_area(length: int, window: int) -> float:
    """Returns the number of query-key pairs within a causal sliding window."""
    inside = min(length, window)
    return inside * (inside + 1) / 2 + (length - inside) * window


def decode_bytes(record: SpeedRecord) -> float:
    """Returns the bytes of keys, values and index keys that a decode step reads."""
    token = 2 * record.head_dim * ELEMENT
    if record.implementation.startswith("sdpa"):
        read = record.context_length * record.num_key_value_heads * token
    else:
        near = min(record.context_length, record.sliding_window)
        index_element = 1 if "float8" in record.implementation else ELEMENT
        index = record.num_retrieval_heads * INDEX_DIM * index_element
        selected = record.num_retrieval_heads * record.density * token
        read = near * record.num_key_value_heads * token
        read += int(record.context_length * (index + selected))
    return float(read * record.batch_size)


def achieved(record: SpeedRecord) -> tuple[float, str] | None:
    """Returns the throughput of an operator in TFLOP/s or GB/s; None for whole models."""
    seconds = record.milliseconds / 1000
    if record.phase == "prefill":
        return prefill_flops(record) / seconds / 1e12, "TFLOP/s"
    if record.phase == "decode":
        return decode_bytes(record) / seconds / 1e9, "GB/s"
    return None

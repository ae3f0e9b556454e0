from dataclasses import replace

import pytest

from rtpurbo.reporting.speed import achieved, decode_bytes, prefill_flops, window_area
from tests.test_speed_records import RECORD

DENSE = replace(RECORD, implementation="sdpa-flash", density=1.0)


def test_pairs_within_a_window():
    assert window_area(3, 10) == 6
    assert window_area(5, 2) == 1 + 2 * 4


def test_dense_and_sparse_work():
    causal = 131072 * 131073 / 2
    assert prefill_flops(DENSE) == 4 * 128 * 32 * causal
    expected = 4 * 128 * (27 * window_area(131072, 8192) + 5 * 0.1 * causal)
    assert prefill_flops(RECORD) == pytest.approx(expected)
    assert decode_bytes(DENSE) == 131072 * 4 * 2 * 128 * 2
    assert decode_bytes(RECORD) < decode_bytes(DENSE) / 2
    in_float8 = decode_bytes(replace(RECORD, implementation="rtpurbo-float8-index"))
    assert decode_bytes(RECORD) - in_float8 == 131072 * 5 * 16


def test_achieved_throughput():
    assert achieved(replace(DENSE, milliseconds=425.0))[0] == pytest.approx(331, abs=1)
    assert achieved(RECORD)[1] == "TFLOP/s"
    assert achieved(replace(RECORD, phase="decode"))[1] == "GB/s"
    assert achieved(replace(RECORD, phase="model-decode")) is None

import pytest
import torch
from prefill_rules import REFERENCE, RULES
from prefill_table import BlockStatistics, compare, markdown_table, mean_and_error

from rtpurbo.config import AttentionRule


def record(rule, *tasks):
    return {
        "rule": rule,
        "changes": {},
        "right": dict(zip("abcd", tasks, strict=False)),
        "perplexity": 30.0,
        "far_keys_read": 0.1,
        "blocks_read": 0.2,
        "milliseconds": 12.0,
        "backend": "triton",
        "backend_in_tasks": "eager",
    }


def test_every_rule_has_its_name_and_is_allowed():
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert REFERENCE in {rule.name for rule in RULES}
    for rule in RULES:
        AttentionRule(sliding_window=512, **rule.changes)
        AttentionRule(sliding_window=512, **(rule.as_dense_as or {}))


def test_mean_and_error():
    mean, error = mean_and_error([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert mean == 0.75
    assert error == pytest.approx((1 / 3 / 4) ** 0.5 / 2)
    assert mean_and_error([[1]]) == (1, 0)


def test_rules_are_compared_on_the_questions_both_were_asked():
    dense = record(REFERENCE, [1, 1, 0, 0], [1, 1, 1, 1])
    slow = record("slow", [1, 0], [1, 1])
    found = compare(slow, dense)
    assert (found["asked"], found["mean"], found["difference"]) == (2, 0.75, -0.25)
    assert found["paired_error"] == found["error"] == 0.25
    assert found["within"]
    assert not compare(record("bad", [0, 0, 0, 0], [0, 0, 0, 0]), dense)["within"]
    assert compare(dense, dense)["within"]
    table = markdown_table([dense, slow])
    assert "| slow | 0.50 | 1.00 | 0.750 ± 0.250 | -0.250 ± 0.250 | yes | 30.00 |" in table
    assert "triton, eager" in table


def test_blocks_that_any_row_reads_are_counted():
    counts = BlockStatistics(row_tile=2, key_block=4)
    far = torch.ones(1, 1, 3, 6, dtype=torch.bool)
    far[..., 4:] = False
    selected = torch.zeros(1, 2, 3, 6, dtype=torch.bool)
    selected[0, 0, 1, 0] = True
    counts.add(far, selected)
    assert counts.block_share == 1 / 4
    assert counts.share_read == 1 / 24
    kernels = BlockStatistics()
    kernels.add_counts(10, 3, 1)
    assert kernels.block_share == 0.3

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ablations.arms import Arm, Group
from ablations.divergence_shares import SHARES, divergence_shares
from ablations.head_choice import chosen_map, even_quota
from ablations.index_quality import ROW_SHARES, TOP_P, Curve, swept_row_share, swept_top_p
from ablations.plan import base_settings, plan, shrunk
from ablations.plots import draw
from ablations.results import GroupFile, paired_difference, summary
from ablations.whole_vocabulary import vocabulary_divergence
from ablations.windows import dealt_windows, use_windows, window_costs

from rtpurbo.config import AttentionRule, HeadMap, RTPurboConfig
from rtpurbo.errors import RTPurboError
from rtpurbo.models.sparse_layers import is_sparse
from rtpurbo.models.sparsify import empty_head_map, restore, set_rule
from rtpurbo.ops.eager.selection import select_per_query, select_per_query_block
from rtpurbo.settings import CalibrationSettings, change_settings
from rtpurbo.training.sequences import TrainingMix
from tests.data.test_needles import corpus
from tests.tiny_models import make_sparse, sparse_config, tiny_model
from tests.tiny_tokenizer import tiny_tokenizer

SCORES = [[0.9, 0.8, 0.7, 0.1], None, [0.3, 0.2, 0.6, 0.0]]


def test_the_plan_is_possible():
    groups = plan(8192, 512)
    assert [group.name for group in groups] == list("abcdef")
    settings = base_settings(8192, 512, 0)
    for group in groups:
        names = [arm.name for arm in group.arms]
        assert len(set(names)) == len(names)
        assert group.reference in names
        for arm in group.arms:
            changed = change_settings(settings, arm.changes)
            shrunk(changed)
            AttentionRule(**{**vars(changed.attention), **arm.rule})
            if arm.budget_of is not None:
                assert names.index(arm.budget_of) < names.index(arm.name)
                budget = group.arms[names.index(arm.budget_of)]
                assert budget.selects
                assert budget.quick or not arm.quick
    assert sum(arm.seconds for group in groups for arm in group.arms if arm.quick) < 12 * 60


def test_a_quota_gives_every_layer_its_share():
    assert even_quota(SCORES, 2) == ((0,), None, (2,))
    assert even_quota(SCORES, 3) == ((0, 1), None, (2,))
    assert even_quota(SCORES, 8) == ((0, 1, 2, 3), None, (0, 1, 2, 3))


def test_choices_of_heads():
    settings = CalibrationSettings(count=3)
    best = chosen_map(SCORES, 2, settings, "global", 0)
    assert best.retrieval_heads == ((0, 1, 2), None, ())
    assert chosen_map(SCORES, 2, settings, "per_layer", 0).retrieval_heads == ((0, 1), None, (2,))
    groups = chosen_map(SCORES, 2, settings, "kv_group_same_memory", 0)
    assert groups.num_full_key_value_heads == best.num_full_key_value_heads == 2
    assert groups.num_retrieval_heads == 4
    drawn = chosen_map(SCORES, 2, settings, "random", 0)
    assert drawn.num_retrieval_heads == 3
    assert drawn.retrieval_heads[2] == ()


def test_windows_are_dealt_to_those_who_gain():
    head_map = HeadMap(((0,), None, ()), 2, 1)
    costs = [[[9, 9, 9], [5, 1, 0]], None, [[1, 1, 1], [6, 6, 0]]]
    # There are 192 tokens to give. 4 for 64 is the most a token; then 1 for 128 is all that fits.
    assert dealt_windows(costs, head_map, [64, 128, 256], 128) == [[128, 256], None, [64, 64]]
    assert dealt_windows(costs, head_map, [64, 128, 256], 64) == [[64, 64], None, [64, 64]]
    wide = dealt_windows(costs, head_map, [64, 128, 256], 256)
    assert wide == [[256, 256], None, [64, 256]]


def test_window_costs_are_what_leaving_keys_out_changes():
    model = tiny_model()
    ids = list(range(2, 62))
    windows = [8, 16, 64]
    costs = window_costs(model, [ids, ids], windows, 2)
    assert not is_sparse(model)
    for name in ("output_error", "lost_mass"):
        table = torch.tensor(costs[name])
        assert table.shape == (2, 6, 3)
        assert (table[..., 0] > table[..., 2]).all()
        assert table[..., 2].abs().max() < 1e-6
    # Mass is lost the more, the shorter the window.
    assert (torch.tensor(costs["lost_mass"]).diff(dim=-1) <= 1e-6).all()


def test_equal_windows_a_head_are_one_window():
    model = make_sparse(tiny_model(), sparse_config(tiny_model(), prefill_mode="dense"))
    ids = torch.arange(2, 62)[None]
    expected = model(ids, use_cache=False).logits
    use_windows(model, [[8] * 6, [8] * 6])
    torch.testing.assert_close(model(ids, use_cache=False).logits, expected)
    use_windows(model, [[64] * 6, [64] * 6])
    set_rule(model, top_p=1.0)
    torch.testing.assert_close(
        model(ids, use_cache=False).logits, tiny_model()(ids, use_cache=False).logits
    )


@pytest.fixture
def mix():
    return TrainingMix(tiny_tokenizer(), corpus(), (640,), SHARES, 0, "shares")


def test_shares_of_heads_add_up_to_what_windows_lose(mix):
    model, rule = tiny_model(vocab_size=512), AttentionRule(sliding_window=64)
    before = model(torch.arange(40)[None]).logits
    points = [(number + 0.5) / 8 for number in range(8)]
    shares = divergence_shares(model, mix, 2, rule, points)
    lost = 0.0
    for number in range(2):
        sequence = mix.sequence(number)
        ids = torch.tensor([sequence.input_ids])
        rows = slice(-sequence.num_answer_tokens - 1, -1)
        dense = model(ids).logits[0, rows].log_softmax(-1)
        make_sparse(model, RTPurboConfig(empty_head_map(model), rule))
        local = model(ids, use_cache=False).logits[0, rows].log_softmax(-1)
        restore(model)
        lost += float((dense.exp() * (dense - local)).sum(-1).mean()) / 2
    assert lost > 1e-6
    assert sum(map(sum, shares)) == pytest.approx(lost, rel=0.05)
    torch.testing.assert_close(model(torch.arange(40)[None]).logits, before)
    assert not any(weight.grad is not None for weight in model.parameters())


def test_a_window_that_holds_everything_costs_nothing(mix):
    shares = divergence_shares(
        tiny_model(vocab_size=512), mix, 1, AttentionRule(sliding_window=640)
    )
    assert torch.tensor(shares).abs().max() < 1e-6


def test_the_whole_vocabulary_counts():
    torch.manual_seed(0)
    teacher, student, weight = torch.randn(7, 5), torch.randn(7, 5), torch.randn(11, 5)
    student.requires_grad_()
    expected, found = ((states @ weight.T).softmax(-1) for states in (teacher, student))
    divergence = vocabulary_divergence(teacher, student, weight)
    torch.testing.assert_close(divergence, (expected * (expected / found).log()).sum(-1))
    divergence.sum().backward()
    torch.testing.assert_close(student.grad, (found - expected).detach() @ weight)


@pytest.mark.parametrize("reading", ["paper", "residual", "far"])
def test_sweeps_select_as_rules_do(reading):
    torch.manual_seed(0)
    rule = AttentionRule(
        num_sink_tokens=2, sliding_window=16, block_size=16, query_block_size=8, reading=reading,
        min_tokens=0, prefill_mode="row_share",
    )  # fmt: skip
    keys, queries = torch.arange(83), torch.arange(72, 80)[:, None]
    near = ((keys > queries - 16) | (keys < 2)) & (keys <= queries)
    far = (keys <= queries) & ~near
    exact, estimate = (
        (torch.randn(1, 2, 8, 83) * 3).masked_fill(keys > queries, -torch.inf) for _ in range(2)
    )
    positions = keys[None]
    tokens = swept_top_p(rule, exact, estimate, near, far)
    blocks = swept_row_share(rule, exact, estimate, near, far, positions)

    def expected(selected):
        share = selected.sum(-1) / far.sum(-1)
        return (exact.softmax(-1) * (near | selected)).sum(), selected.sum(), share.sum()

    for number, top_p in enumerate(TOP_P):
        asked = replace(rule, top_p=top_p)
        kept, read, _ = expected(select_per_query(asked, estimate, near, far, positions))
        assert tokens[0][number] == pytest.approx(float(kept), rel=1e-5)
        assert tokens[1][number] == read
    for number, row_share in enumerate(ROW_SHARES):
        asked = replace(rule, row_share=row_share)
        kept, _, share = expected(select_per_query_block(asked, estimate, near, far, positions))
        assert blocks[0][number] == pytest.approx(float(kept), rel=1e-5)
        assert blocks[1][number] == pytest.approx(float(share), rel=1e-5)


def test_costs_between_settings():
    curve = Curve()
    curve.add([1.8, 1.96, 1.98], [20, 80, 100], 2)
    assert curve.points()[0] == (0.9, 10)
    assert curve.cost_at(0.9) == pytest.approx(10)
    assert curve.cost_at(0.96) == pytest.approx(math.exp(
        math.log(10) + math.log(4) * math.log(0.04 / 0.1) / math.log(0.02 / 0.1)
    ))  # fmt: skip
    assert curve.cost_at(0.8) is None
    assert curve.cost_at(0.995) is None


def answers(right, divergence):
    reads = {"rows": 4, "far_tokens_mean": 9.0, "far_share": 0.1, "mass_kept": 0.9,
             "tokens_mean": 40.0}  # fmt: skip
    return {
        "16 keys": {"right": right, "divergence": divergence, "reads": reads},
        "prose": {"divergence": [0.1], "loss": [3.1], "teacher_loss": [3.0], "reads": None},
    }


def test_summaries_and_differences():
    found = summary(answers([True, False], [0.5, 1.5]))
    assert found["score"] == {"mean": 50.0, "ci95": [0.0, 100.0]}
    assert found["answer_divergence"]["mean"] == 1.0
    assert found["perplexity_ratio"]["mean"] == pytest.approx(math.exp(0.1))
    assert found["answers"]["mass_kept"] == 0.9
    assert "prose" not in found
    one, other = ({"answers": {"64": answers(right, [0.0, 0.0])}}
                  for right in ([True, False], [True, True]))  # fmt: skip
    assert paired_difference(one, other, "64", "right")["mean"] == -50.0


def test_a_group_file_goes_on_or_refuses(tmp_path):
    group = Group("a", "which?", (Arm("one", 1), Arm("two", 1)), "one")
    first = GroupFile(tmp_path, group, {"seed": 0})
    first.add({"arm": "two"})
    first.add({"arm": "one"})
    again = GroupFile(tmp_path, group, {"seed": 0})
    assert [record["arm"] for record in again.records] == ["one", "two"]
    assert again.record("three") is None
    with pytest.raises(RTPurboError, match="other settings"):
        GroupFile(tmp_path, group, {"seed": 1})


def test_a_panel_for_each_group_that_is_there(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    folder = Path(__file__).parents[2] / "benchmarks" / "results" / "ablations-8k-h100"
    groups = {path.stem: json.loads(path.read_text()) for path in folder.glob("?.json")}
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    for chosen in ("abcdef", "c", "bf"):
        path = tmp_path / f"{chosen}.png"
        draw({letter: groups[letter] for letter in chosen}, path, "title")
        assert path.stat().st_size > 10_000
    every, alone, two = ([axis for axis in each.axes if axis.get_visible()] for each in drawn)
    assert [len(panels) for panels in (every, alone, two)] == [4, 1, 2]
    spaces = [line.get_label() for line in alone[0].get_lines()]
    assert spaces == ["slow pairs", "pre-RoPE (paper)", "post-RoPE", "exact scores"]
    # Every space at all four sizes, and fewer tokens with each.
    for line in alone[0].get_lines()[:3]:
        tokens = list(line.get_ydata())
        assert len(tokens) == 4
        assert tokens == sorted(tokens, reverse=True)

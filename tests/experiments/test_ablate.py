import json
import os
import signal
import sys

import ablate
import pytest

from rtpurbo.training import stage2
from tests.tiny_artifact import save_tiny_base

# The second is long enough for every question.
SHORT, LONG = (1024, 64), (2048, 128)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["ablate.py", *map(str, arguments)])
    ablate.main()


@pytest.fixture
def command(tmp_path, request):
    length, window = getattr(request, "param", SHORT)
    base = save_tiny_base(tmp_path / "base", max_position_embeddings=length)
    return [base, "--output", tmp_path / "out", "--length", length, "--window", window,
            "--samples", 1, "--smoke", "--device", "cpu"]  # fmt: skip


def records(tmp_path, group):
    kept = json.loads((tmp_path / "out" / f"{group}.json").read_text())
    return {record["arm"]: record for record in kept["records"]}


def test_arms_are_chosen_by_name_or_part():
    groups = ablate.plan(*LONG)

    def names(*arguments):
        return [arm.name for _, arm in ablate.chosen(groups, *arguments)]

    assert names(["c"], ["slow pairs, 16"], False) == ["slow pairs, 16"]
    assert len(names(["c"], ["slow pairs, 1"], False)) > 4
    every = names(None, None, False)
    assert len(every) == sum(len(group.arms) for group in groups)
    assert every[: len(names(None, None, True))] == names(None, None, True)


def test_one_arm_of_each_kind(monkeypatch, command, tmp_path, capsys):
    run(monkeypatch, *command, "--groups", "a", "--arms", "residual 0.90, at")
    read, top_k = records(tmp_path, "a").values()
    assert read["arm"].startswith("residual")
    length = str(SHORT[0])
    for kind, entry in top_k["answers"][length].items():
        budget = read["answers"][length][kind]["reads"]["far_tokens_mean"]
        assert budget <= entry["reads"]["far_tokens_mean"] < budget + 1
    run(monkeypatch, *command, "--groups", "c", "--arms", "exact scores", "slow pairs, 4")
    found = records(tmp_path, "c")
    assert found["exact scores"]["index"][length]["divergence"] == pytest.approx(0, abs=1e-6)
    assert found["slow pairs, 4"]["index"][length]["divergence"] > 0.01
    capsys.readouterr()
    # What is done is done; the tables are shown again.
    run(monkeypatch, *command, "--groups", "c", "--arms", "exact scores")
    assert "| exact scores |" in capsys.readouterr().out


@pytest.mark.parametrize("command", [LONG], indirect=True)
def test_a_stopped_run_goes_on(monkeypatch, command, tmp_path, capsys):
    arms = ["--groups", "d", "--arms", "LoRA, 600 steps"]
    backpropagate, calls = stage2.backpropagate, []

    def stopping(*given):
        calls.append(given)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return backpropagate(*given)

    monkeypatch.setattr(stage2, "backpropagate", stopping)
    run(monkeypatch, *command, *arms)
    assert "the same command goes on" in capsys.readouterr().out
    assert not (tmp_path / "out" / "d.json").exists()
    run(monkeypatch, *command, *arms)
    assert len(calls) == 6
    assert list(records(tmp_path, "d")) == ["LoRA, 600 steps"]


@pytest.mark.slow
@pytest.mark.parametrize("command", [LONG], indirect=True)
@pytest.mark.parametrize("group", list("abcdef"))
def test_every_arm_runs(monkeypatch, command, tmp_path, group):
    run(monkeypatch, *command, "--groups", group)
    [planned] = [one for one in ablate.plan(*LONG) if one.name == group]
    assert list(records(tmp_path, group)) == [arm.name for arm in planned.arms]

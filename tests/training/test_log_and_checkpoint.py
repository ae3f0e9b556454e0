"""Logs and checkpoints after an interruption."""

import errno
from pathlib import Path

import pytest
import torch
from torch import nn

from rtpurbo.errors import RTPurboError
from rtpurbo.training.checkpoint import Checkpoint
from rtpurbo.training.log import TrainingLog
from rtpurbo.training.optimizer import make_optimizer


def test_rewind_drops_entries_after_the_checkpoint(tmp_path):
    log = TrainingLog(tmp_path / "log.jsonl")
    for stage, step in [("stage1", 1), ("stage1", 2), ("stage2", 1), ("stage2", 2), ("refresh", 1)]:
        log.write({"stage": stage, "step": step})
    log.rewind("stage2", 1)
    assert [(entry["stage"], entry["step"]) for entry in log.entries()] == [
        ("stage1", 1),
        ("stage1", 2),
        ("stage2", 1),
    ]


def test_an_incomplete_line_is_dropped(tmp_path):
    log = TrainingLog(tmp_path / "log.jsonl")
    log.write({"stage": "stage1", "step": 1})
    with log.path.open("a") as file:
        file.write('{"stage": "sta')
    log.rewind("stage1", 1)
    assert len(list(log.entries())) == 1


def test_nothing_is_kept_without_a_file():
    TrainingLog(None).write({"stage": "stage1", "step": 1})
    assert Checkpoint(None).steps_done() == 0


def train(steps, checkpoint, seen):
    weight = nn.Parameter(torch.ones(3))
    optimizer, schedule = make_optimizer([weight], 0.1, 0.01, 3, 10)
    first = checkpoint.restore([weight], optimizer, schedule)
    for step in range(first, steps):
        (weight * torch.tensor([1.0, 2.0, step])).square().sum().backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        checkpoint.save(step + 1, [weight], optimizer, schedule)
        seen.append(step)
    return weight.detach()


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    whole = train(10, Checkpoint(None), [])
    checkpoint = Checkpoint(tmp_path / "state", every=3)
    seen: list[int] = []
    train(7, checkpoint, seen)
    assert checkpoint.steps_done() == 6
    resumed = train(10, checkpoint, seen)
    assert seen == [*range(7), *range(6, 10)]
    assert torch.equal(whole, resumed)


def test_old_checkpoints_are_pruned_and_remains_removed(tmp_path):
    checkpoint = Checkpoint(tmp_path / "state", every=2)
    train(9, checkpoint, [])
    assert sorted(path.name for path in (tmp_path / "state").iterdir()) == [
        "step-000006.checkpoint",
        "step-000008.checkpoint",
    ]
    remains = tmp_path / "state" / ".step-000010.checkpoint.abc"
    remains.mkdir()
    checkpoint.remove_partial_files()
    assert not remains.exists()


def test_a_broken_checkpoint_falls_back_to_the_previous_one(tmp_path):
    checkpoint = Checkpoint(tmp_path / "state", every=2)
    whole = train(10, Checkpoint(None), [])
    train(9, checkpoint, [])
    newest = tmp_path / "state" / "step-000008.checkpoint"
    newest.write_bytes(newest.read_bytes()[:100])
    assert checkpoint.steps_done() == 6
    assert torch.equal(train(10, checkpoint, []), whole)
    for path in (tmp_path / "state").iterdir():
        path.write_bytes(b"")
    with pytest.raises(RTPurboError, match=r"no checkpoint in .* can be read"):
        checkpoint.steps_done()


def test_the_position_is_restored(tmp_path):
    weight = nn.Parameter(torch.ones(1))
    optimizer, schedule = make_optimizer([weight], 0.1, 0.0, 0, 10)
    position = {"group": 3, "lanes": {"0": {"taken": 2, "start": [1, None, "x"]}}}
    checkpoint = Checkpoint(tmp_path / "state", every=1)
    checkpoint.save(1, [weight], optimizer, schedule, position=lambda: position)
    assert checkpoint.position is None
    assert checkpoint.restore([weight], optimizer, schedule) == 1
    assert checkpoint.position == position


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 704 vs 598"),
    ],
)
def test_a_full_disk_costs_the_steps_since_the_last_checkpoint(tmp_path, monkeypatch, error):
    whole = train(10, Checkpoint(None), [])
    checkpoint = Checkpoint(tmp_path / "state", every=3)

    def half(state, path):
        if state["step"] > 3:
            path.write_bytes(b"half")
            raise error
        save(state, path)

    save = torch.save
    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(RTPurboError, match=r"no space left .*/step-000006.*--resume"):
        train(10, checkpoint, [])
    monkeypatch.undo()
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["step-000003.checkpoint"]
    assert checkpoint.steps_done() == 3
    assert torch.equal(train(10, checkpoint, []), whole)


def test_a_full_disk_is_reported_for_the_log(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("no device that is always full")
    log = TrainingLog(tmp_path / "log.jsonl")
    log.path.symlink_to("/dev/full")
    with pytest.raises(RTPurboError, match="no space left on the disk to write"):
        log.write({"stage": "stage1", "step": 1})


def test_the_schedule_warms_up_and_ends_at_zero():
    weight = nn.Parameter(torch.ones(1))
    optimizer, schedule = make_optimizer([weight], 1.0, 0.0, 4, 20)
    rates = []
    for _ in range(20):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:5] == [0.2, 0.4, 0.6, 0.8, 1.0]
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert optimizer.param_groups[0]["lr"] < 1e-6

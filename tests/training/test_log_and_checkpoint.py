"""What survives an interruption."""

import torch
from torch import nn

from rtpurbo.training.checkpoint import Checkpoint
from rtpurbo.training.log import TrainingLog
from rtpurbo.training.optimizer import make_optimizer


def test_rewind_forgets_what_came_after_the_checkpoint(tmp_path):
    log = TrainingLog(tmp_path / "log.jsonl")
    for stage, step in [("stage1", 1), ("stage1", 2), ("stage2", 1), ("stage2", 2), ("refresh", 1)]:
        log.write({"stage": stage, "step": step})
    log.rewind("stage2", 1)
    assert [(entry["stage"], entry["step"]) for entry in log.entries()] == [
        ("stage1", 1),
        ("stage1", 2),
        ("stage2", 1),
    ]


def test_a_line_cut_off_is_left_out(tmp_path):
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


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole = train(10, Checkpoint(None), [])
    checkpoint = Checkpoint(tmp_path / "state", every=3)
    seen: list[int] = []
    train(7, checkpoint, seen)
    assert checkpoint.steps_done() == 6
    resumed = train(10, checkpoint, seen)
    assert seen == [*range(7), *range(6, 10)]
    assert torch.equal(whole, resumed)


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

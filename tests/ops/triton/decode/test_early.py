import torch

from rtpurbo.ops.triton.decode.early import can_begin_early


def test_that_only_gpus_from_hopper_on_begin_early(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert can_begin_early(torch.device("cuda"))
    assert not can_begin_early(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert not can_begin_early(torch.device("cuda"))


def test_that_other_makers_gpus_do_not(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    assert not can_begin_early(torch.device("cuda"))

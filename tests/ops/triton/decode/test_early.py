import pytest
import torch

from rtpurbo.ops.triton.decode.early import can_begin_early


@pytest.fixture(autouse=True)
def asked_anew():
    can_begin_early.cache_clear()
    yield
    can_begin_early.cache_clear()


def test_that_only_gpus_from_hopper_on_begin_early(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert can_begin_early(torch.device("cuda"))
    assert not can_begin_early(torch.device("cpu"))
    can_begin_early.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert not can_begin_early(torch.device("cuda"))


def test_that_other_makers_gpus_do_not(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    assert not can_begin_early(torch.device("cuda"))

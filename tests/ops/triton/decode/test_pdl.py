import pytest
import torch

from rtpurbo.ops.triton.decode.pdl import supports_pdl


@pytest.fixture(autouse=True)
def asked_anew():
    supports_pdl.cache_clear()
    yield
    supports_pdl.cache_clear()


def test_that_only_gpus_from_hopper_on_begin_early(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert supports_pdl(torch.device("cuda"))
    assert not supports_pdl(torch.device("cpu"))
    supports_pdl.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert not supports_pdl(torch.device("cuda"))


def test_that_other_makers_gpus_do_not(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    assert not supports_pdl(torch.device("cuda"))

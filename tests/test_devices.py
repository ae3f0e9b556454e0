import pytest
import torch

from rtpurbo.devices import base_dtype, default_dtype, device_kind, device_name, resolve_device
from rtpurbo.errors import RTPurboError


def test_auto_chooses_an_available_device(monkeypatch):
    assert resolve_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert resolve_device() == torch.device("cpu")


@pytest.mark.parametrize("name", ["abacus", "cuda:99", ""])
def test_a_device_that_is_not_there(name):
    with pytest.raises(RTPurboError, match="not available here"):
        resolve_device(name)


def test_dtype_and_name_by_device():
    assert default_dtype(torch.device("cpu")) == torch.float32
    assert default_dtype(torch.device("cuda")) == torch.bfloat16
    assert device_name(torch.device("cpu")) == "cpu"


def test_a_base_model_keeps_its_type_on_a_gpu():
    assert base_dtype("auto", torch.device("cuda")) == "auto"
    assert base_dtype("auto", torch.device("cpu")) == torch.float32
    assert base_dtype("bfloat16", torch.device("cpu")) == torch.bfloat16
    with pytest.raises(RTPurboError, match="no dtype 'bf16'"):
        base_dtype("bf16", torch.device("cuda"))


def test_devices_of_one_kind_run_the_same_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert device_kind(torch.device("cuda:1")) == "cuda 9.0"
    assert device_kind(torch.device("cpu")) == "cpu"

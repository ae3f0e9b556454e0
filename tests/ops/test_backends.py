"""Triton's interpreter is recognised as Triton itself recognises it."""

import pytest
import torch

from rtpurbo.ops import backends

pytest.importorskip("triton")

STATES = torch.empty(1)


@pytest.mark.parametrize("setting", [None, "", "0", "false", "off"])
def test_kernels_need_a_gpu_without_the_interpreter(monkeypatch, setting):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if setting is not None:
        monkeypatch.setenv("TRITON_INTERPRET", setting)
    assert not backends.interprets_kernels()
    with pytest.raises(ValueError, match="'triton' needs a GPU"):
        backends.require_triton(STATES)


@pytest.mark.parametrize("setting", ["1", "true", "on"])
def test_the_interpreter_runs_kernels_on_a_cpu(monkeypatch, setting):
    monkeypatch.setenv("TRITON_INTERPRET", setting)
    assert backends.interprets_kernels()
    backends.require_triton(STATES)
